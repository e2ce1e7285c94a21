"""Section 3.1, advantage 1: a page that shows, token by token, where post-training spoke. One HTML file, no network, no script.

    python -m paper.attribution --base tiny-l                                  # out/attribution.html
    python -m paper.attribution --base tiny-l --screenshot paper/attribution.png    # and a picture of it, by headless Chromium
"""

import html
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from data.cli import ArgumentParser, UsageError, positive_int, run_cli
from data.tiny_world import INSTRUCTIONS, prompt_text
from data.tokenizer import Tokenizer
from ivl import Attribution
from sample import Plugged, add_guidance, answer, count_decisions, explained, parse_guidance, plug_in, token_name

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

DECIDED = {"base": "the base alone would have said the same", "value": "the value network overruled the base",
           "chance": "drawn by chance: the first choice of neither"}


def share(p: float) -> str:
    return f"{100 * p:.1f}%" if p >= 0.0005 else "&lt;0.1%"


def moved(head: str, each: list[tuple[int, float, float, float]], name) -> str:
    rows = "".join(f"<tr><td>{name(token)}<td>{share(before)}<td>{share(after)}<td>{z_delta:+.1f}"
                   for token, before, after, z_delta in each)
    return f"<table><tr><th>{head}<th>base<th>both<th>z_delta{rows}</table>" if rows else ""


def detail(each: Attribution, tokenizer: Tokenizer, classes: str = "") -> str:
    """The numbers of one token."""
    def name(token: int) -> str:
        return html.escape(token_name(tokenizer, token))

    first = "" if each.decided == "base" else f"<dt>the base alone would say<dd>{name(each.base_token)}"
    return (f'<span class="detail{classes}"><h3>{name(each.token)}</h3>{DECIDED[each.decided]}<dl>{first}'
            f"<dt>its probability, base alone<dd>{share(each.p_base)}<dt>and with z_delta<dd>{share(each.p_post)}"
            f"<dt>its z_delta<dd>{each.z_delta:+.2f}<dt>largest z_delta, likely or not<dd>{name(each.pushed)}"
            f"<dt>mean |z_delta|<dd>{each.size:.2f}<dt>KL(both, base)<dd>{each.kl:.2f} nats</dl>"
            f"{moved('raised', each.raised, name)}{moved('lowered', each.lowered, name)}</span>")


def shown_text(tokenizer: Tokenizer, each: Attribution) -> str:
    """A token in running text: its own characters, with names for what has none and a mark for line breaks."""
    text = tokenizer.token_bytes(each.token).decode("utf-8", "replace")
    return html.escape(text.replace("\n", "↵\n") if text.strip(" ") else token_name(tokenizer, each.token))


def tokens_html(tokenizer: Tokenizer, records: list[Attribution]) -> str:
    """The answer as one span a token: coloured by who decided, with a bar for how far z_delta moved the base."""
    return "".join(f'<span tabindex="0" class="token {each.decided}" style="--kl:{min(100, 100 * each.kl / FULL_BAR):.0f}%">'
                   f"{shown_text(tokenizer, each)}{detail(each, tokenizer)}</span><wbr>" for each in records)


def page(title: str, tokenizer: Tokenizer, answers: list[tuple[str, str, list[Attribution]]]) -> str:
    """The whole file, from questions, what the base alone answers, and the guided answer token by token.

    Until a token is pointed at, the numbers of the one that z_delta moved most stand at the side.
    """
    sections = "".join(f'<h2>{html.escape(question)}</h2>'
                       f'<p class="alone"><span class="faint">the base alone:</span> {html.escape(alone)}'
                       f'<div class="tokens">{tokens_html(tokenizer, records)}</div><p class="faint">{count_decisions(records)}'
                       for question, alone, records in answers)
    everything = [each for _, _, records in answers for each in records]
    words = [each for each in everything if tokenizer.token_bytes(each.token).strip()] or everything
    most = max(words, key=lambda each: each.kl)
    return f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width={WIDTH}">
<title>{html.escape(title)}</title><style>{STYLE}</style>
<main><h1>Where did post-training speak?</h1>
<p>{html.escape(title)}: {count_decisions(everything)}.
<p class="faint"><span class="key">the base agreed</span> <span class="key value">the value network overruled it</span>
<span class="key chance">chance</span> &nbsp; The bar below a token: how far z_delta moved the base there
({FULL_BAR} nats fill it). Point at a token for its numbers.
{sections}</main>{detail(most, tokenizer, " shown")}
</html>
"""


def find_browser() -> str:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UsageError(f"--screenshot needs Chromium, and none of {', '.join(BROWSERS)} is installed")
    return browser


def screenshot(file: Path, picture: Path, height: int) -> None:
    """A picture of a page, by headless Chromium. UsageError where there is none or it fails."""
    browser = find_browser()
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}",
                   f"--window-size={WIDTH},{height}", f"--screenshot={picture.resolve()}", file.resolve().as_uri()]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.insert(1, "--no-sandbox")  # Chromium refuses to sandbox itself as root
        picture.unlink(missing_ok=True)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            raise UsageError(f"--screenshot: {Path(browser).name} took longer than two minutes") from None
    if done.returncode or not picture.is_file():
        said = done.stderr.strip().splitlines() or ["without a word"]
        raise UsageError(f"--screenshot: {Path(browser).name} failed: {said[-1]}")


def questions_of(plugged: Plugged) -> list[str]:
    """A question of the tiny world for each of its instructions."""
    items = plugged.world.fact_items("development")
    return [prompt_text(next(item for item in items if item.instruction == instruction)) for instruction in INSTRUCTIONS]


def main():
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    add_guidance(parser)
    parser.add_argument("--out", type=Path, default=Path("out/attribution.html"), metavar="FILE", help="(default %(default)s)")
    parser.add_argument("--screenshot", type=Path, metavar="PNG", help="a picture of the page, too; needs Chromium")
    parser.add_argument("--height", type=positive_int, default=900, metavar="PIXELS", help="of the picture (default 900)")
    args = parse_guidance(parser)
    for path in filter(None, (args.out, args.screenshot)):
        if not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    if args.screenshot:
        find_browser()  # before any work
    plugged = plug_in(args)
    answers = []
    for text in args.prompt or questions_of(plugged):
        alone = answer(plugged.alone, plugged.base_tokenizer, plugged.alone_template, [("user", text)], args)
        answers.append((text, alone, explained(plugged.guided, plugged.tokenizer, plugged.template, text, args)))
        print(f"{text}\n    {count_decisions(answers[-1][-1])}", flush=True)
    args.out.write_text(page(plugged.name, plugged.tokenizer, answers), encoding="utf-8")
    print(f"saved {args.out}, {args.out.stat().st_size / 1000:.0f} kB")
    if args.screenshot:
        screenshot(args.out, args.screenshot, args.height)
        print(f"saved {args.screenshot}")


if __name__ == "__main__":
    run_cli(main)
