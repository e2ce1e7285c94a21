"""What a person sees: questions with every system's answer, tables, a chat, and beyond/'s pages."""

import importlib
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

from data.capitals import Capitals
from data.chat import PairDataset, share_preferred, stop_ids
from data.errors import UsageError
from data.questions import QuestionDataset
from data.records import Turn
from data.tiny_world import (
    TEMPLATE,
    Item,
    World,
    evaluate,
    has_value,
    print_by_frequency,
    print_metrics,
    prompt_text,
    value_pairs,
)
from data.tokenizer import StreamDecoder, Tokenizer
from run.bases import load_base
from run.cli import clear_progress, clock, rate, seconds_between, show_progress, watch
from run.plug import Plugged, plug_in
from run.processes import Alone
from sample import Guided, Speaker, generate, score

# --------------------------------------------------------------------------------------------------
# The tiny world


@dataclass
class HeldOutPairs:
    """Some pairs of a data file, to be measured on."""

    dataset: PairDataset
    indices: list[int]


@dataclass
class HeldOutQuestions:
    """Some questions of a data file, to be measured on."""

    dataset: QuestionDataset
    indices: list[int]


def examine(
    guided: Guided,
    exam: World | Capitals | HeldOutPairs | HeldOutQuestions,
    tokenizer: Tokenizer,
    template: str = TEMPLATE,
    split: str = "development",
    system: str = "",
    pairs: bool = False,
) -> dict[str, float | None]:
    """The metrics of a base or a guided base in the tiny world (data/tiny_world.py, evaluate), on capitals, or on held-out pairs or questions."""
    if isinstance(exam, HeldOutPairs):
        rows = [row for index in exam.indices for row in exam.dataset.rows(index)]
        scored = partial(score_aloud, guided, batch_size=2)  # they may be long
        return {"pair": share_preferred(scored, rows) if rows else None}

    def answer(prompts: list[list[int]], longest: int = 48) -> list[list[int]]:
        ends = stop_ids(tokenizer, template, guided.llamas)
        return generate_aloud(guided, prompts, ends, longest)

    if isinstance(exam, HeldOutQuestions):
        asked = [row for index in exam.indices for row in exam.dataset.rows(index)]
        said = answer([prompt for prompt, _ in asked], exam.dataset.room) if asked else []
        rewards = [exam.dataset.reward(index, ids) for (_, index), ids in zip(asked, said)]
        return {"reward": sum(rewards) / len(rewards) if rewards else None}
    if isinstance(exam, Capitals):
        return exam.evaluate(tokenizer, answer, split, template, system)
    return evaluate(
        exam,
        tokenizer,
        answer,
        partial(score_aloud, guided),
        split,
        template,
        system,
        pairs,
    )


def generate_aloud(
    guided: Guided, prompts: list[list[int]], stop_ids: set[int], longest: int
) -> list[list[int]]:
    """Answers of at most `longest` tokens, and now and then a line about how far they are."""
    lengths = [0] * len(prompts)
    started = shown = time.monotonic()

    def on_token(prompt: int, token: int) -> None:
        nonlocal shown
        lengths[prompt] += 1
        if time.monotonic() - shown > seconds_between():
            shown, done = time.monotonic(), max(lengths)
            left = (shown - started) / done * (longest - done)
            show_progress(
                f"examining: token {done} of {len(prompts)} answers, at most {clock(left)} left"
            )

    if sys.stdout.isatty():
        show_progress("examining ...")
    answers = generate(
        guided, prompts, max_new_tokens=longest, stop_ids=stop_ids, on_token=on_token
    )
    clear_progress()
    return answers


def score_aloud(
    guided: Guided, pairs: list[tuple[list[int], list[int]]], batch_size: int = 256
) -> list[tuple[float, bool]]:
    """What score returns, and now and then a line about how far it is."""
    results = []
    for first in watch(range(0, len(pairs), batch_size), "examining: batches of choices"):
        results += score(guided, pairs[first : first + batch_size], batch_size)
    return results


