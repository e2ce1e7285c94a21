"""Attribution (Section 3.1, advantage 1): is it pre-training or post-training that says a token?

    python sample.py --explain                                       # a line for each token
    python sample.py --base tiny-l --explain --page out/page.html    # a page, too
    python sample.py --base tiny-l --explain --page out/page.html --screenshot picture.png

Logits add up, so each token of an answer can be taken apart: what the base alone would have said, what
z_delta pushed for, and who had the last word. The page is one HTML file, with no network and no script.
"""

import html
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import UsageError
from data.files import replacing, write_text
from data.tiny_world import INSTRUCTIONS, prompt_text
from data.tokenizer import Tokenizer
from ivl import combine

# ---------------------------------------------------------------------------------------------------------
# One token


Moved = list[tuple[int, float, float, float]]  # tokens, each with p_base, p_post and z_delta


@dataclass
class Attribution:
    """Who decided on a token. Shares p are before top_p and at temperature 1; z_delta is in nats, times alpha."""

    token: int
    decided: str  # "base": it would have said the same. "value": it would not. "chance": sampling chose neither's first
    base_token: int  # the base's own first choice
    p_base: float  # how likely the base alone finds the token that was said
    p_post: float  # and with z_delta
    z_delta: float  # of that token
    size: float  # mean |z_delta|
    kl: float  # KL(p_post || p_base) in nats: how far z_delta has moved the base at this token
    pushed: int  # the token with the largest z_delta, likely or not
    raised: Moved  # tokens that gained most
    lowered: Moved  # that lost most
    by: str = ""  # of a sum of value networks, the one that decided: the largest of `pushes`
    pushes: dict[str, float] | None = None  # how far each raised the token over base_token, in nats

    @property
    def classes(self) -> str:
        """Of the token on a page: who decided, and of a sum which network (n0, n1, ...)."""
        return f"{self.decided} n{list(self.pushes).index(self.by)}" if self.by else self.decided


def attribute(
    z_base: Tensor,
    z_delta: Tensor,
    token: int,
    alpha: float = 1.0,
    count: int = 4,
    parts: dict[str, Tensor] | None = None,
) -> Attribution:
    """Who decided on `token`, which was picked by z_base (Vb,) and z_delta (Vv,); `count` raised and lowered ones at most.

    parts: of a sum of value networks, each one's name and its share (Vv,) of z_delta.
    """
    z_post = combine(z_base, z_delta, alpha).float()  # (Vb,)
    z_base = z_base.float()  # (Vb,)
    z_delta = combine(torch.zeros_like(z_base), z_delta.float(), alpha)  # (Vb,)
    log_base, log_post = z_base.log_softmax(-1), z_post.log_softmax(-1)
    p_base, p_post = log_base.exp(), log_post.exp()
    base_token, post_token = int(p_base.argmax()), int(p_post.argmax())
    decided = "chance"
    if token == base_token:
        decided = "base"
    elif token == post_token:
        decided = "value"

    by, pushes = "", None
    if parts and decided == "value":  # a token that z_delta lacks has 0
        shares = {
            name: F.pad(part, (0, max(0, len(z_base) - len(part)))) for name, part in parts.items()
        }
        pushes = {name: alpha * (z[token] - z[base_token]).item() for name, z in shares.items()}
        by = max(pushes, key=pushes.get)

    def moved(sign: int) -> Moved:
        """Tokens whose share moved most in one direction, and by more than a rounding of what is shown."""
        gain = sign * (p_post - p_base)
        ids = [id for id in gain.topk(min(count, len(gain))).indices.tolist() if gain[id] > 0.0005]
        return [(id, p_base[id].item(), p_post[id].item(), z_delta[id].item()) for id in ids]

    kl = torch.where(p_post > 0, p_post * (log_post - log_base), 0.0).sum().clamp(min=0).item()
    return Attribution(
        token,
        decided,
        base_token,
        p_base[token].item(),
        p_post[token].item(),
        z_delta[token].item(),
        z_delta.abs().mean().item(),
        kl,
        int(z_delta.argmax()),
        moved(1),
        moved(-1),
        by,
        pushes,
    )


