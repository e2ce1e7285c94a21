"""sample.py --speculate: who drafts, and how it went beside plain decoding (beyond/speculation.py).

python sample.py --base tiny-l --speculate 4 --prompt "Greet Ruja."
"""

import time
from dataclasses import replace
from pathlib import Path

from beyond.speculation import Speculative, gap_at_difference, speculate
from data.checkpoint import name_of
from data.errors import UsageError
from data.tokenizer import is_same_family, load_tokenizer
from model import Llama
from run.plug import Plugged, find_base, refuse_value_network
from sample import MappedGuided, Speaker


def speculating(plugged: Plugged, args) -> Speaker:
    """The guided speaker, whose value network drafts, with the base of --draft if there is one."""
    guided, draft = plugged.guided.guided, None
    if args.draft is not None:
        path = find_base(args.draft, plugged.own_path, {"bases": [str(plugged.own_path)]})
        refuse_value_network("--draft", path)
        is_mapped = isinstance(guided, MappedGuided)
        if not is_mapped and not is_same_family(plugged.guided.tokenizer, load_tokenizer(path)):
            raise UsageError(
                f"--draft {path}: it has another tokenizer than {plugged.base_path}, for which it "
                "would have to draft"
            )
        draft = Llama.from_pretrained(path, guided.base.dtype, guided.base.device)
    try:
        system = Speculative(guided, args.speculate, draft)
    except ValueError as error:
        raise UsageError(f"--speculate: {error}") from None
    return replace(plugged.guided, guided=system, generate=speculate)


def compare_with_plain(plugged: Plugged, texts: list[str], args) -> None:
    """Answer each text plainly and by speculation, and say how both went and whether it paid."""
    plain, speaker = plugged.guided, speculating(plugged, args)
    asked = [speaker.prepare([("user", text)], args) for text in texts]
    ways = {"plain": plain, "speculating": speaker}
    seconds = dict.fromkeys(ways, 0.0)
    answers: dict[str, list[list[int]]] = {way: [] for way in ways}
    for each in ways.values():  # a warm-up
        prompt, options = asked[0]
        each.generate(each.guided, [prompt], **options)
    system = speaker.guided
    system.rounds = system.tried = system.accepted = 0
    for text, (prompt, options) in zip(texts, asked):
        for way, each in ways.items():
            started = time.perf_counter()
            answers[way].append(each.generate(each.guided, [prompt], **options)[0])
            seconds[way] += time.perf_counter() - started
        if args.prompt:
            print(f"\n{text}\n    {plain.tokenizer.decode(answers['speculating'][-1]).strip()}")
    # how it went
    who = f"{name_of(Path(args.draft))} with z_delta" if args.draft else "z_delta alone"
    plain_tokens, tokens = [sum(map(len, answers[way])) for way in ways]
    print(
        f"\n{plain.name}, {system.ahead} tokens at a time drafted by {who}: {len(texts)} answers, "
        f"{tokens} tokens"
    )
    if args.temperature == 0:
        print_difference(plain.guided, [prompt for prompt, _ in asked], answers)
    print(
        f"    {system.accepted} of {system.tried} drafted tokens stood, {system.accepted / system.tried:.2f}; "
        f"{tokens / system.rounds:.2f} tokens a round"
    )
    speed_up = seconds["plain"] / plain_tokens / (seconds["speculating"] / tokens)
    verdict = "" if speed_up > 1 else ": it does not pay here"
    print(f"    speed-up, measured: {speed_up:.2f}{verdict}")


def print_difference(guided, prompts: list[list[int]], answers: dict[str, list[list[int]]]) -> None:
    gaps = [
        gap_at_difference(guided, prompt, one, other)
        for prompt, one, other in zip(prompts, answers["plain"], answers["speculating"])
        if one != other
    ]
    if gaps:
        print(
            f"    {len(gaps)} answers differ from those without, first where the two best logits are "
            f"at most {max(gaps):.1e} apart"
        )
    else:
        print("    the same tokens as without")