@torch.inference_mode()
def text_cross_entropy(folder: Path, ids: list[int], dtype: str) -> float:
    """Mean, in nats, over a text's tokens, of a checkpoint computing in dtype."""
    base = load_base(folder, dtype, "cpu", Alone())
    logits = base(torch.tensor([ids]))[0].float()  # (T, V)
    return F.cross_entropy(logits[:-1], torch.tensor(ids[1:])).item()


def show_world(plugged: Plugged, count: int = 6) -> None:
    """Questions of the development split with every system's answer, then the metrics of all of them.

    The first questions as they come; of a bigger base, such as only it answers rightly when guided,
    and one that only the smaller base does.
    """
    speakers = plugged.speakers
    if plugged.on_its_own:  # what does the bigger base add?
        speakers.insert(1, plugged.on_its_own())
    items = plugged.world.fact_items("development")
    answers = {
        speaker.name: answer_all(speaker, [prompt_text(item) for item in items])
        for speaker in speakers
    }
    shown = {"": list(range(len(items)))[:count]}
    if len(speakers) > 2:
        shown = {}
        for name, most in ((speakers[2].name, count - 1), (speakers[1].name, 1)):
            only = [
                number
                for number, item in enumerate(items)
                if only_right(answers, number, item) == name
            ]
            title = f"{len(only)} of {len(items)} questions only {name} answers rightly"
            shown[f"{title}; {min(most, len(only))} of them:"] = only[:most]
    width = max(map(len, answers)) + 2
    for title, indices in shown.items():
        print(f"{title}\n")
        for index in indices:
            print(prompt_text(items[index]))
            for name in answers:
                print(f"    {name:{width}}{answers[name][index]}")
            print(f"    {'truth':{width}}{items[index].answer}\n")
    print(
        f"On development people, whom no demonstration mentions ({len(items)} questions: about +-.03):"
    )
    pairs = getattr(plugged.guided.guided.value, "info", {}).get("loss") == "pairwise"
    print_metrics(
        {
            speaker.name: examine(
                speaker.guided,
                plugged.world,
                speaker.tokenizer,
                speaker.template,
                system=speaker.system,
                pairs=pairs,
            )
            for speaker in speakers
        }
    )
    if len(speakers) > 2:
        show_by_frequency(plugged.world, *speakers, answers)


def only_right(answers: dict[str, list[str]], number: int, item: Item) -> str | None:
    """The speaker who alone answers this question rightly, if there is one."""
    right = [name for name in answers if answers[name][number] == item.answer]
    return right[0] if len(right) == 1 else None


def show_by_frequency(
    world: World, alone: Speaker, own: Speaker, guided: Speaker, answers: dict[str, list[str]]
) -> None:
    """What two bases know (fk), and say when guided, by how often pretraining tells of a person.

    alone is the base to guide, own the value network in its own base. answers: a speaker's name ->
    what it said to each development question.
    """
    items = world.fact_items("development")
    small = f"{own.name.partition(' + ')[0]} alone"
    own_base = Guided(own.guided.base, readable=own.guided.readable)
    rows = {}
    for speaker in (replace(own, name=small, guided=own_base), alone):
        rows[f"{speaker.name}, fk"] = known_facts(world, speaker)
    for speaker in (own, guided):
        pairs = list(zip(items, answers[speaker.name]))
        rows[f"{speaker.name}, know"] = [has_value(item, text) for item, text in pairs]
        rows[f"{speaker.name}, exact"] = [text == item.answer for item, text in pairs]
    is_known, exact = rows[f"{small}, fk"], rows[f"{guided.name}, exact"]
    rows[f"  where {small} has no fk"] = [
        None if known else right for known, right in zip(is_known, exact)
    ]
    print("\nBy how often pretraining tells of the person (thirds of all people):")
    print_by_frequency(world, items, rows)


def known_facts(world: World, speaker: Speaker) -> list[bool]:
    """Of each development question, whether fk counts it as known."""
    tokenizer, template, system = speaker.tokenizer, speaker.template, speaker.system
    pairs = []
    for item in world.fact_items("development"):
        pairs += value_pairs(tokenizer, template, item, [item.value], system)
    return [is_greedy for _, is_greedy in score(speaker.guided, pairs)]