def attribute_last(guided, token: int) -> Attribution:
    """Who decided on `token`, which was picked after the last step of a guided base (sample.Guided) in the first row."""
    parts = None
    if names := getattr(guided.value, "names", None):
        parts = {name: part[0, -1] for name, part in zip(names, guided.value.parts)}
    return attribute(
        guided.z_base[0, -1, : guided.readable],
        guided.z_delta[0, -1],
        token,
        guided.alpha,
        parts=parts,
    )


def explain(speaker, text: str, args) -> list[Attribution]:
    """The answer to one question of a sample.Speaker, token by token."""
    records: list[Attribution] = []

    def on_token(_, token: int) -> None:
        records.append(attribute_last(speaker.guided, token))

    speaker.answer([("user", text)], args, on_token)
    return records


# ---------------------------------------------------------------------------------------------------------
# In the terminal


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token for a person to read, with its spaces made visible."""
    text = tokenizer.token_bytes(token).decode("utf-8", "replace")
    if not text:
        return "[end]" if token in (tokenizer.eos_id, tokenizer.end_of_turn_id) else f"[{token}]"
    return "".join("␣" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_attributions(tokenizer: Tokenizer, records: list[Attribution], guide: str) -> None:
    """A line for each token, those at which the guide decided with a mark."""

    def moved(each: Moved) -> str:
        return ", ".join(
            f"{token_name(tokenizer, id)} {after - before:+.2f}"
            for id, before, after, _ in each[:2]
        )

    rows = [
        [
            "",
            "said",
            "base alone",
            "decided",
            "p base",
            "p both",
            "z_delta",
            "|z_delta|",
            "more probable",
            "less probable",
        ]
    ]
    for each in records:
        rows.append(
            [
                "*" * (each.decided == "value"),
                token_name(tokenizer, each.token),
                token_name(tokenizer, each.base_token),
                each.by or each.decided,
                f"{each.p_base:.3f}",
                f"{each.p_post:.3f}",
                f"{each.z_delta:+.1f}",
                f"{each.size:.1f}",
                moved(each.raised),
                moved(each.lowered),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("    " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(f"    {count_decisions(records, guide)}")


def count_decisions(records: list[Attribution], guide: str) -> str:
    """In words; `guide` is what guides: the value network, several, or proxy tuning."""
    base, value, chance = [
        sum(each.decided == who for each in records) for who in ("base", "value", "chance")
    ]
    by_chance = f", chance chose {chance}" if chance else ""
    networks = Counter(each.by for each in records if each.by)
    by_whom = ", ".join(f"{name} at {count}" for name, count in networks.most_common())
    return (
        f"of {len(records)} tokens the base agreed with {base}, {guide} overruled it at {value}"
        + (f" ({by_whom})" if by_whom else "")
        + by_chance
    )


# ---------------------------------------------------------------------------------------------------------
# As a page

BROWSERS = ["chromium", "chromium-browser", "google-chrome"]
WIDTH = 1280  # pixels
FULL_BAR = 8  # nats

STYLE = """
:root { --ink: #1d2733; --faint: #66727f; --line: #dfe4ea; --base: #eef1f4; --value: #ffb066; --chance: #b9c8f7; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; color: var(--ink); background: #fff; }
main { width: 800px; margin: 0 400px 60px 40px; }
h1 { font-size: 26px; margin: 32px 0 4px; }
h2 { font-size: 17px; margin: 36px 0 6px; }
p { margin: 4px 0; }
.faint, dt { color: var(--faint); }
.alone { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 6em; overflow: hidden; }
.tokens { font: 18px/2.5 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.token { padding: 3px 1px 6px; margin-right: 2px; border-radius: 4px; cursor: help; white-space: pre-wrap;
  background: linear-gradient(#c2410c, #c2410c) no-repeat left bottom / var(--kl) 4px var(--base); }
.token.value, .key.value { background-color: var(--value); }
.token.n1, .key.n1 { background-color: #f5dc6b; }
.token.n2, .key.n2 { background-color: #e3b5ea; }
.token.chance, .key.chance { background-color: var(--chance); }
.token:hover, .token:focus { outline: 2px solid var(--ink); }
.key { padding: 2px 6px; border-radius: 4px; background-color: var(--base); }
.detail { display: none; position: fixed; right: 32px; top: 32px; width: 360px; padding: 14px 18px; cursor: auto;
  white-space: normal; border: 1px solid var(--line); border-radius: 8px; background: #fff; box-shadow: 0 4px 18px #0002;
  font: 14px/1.45 system-ui, "DejaVu Sans", sans-serif; }
.token:hover .detail, .token:focus .detail { display: block; z-index: 2; }
.detail.shown { display: block; }
.detail h3 { font: 600 17px ui-monospace, "DejaVu Sans Mono", monospace; margin: 0 0 6px; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: 1fr auto; margin: 6px 0; gap: 1px 10px; }
dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
table { width: 100%; border-collapse: collapse; margin: 8px 0 0; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; border-bottom: 1px solid var(--line); }
td, th + th { text-align: right; }
td:first-child { text-align: left; font-family: ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
"""

DECIDED = {
    "base": "the base alone would have said the same",
    "value": "{guide} overruled the base",
    "chance": "drawn by chance: the first choice of neither",
}


def share(p: float) -> str:
    return f"{100 * p:.1f}%" if p >= 0.0005 else "&lt;0.1%"


def moved(head: str, each: Moved, name) -> str:
    rows = "".join(
        f"<tr><td>{name(token)}<td>{share(before)}<td>{share(after)}<td>{z_delta:+.1f}"
        for token, before, after, z_delta in each
    )
    return f"<table><tr><th>{head}<th>p base<th>p both<th>z_delta{rows}</table>" if rows else ""


def detail(each: Attribution, tokenizer: Tokenizer, guide: str, classes: str = "") -> str:
    """The numbers of one token."""

    def name(token: int) -> str:
        return html.escape(token_name(tokenizer, token))

    first = (
        "" if each.decided == "base" else f"<dt>the base alone would say<dd>{name(each.base_token)}"
    )
    who = html.escape(each.by) or guide
    pushes = "".join(
        f"<dt>pushed over that by {html.escape(network)}<dd>{push:+.2f}"
        for network, push in (each.pushes or {}).items()
    )
    return (
        f'<span class="detail{classes}"><h3>{name(each.token)}</h3>{DECIDED[each.decided].format(guide=who)}<dl>{first}{pushes}'
        f"<dt>its probability, base alone<dd>{share(each.p_base)}<dt>and with z_delta<dd>{share(each.p_post)}"
        f"<dt>its z_delta<dd>{each.z_delta:+.2f}<dt>largest z_delta, likely or not<dd>{name(each.pushed)}"
        f"<dt>mean |z_delta|<dd>{each.size:.2f}<dt>KL(both, base)<dd>{each.kl:.2f} nats</dl>"
        f"{moved('more probable', each.raised, name)}{moved('less probable', each.lowered, name)}</span>"
    )


def shown_text(tokenizer: Tokenizer, each: Attribution) -> str:
    """A token in running text: its own characters, with names for what has none and a mark for line breaks."""
    text = tokenizer.token_bytes(each.token).decode("utf-8", "replace")
    return html.escape(
        text.replace("\n", "↵\n") if text.strip(" ") else token_name(tokenizer, each.token)
    )


def tokens_html(tokenizer: Tokenizer, records: list[Attribution], guide: str) -> str:
    """The answer as one span a token: coloured by who decided, with a bar for how far z_delta moved the base."""
    return "".join(
        f'<span tabindex="0" class="token {each.classes}" style="--kl:{min(100, 100 * each.kl / FULL_BAR):.0f}%">'
        f"{shown_text(tokenizer, each)}{detail(each, tokenizer, guide)}</span><wbr>"
        for each in records
    )


def page(
    title: str,
    tokenizer: Tokenizer,
    answers: list[tuple[str, str, list[Attribution]]],
    guide: str = "the value network",
) -> str:
    """The whole file, from questions, what the base alone answers, and the guided answer token by token.

    Until a token is pointed at, the numbers of the one that z_delta moved most stand at the side.
    """
    sections = "".join(
        f"<h2>{html.escape(question)}</h2>"
        f'<p class="alone"><span class="faint">the base alone:</span> {html.escape(alone)}'
        f'<div class="tokens">{tokens_html(tokenizer, records, guide)}</div><p class="faint">{count_decisions(records, guide)}'
        for question, alone, records in answers
    )
    everything = [each for _, _, records in answers for each in records]
    words = [each for each in everything if tokenizer.token_bytes(each.token).strip()] or everything
    most = max(words, key=lambda each: each.kl)
    networks = {each.by: each.classes for each in everything if each.by}
    keys = "".join(
        f' <span class="key {classes}">{html.escape(name)}</span>'
        for name, classes in networks.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width={WIDTH}">
<title>{html.escape(title)}</title><style>{STYLE}</style>
<main><h1>Where did post-training speak?</h1>
<p>{html.escape(title)}: {count_decisions(everything, guide)}.
<p class="faint"><span class="key">the base agreed</span> <span class="key value">{guide} overruled it</span>{keys}
<span class="key chance">chance</span> &nbsp; The bar below a token: how far z_delta moved the base there
({FULL_BAR} nats fill it). Point at a token for its numbers.
{sections}</main>{detail(most, tokenizer, guide, " shown")}
</html>
"""


def find_browser() -> str:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UsageError(
            f"--screenshot needs Chromium, and none of {', '.join(BROWSERS)} is installed"
        )
    return browser


def screenshot(file: Path, picture: Path, height: int) -> None:
    """A picture of a page, by headless Chromium. UsageError where there is none or it fails."""
    browser = find_browser()
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            "--headless",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            f"--window-size={WIDTH},{height}",
            f"--screenshot={profile}/picture.png",
            file.resolve().as_uri(),
        ]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.insert(1, "--no-sandbox")  # Chromium refuses to sandbox itself as root
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            raise UsageError(
                f"--screenshot: {Path(browser).name} took longer than two minutes"
            ) from None
        taken = Path(profile, "picture.png")
        if done.returncode or not taken.is_file():
            said = done.stderr.strip().splitlines() or ["without a word"]
            raise UsageError(f"--screenshot: {Path(browser).name} failed: {said[-1]}")
        with replacing(picture) as temporary:
            shutil.copyfile(taken, temporary)


def questions_of(world) -> list[str]:
    """A question of the tiny world for each of its instructions."""
    items = world.fact_items("development")
    return [
        prompt_text(next(item for item in items if item.instruction == instruction))
        for instruction in INSTRUCTIONS
    ]


def save_page(plugged, args) -> None:
    """Answer the questions of a run.plug.Plugged, and write the page --page; a picture if asked."""
    if args.screenshot:
        find_browser()  # before any work
    answers = []
    for text in args.prompt or questions_of(plugged.world):
        alone = plugged.alone.answer([("user", text)], args)
        answers.append((text, alone, explain(plugged.guided, text, args)))
        print(f"{text}\n    {count_decisions(answers[-1][-1], plugged.guide)}", flush=True)
    made = page(plugged.guided.name, plugged.guided.tokenizer, answers, plugged.guide)
    write_text(args.page, made)
    print(f"saved {args.page}, {args.page.stat().st_size / 1000:.0f} kB")
    if args.screenshot:
        screenshot(args.page, args.screenshot, args.height)
        print(f"saved {args.screenshot}")
