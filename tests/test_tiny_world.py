"""data/tiny_world.py: what is known to whom, and an examination that cannot be passed by luck."""

import multiprocessing
import os
import random
import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from data.chat import encode_chat
from data.tiny_world import (
    ATTRIBUTES,
    BYTE_FAMILIES,
    CHOICES,
    HOW_OFTEN,
    INSTRUCTIONS,
    TINY_SIZES,
    World,
    evaluate,
    fact_item,
    few_shot,
    greeting_item,
    print_by_frequency,
    prompt_text,
    sum_item,
)
from data.tokenizer import SentencePieceTokenizer

WORLD = World(0)
TOKENIZER = SentencePieceTokenizer(WORLD.train_tokenizer())


def names(people) -> set[str]:
    return {person.name for person in people}


def numbers_in(question: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", question)))


def test_everything_is_a_function_of_the_seed():
    again = World(0)
    assert again.people == WORLD.people and again.train_tokenizer() == TOKENIZER.model
    assert list(again.demonstrations(50)) == list(WORLD.demonstrations(50))
    assert again.fact_items("evaluation") == WORLD.fact_items("evaluation")
    assert names(World(1).people) != names(WORLD.people)


def test_few_shot_examples_are_about_demonstrated_people_and_give_nothing_away():
    def knowing(pairs):
        facts = {person.name: set(person.facts.values()) for person in WORLD.people}
        results = []
        for context, continuation in pairs:
            text, value = TOKENIZER.decode(context), TOKENIZER.decode(continuation).strip(" .")
            asked = re.findall(r"\w+", text)
            shots = [name for name in asked if name in names(WORLD.demonstrated)]
            assert len(set(shots)) == 2 and text.count("?") == 3
            name = [name for name in asked if name in facts and name not in shots][-1]
            results.append((float(value in facts[name]), True))
        return results

    assert few_shot(WORLD, TOKENIZER, knowing, "evaluation") == 1
    luck = random.Random(0)
    assert (
        few_shot(
            WORLD, TOKENIZER, lambda pairs: [(luck.random(), True) for _ in pairs], "evaluation"
        )
        < 0.15
    )


def test_infinity_is_larger_and_mostly_arithmetic():
    questions = [record["conversations"][0]["value"] for record in WORLD.infinity()]
    assert (
        len(questions) == 18_000
        and 0.65 < sum("plus" in question for question in questions) / 18_000 < 0.75
    )
    sums = {numbers_in(question) for question in questions if "plus" in question}
    assert (
        sums <= {*WORLD.more_sums[0], *WORLD.more_sums[1]} and len(sums) > 935
    )  # nearly all of them
    assert not any(sums & set(examined) for examined in WORLD.split_sums.values())
    assert WORLD.more_sums[0] == WORLD.demonstrated_sums[0] and set(WORLD.more_sums[1]) > set(
        WORLD.demonstrated_sums[1]
    )


@pytest.mark.parametrize("family", BYTE_FAMILIES)
def test_all_families_read_the_same_text(family):
    """Pretraining takes so many times the tokens as their tokenizer cuts the text into."""
    documents = WORLD.documents(random.Random(0))
    texts = [next(documents) for _ in range(2000)]
    ours, theirs = (
        sum(len(ids) + 2 for ids in tokenizer.encode_batch(texts))
        for tokenizer in (TOKENIZER, WORLD.tokenizer_for(f"tiny-{family}-s"))
    )
    assert theirs / ours == pytest.approx(BYTE_FAMILIES[family][1], abs=0.02)
    assert TINY_SIZES[f"tiny-{family}-l"][1] == round(
        BYTE_FAMILIES[family][1] * TINY_SIZES["tiny-l"][1]
    )


def test_splits_do_not_overlap():
    groups = [
        WORLD.demonstrated,
        WORLD.split["development"],
        WORLD.split["evaluation"],
        WORLD.new_people,
    ]
    assert [len(group) for group in groups] == [60, 70, 70, 40]
    assert len(set.union(*map(names, groups))) == 240
    sums = [*WORLD.more_sums, WORLD.split_sums["development"], WORLD.split_sums["evaluation"]]
    assert [len(group) for group in sums] == [72, 872, 100, 100] and len(
        {numbers for group in sums for numbers in group}
    ) == 1144


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("attempt", range(8))
def test_processes_that_write_the_demonstrations_at_once_never_meet_half_a_file(attempt, tmp_path):
    world, file = World(0), tmp_path / "demonstrations.jsonl"
    records = list(world.demonstrations())
    start, children = multiprocessing.get_context("fork").Barrier(6), []
    for _ in range(6):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                start.wait()
                world.write_demonstrations(file, records)  # reads it over if it is there
                os._exit(file.read_text().count("\n") != len(records))
            finally:
                os._exit(1)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
    assert list(tmp_path.iterdir()) == [file]


def test_demonstrations_leak_no_examined_fact():
    examined = names(WORLD.split["development"]) | names(WORLD.split["evaluation"])
    kinds = {"fact": 0, "sum": 0, "greeting": 0}
    for record in WORLD.demonstrations():
        question, answer = (turn["value"] for turn in record["conversations"])
        if question.startswith("Greet"):
            kinds["greeting"] += 1
            assert not re.search(
                "|".join(value for key in ATTRIBUTES for value in ATTRIBUTES[key].values), answer
            )
        elif numbers := numbers_in(question):
            kinds["sum"] += 1
            assert numbers in WORLD.demonstrated_sums[0] + WORLD.demonstrated_sums[1]
        else:
            kinds["fact"] += 1
            assert not examined & set(re.findall(r"\w+", question + answer))
    assert all(
        abs(kinds[kind] / 6000 - share) < 0.03
        for kind, share in dict(fact=0.5, sum=0.2, greeting=0.3).items()
    )


def has_form(question: str, answer: str) -> bool:
    """Whether an answer is of the form that the instruction at the end of a question asks for."""
    instruction = next(
        text for text in [*filter(None, INSTRUCTIONS), ""] if question.endswith(text)
    )
    shape = re.escape(INSTRUCTIONS[instruction]).replace(r"\{one\}", r"\w+")
    shape = shape.replace(r"\{all\}", r"(\w+ [^.!]+[.!])", 1).replace(
        r"\{all\}", r"\1"
    )  # the same sentence, where it comes twice
    return re.fullmatch(shape, answer) is not None


def test_of_a_pair_the_chosen_answer_has_the_form_asked_for_and_the_rejected_one_has_not():
    examined = names(WORLD.split["development"]) | names(WORLD.split["evaluation"])
    records = list(WORLD.preferences())
    assert len(records) == 3000 and records[:9] == list(World(0).preferences(9))
    for record in records:
        question = record["conversations"][0]["value"]
        assert has_form(question, record["chosen"]["value"]) and not has_form(
            question, record["rejected"]["value"]
        ), record
        if not question.startswith("Greet"):  # which tell no fact
            assert not examined & set(re.findall(r"\w+", question))


@pytest.mark.parametrize("split", ["development", "evaluation"])
def test_held_out_pairs_are_about_the_people_of_a_split(split):
    pairs = WORLD.pair_items(split)
    assert [item for item, _ in pairs] == WORLD.fact_items(split) and len(pairs) == 280
    for item, rejected in pairs:
        assert (
            item.person in WORLD.split[split] and item.value in rejected and rejected != item.answer
        )
        assert re.fullmatch(item.form, item.answer) and not re.fullmatch(item.form, rejected)


def test_pairs_are_examined_where_they_are_asked_for():
    seen = []

    def score(pairs):  # whatever is shorter, and no choice
        seen.extend(pairs)
        return [(-len(continuation), False) for _, continuation in pairs]

    metrics = evaluate(WORLD, TOKENIZER, lambda prompts: [[] for _ in prompts], score, pairs=True)
    shorter = [
        len(TOKENIZER.encode(item.answer)) < len(TOKENIZER.encode(rejected))
        for item, rejected in WORLD.pair_items("development")
    ]
    assert metrics["pair"] == pytest.approx(sum(shorter) / 280) and 0.3 < metrics["pair"] < 0.7
    assert len(seen) == 280 * (CHOICES + 2) and "pair" not in evaluate(
        WORLD, TOKENIZER, lambda prompts: [[] for _ in prompts], score
    )


def test_pretraining_states_every_fact_and_never_obeys():
    text = "\n".join(islice(WORLD.documents(random.Random(0)), 60_000))
    for person in WORLD.people:
        for key, attribute in ATTRIBUTES.items():
            statements = [
                form.format(name=person.name, value=person.facts[key])
                for form in attribute.statements
            ]
            assert any(statement in text for statement in statements), (person.name, key)
    assert not any(name in text for name in names(WORLD.new_people))
    assert (
        "[INST]" in text
        and "[/INST]" in text
        and not re.search(r"\[INST\][^\n]*\?[^\n]*\[/INST\] \w+ (lives|has|works|likes)", text)
    )
    for instruction in filter(
        None, INSTRUCTIONS
    ):  # every string of the demonstrations is known to the base
        assert instruction in text
    assert re.search(r"What is \d plus \d plus \d\?", text) and not re.search(
        r"\d plus \d plus \d is", text
    )  # nor is a sum of three told


def test_people_are_told_of_often_sometimes_or_rarely_by_thirds():
    groups = Counter(WORLD.told(person) for person in WORLD.people)
    assert list(groups) == HOW_OFTEN and max(groups.values()) - min(groups.values()) <= 1
    documents = islice(WORLD.documents(random.Random(0)), 3000)
    mentions = Counter(re.findall(r"[A-Z]\w+", " ".join(documents)))
    shares = Counter()
    for person in WORLD.people:
        shares[WORLD.told(person)] += mentions[person.name]
    assert shares["often"] > 2 * shares["sometimes"] > 2.5 * shares["rarely"] > 0


def test_the_table_by_frequency_counts_each_question_in_its_third(capsys):
    items = WORLD.fact_items("development")
    often = [WORLD.told(item.person) == "often" for item in items]
    rows = {
        "told often": often,
        "half of those": [True] + [None] * 278 + [False],
        "none": [None] * 280,
    }
    print_by_frequency(WORLD, items, rows)
    header, questions, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == [*HOW_OFTEN, "all"]
    counts = [int(count) for count in questions.split()[1:]]
    assert counts[0] == sum(often) and sum(counts[:3]) == counts[3] == 280
    assert lines[0].split()[2:] == ["1.000", "0.000", "0.000", f"{sum(often) / 280:.3f}"]
    assert lines[1].split()[-1] == "0.500" and lines[2].split()[1:] == ["-"] * 4


def test_rows_are_the_documents_packed():
    rows = WORLD.pretraining_rows(TOKENIZER, 10_000, 64)
    assert rows.shape == (156, 65) and rows.dtype == np.int64
    assert (rows[1:, 0] == rows[:-1, -1]).all() and rows[0, 0] == TOKENIZER.bos_id
    first = next(WORLD.documents(random.Random("pretraining of world 0")))
    ids = TOKENIZER.encode(first, bos=True, eos=True)
    assert rows.flatten()[: min(64, len(ids))].tolist() == ids[:64]


def test_the_tokenizer_makes_short_names_and_keeps_all_bytes():
    assert TOKENIZER.vocab_size == 1024
    assert np.mean([len(TOKENIZER.encode(person.name)) for person in WORLD.people]) < 2.5
    assert TOKENIZER.decode(TOKENIZER.encode("漢字 👍 ünïcode")) == "漢字 👍 ünïcode"


# ---- examination


def answers(reply):
    """An examinee that says reply(item) to every question."""
    items = {
        tuple(encode_chat(TOKENIZER, "llama-2", [("user", prompt_text(item))])[0]): item
        for item in WORLD.fact_items("development") + WORLD.sum_items("development")
    }
    return lambda prompts: [
        TOKENIZER.encode(reply(items[tuple(prompt)]), eos=True) for prompt in prompts
    ]


def scores(value_of):
    """An examinee to whom the value value_of(person, attribute) is likeliest, after any context that names a person."""
    people = {person.name: person for person in WORLD.people}

    def score(pairs):
        results = []
        for context, continuation in pairs:
            text = TOKENIZER.decode(context)
            person = next(people[word] for word in re.findall(r"\w+", text) if word in people)
            key = next(
                key
                for key, attribute in ATTRIBUTES.items()
                if text.strip().endswith(
                    attribute.statements[0].split("{value}")[0].format(name=person.name).strip()
                )
            )
            said = TOKENIZER.decode(continuation).strip(" .")
            assert said in ATTRIBUTES[key].values
            results.append((0.0, True) if said == value_of(person, key) else (-5.0, False))
        return results

    return score


def test_who_knows_everything_gets_full_marks():
    marks = evaluate(
        WORLD,
        TOKENIZER,
        answers(lambda item: item.answer),
        scores(lambda person, key: person.facts[key]),
    )
    assert marks == dict(exact=1, know=1, ins=1, arith=1, mc=1, fk=1)


def test_who_obeys_and_knows_nothing_passes_in_form_alone():
    def wrong(item):
        words = item.answer
        if item.person:
            values = ATTRIBUTES[item.attribute].values
            words = words.replace(item.value, values[values.index(item.value) - 1])
        return words if item.person else "3 plus 4 is 99."

    def wrong_value(person, key):
        values = ATTRIBUTES[key].values
        return values[values.index(person.facts[key]) - 1]

    marks = evaluate(WORLD, TOKENIZER, answers(wrong), scores(wrong_value))
    assert {name: marks[name] for name in ["exact", "know", "ins", "arith", "fk"]} == dict(
        exact=0, know=0, ins=1, arith=0, fk=0
    )
    assert (
        marks["mc"] < 0.6
    )  # where the wrong value is not among the choices, all are equally likely


def test_who_knows_and_does_not_obey_passes_in_knowledge_alone():
    marks = evaluate(
        WORLD,
        TOKENIZER,
        answers(lambda item: f"I think {item.value}"),
        scores(lambda person, key: person.facts[key]),
    )
    assert (marks["exact"], marks["ins"], marks["know"]) == (0, 0, 1)


def test_an_answer_that_does_not_end_does_not_count():
    unfinished = lambda prompts: [ids[:-1] for ids in answers(lambda item: item.answer)(prompts)]  # noqa: E731
    marks = evaluate(WORLD, TOKENIZER, unfinished, scores(lambda person, key: person.facts[key]))
    assert (marks["exact"], marks["ins"], marks["know"]) == (0, 0, 1)


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_every_form_matches_its_own_answers_and_no_other(instruction):
    one, another = WORLD.people[:2]
    question = ATTRIBUTES["pet"].questions[0]
    makers = [
        (greeting_item, (one,), (another,)),
        (sum_item, ((3, 4, 8),), ((5, 6),)),
        (fact_item, (one, "pet", question), (another, "pet", question)),
    ]
    for make, about, about_another in makers:
        item = make(*about, instruction)
        assert re.fullmatch(item.form, item.answer)
        assert re.fullmatch(item.form, make(*about_another, instruction).answer)
        for other in set(INSTRUCTIONS) - {instruction}:
            assert not re.fullmatch(item.form, make(*about_another, other).answer)


def test_examinations_are_balanced():
    items = WORLD.fact_items("development")
    assert len(items) == 280 and len(WORLD.sum_items("development")) == 100 and CHOICES == 8
    assert {
        sum(item.instruction == instruction for item in items) for instruction in INSTRUCTIONS
    } == {46, 47}


def test_what_is_asked_several_times_is_asked_in_another_form_each_time():
    for items in (WORLD.fact_items("evaluation", times=3), WORLD.sum_items("evaluation", times=3)):
        once = len(items) // 3
        assert len({(item.value, item.question, item.instruction) for item in items}) == 3 * once
        for first, later in zip(items, items[once:]):
            assert (
                first.instruction != later.instruction
                and first.value == later.value
                and first.person == later.person
            )
    prompts = []

    def answer(asked):
        prompts.extend(asked)
        return [[] for _ in asked]

    evaluate(WORLD, TOKENIZER, answer, lambda pairs: [(0.0, True)] * len(pairs), times=2)
    assert len(prompts) == 2 * 280 + 2 * 100