def answer_all(speaker: Speaker, questions: list[str]) -> list[str]:
    prompts = [speaker.encode([("user", question)]) for question in questions]
    answers = generate(
        speaker.guided,
        prompts,
        max_new_tokens=48,
        stop_ids=stop_ids(speaker.tokenizer, speaker.template, speaker.guided.llamas),
    )
    return [speaker.tokenizer.decode(ids).strip() for ids in answers]


# --------------------------------------------------------------------------------------------------
# Questions that somebody asks


def show_answers(plugged: Plugged, args) -> None:
    """Each question, answered by the base alone and by the guided one."""
    width = max(len(speaker.name) for speaker in plugged.speakers) + 2
    for text in args.prompt:
        print(f"\n{text}")
        for speaker in plugged.speakers:
            print(f"    {speaker.name:{width}}{speaker.answer([('user', text)], args)}", flush=True)


def show_chat(plugged: Plugged, args) -> None:
    """A conversation in the terminal; what is said is printed as it comes."""
    speaker = plugged.guided
    if args.speculate:
        beyond("speculation", "--speculate")
        from run.speculate import speculating

        speaker = speculating(plugged, args)
    if sys.stdin is None:
        raise UsageError("--chat reads questions from standard input, which is closed")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    print("An empty line begins a new conversation, the end of input (Ctrl-D) leaves.")
    turns: list[Turn] = []
    while True:
        try:
            question = plugged.processes.ask("you> ").strip()
        except EOFError:
            print()
            return
        if not question:
            turns = []
            continue
        try:
            said = answer_aloud(speaker, [*turns, ("user", question)], args)
        except UsageError as error:
            print(f"({error}; an empty line begins a new one)")
            continue
        turns += [("user", question), ("assistant", said)]


def answer_aloud(speaker: Speaker, turns: list[Turn], args) -> str:
    decoder, started, count = StreamDecoder(speaker.tokenizer), time.monotonic(), 0

    def on_token(_, token: int) -> None:
        nonlocal count
        count += 1
        print(decoder.push(token), end="", flush=True)

    said = speaker.answer(turns, args, on_token)
    print(decoder.finish())
    print(
        f"    {count} tokens, {rate(count / (time.monotonic() - started))} tokens/s",
        file=sys.stderr,
    )
    return said


# --------------------------------------------------------------------------------------------------
# What is past the paper


def questions_of(plugged: Plugged, args, count: int) -> list[str]:
    """What was asked with --prompt, or some of the tiny world's questions."""
    return args.prompt or [
        prompt_text(item) for item in plugged.world.fact_items("development")[:count]
    ]


def show_explained(plugged: Plugged, args) -> None:
    """Who decided on each token (beyond/attribution.py)."""
    attribution = beyond("attribution", "--explain")
    if args.page:
        return attribution.save_page(plugged, args)
    speaker = plugged.guided
    for text in questions_of(plugged, args, 3):
        records = attribution.explain(speaker, text, args)
        said = speaker.tokenizer.decode([record.token for record in records]).strip()
        print(f"\n{text}\n{said}")
        attribution.print_attributions(speaker.tokenizer, records, plugged.guide)


def show_playground(plugged: Plugged, args) -> None:
    """A page to ask on, in a browser (beyond/playground.py), or a picture of it."""
    playground = beyond("playground", "--web")
    if args.screenshot:
        beyond("attribution", "--screenshot").find_browser()  # before any work
        return playground.save_picture(plugged, args, plug_in)
    playground.serve(plugged, args, plug_in)


def show_speculation(plugged: Plugged, args) -> None:
    """The same answers by speculation, and whether it paid (beyond/speculation.py)."""
    beyond("speculation", "--speculate")
    from run.speculate import compare_with_plain

    compare_with_plain(plugged, questions_of(plugged, args, 48), args)


def beyond(name: str, flag: str) -> ModuleType:
    """A file of beyond/, which can be deleted; UsageError where it was."""
    if not (Path(__file__).parents[1] / "beyond" / f"{name}.py").is_file():
        raise UsageError(f"{flag} takes beyond/{name}.py, which is not there")
    return importlib.import_module(f"beyond.{name}")
