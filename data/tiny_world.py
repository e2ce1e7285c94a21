"""The embedded default: a small invented world to pretrain on, to be taught about, and to be
examined on.

    python -m data.tiny_world --seed 0                             # a few lines of everything
    python -m data.tiny_world --seed 0 --infinity infinity.jsonl   # demonstrations, mostly sums
    python -m data.tiny_world --seed 0 --preferences pairs.jsonl   # two answers to each question

People live in cities, have jobs, pets and favourite colours. Pretraining text states these facts,
and never shows a chat. Demonstrations show how to answer in a chat, about 60 of the 400 people. The
examination asks about others: their facts stand only in pretraining text, the manner of answering
only in demonstrations, so a right answer takes both. Development people are for every choice we
make, evaluation people for paper/ alone.

Everything is a function of the seed: names, facts, splits, text and tokenizer.
"""

import base64
import io
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece

from data.chat import Sample, Score, encode_chat, end_token, share_preferred, with_system
from data.errors import UsageError
from data.files import write_lines
from data.tokenizer import SentencePieceTokenizer, TiktokenTokenizer, Tokenizer

# --------------------------------------------------------------------------------------------------
# What the world is made of


@dataclass(frozen=True)
class Attribute:
    values: list[str]
    statements: list[str]  # the first is canonical, the last names the value before the person
    questions: list[str]


# Of each attribute the values, then the statements, then the questions.
ATTRIBUTES_TEXT = """
city: Oslo Lima Cairo Delhi Paris Quito Tokyo Vienna Boston Dublin Havana Kyoto Madrid Nairobi Prague Warsaw
{name} lives in {value}.
{name} has a home in {value}.
{name} moved to {value}.
{name} can be found in {value}.
{name} settled in {value}.
{value} is where {name} lives.
Where does {name} live?
In which city does {name} live?
What is the home of {name}?

job: baker nurse pilot farmer lawyer painter plumber singer tailor teacher writer dentist doctor fisher guard judge
{name} works as a {value}.
{name} earns a living as a {value}.
{name} is a {value}.
{name} trained as a {value}.
{name} became a {value}.
The {value} is called {name}.
What does {name} work as?
What is the job of {name}?
Which job does {name} have?

pet: cat dog fish frog goat hen horse mouse parrot rabbit snake turtle
{name} has a {value}.
{name} keeps a {value}.
{name} owns a {value}.
{name} feeds a {value}.
{name} walks with a {value}.
A {value} belongs to {name}.
Which pet does {name} have?
What animal does {name} have?
What is the pet of {name}?

colour: red blue green black white brown grey pink purple yellow orange silver
{name} likes the colour {value}.
{name} loves {value}.
{name} paints in {value}.
{name} often wears {value}.
{name} prefers {value}.
The colour {value} pleases {name}.
Which colour does {name} like?
What is the favourite colour of {name}?
What colour does {name} choose?
"""


def read_attributes(text: str) -> dict[str, Attribute]:
    attributes = {}
    for block in text.strip().split("\n\n"):
        first, *lines = block.splitlines()
        key, values = first.split(": ")
        attributes[key] = Attribute(values.split(), lines[:6], lines[6:])
    return attributes


ATTRIBUTES = read_attributes(ATTRIBUTES_TEXT)

# What an instruction asks for, and the form it gives the answer. "{one}" is the value alone.
INSTRUCTIONS = {
    "": "{all}",
    "Answer in one word.": "{one}.",
    "Put a star on both sides.": "* {all} *",
    "Say it twice.": "{all} {all}",
    "Be polite.": "{all} Have a nice day.",
    "Begin with a dash.": "- {all}",
}

FORMS = list(INSTRUCTIONS)
FILLERS = [
    "Have a nice day.",
    "Greet {name}.",
    "Hello {name}!",
    "What is {sum}?",
    *FORMS[1:],
]
TAGS = ["[INST]", "[/INST]", "[NOTE]", "[/NOTE]", "[PAGE]", "[/PAGE]"]
UNRELATED = {
    "adjective": "old quiet bright cold narrow warm heavy little broken gentle".split(),
    "noun": "river hill bridge garden window market road tower forest harbour lamp stone".split(),
    "verb": "faces follows crosses hides touches guards joins leaves meets shadows".split(),
    "place": "in the morning,at night,after the rain,near the sea,in winter,before noon".split(","),
}

# Width, layers, heads, key-value heads, hidden; pretraining tokens and learning rate. As in real
# families, bigger bases have read more, so size alone is not what makes them know more.
TINY_SIZES = {
    "tiny-s": ((64, 3, 4, 2, 176), 2_000_000, 4e-3),
    "tiny-m": ((96, 3, 4, 2, 256), 2_500_000, 4e-3),
    "tiny-l": ((128, 4, 4, 2, 352), 3_000_000, 3e-3),
}
# Two more families of bases on the same text, whose tokenizers are byte-level BPEs in Llama-3's
# file format with this many merges. They cut it into this many times the SentencePiece family's
# tokens. (With 2000 merges every name is a token of its own, rarely seen and badly learnt.)
BYTE_FAMILIES = {"b": (600, 1.05), "c": (300, 1.34)}
TINY_SIZES |= {
    f"tiny-{family}-{size[5:]}": (shape, round(tokens * cut), lr)
    for family, (_, cut) in BYTE_FAMILIES.items()
    for size, (shape, tokens, lr) in list(TINY_SIZES.items())
}

TEMPLATE = "llama-2"
KNOWN_PEOPLE, NEW_PEOPLE = (
    400,
    40,
)  # the new ones are for continual pretraining; only greetings name them before
DEMONSTRATED, WELL_KNOWN = (
    60,
    150,
)  # people in demonstrations, out of so many whom pretraining text tells of most often
EXAMINED = 70  # development people, and as many evaluation people
HOW_OFTEN = ["often", "sometimes", "rarely"]  # how often pretraining text tells of a person: thirds
SUMS_OF_TWO = list(itertools.product(range(12), repeat=2))  # whose answers are in pretraining text
SUMS_OF_THREE = list(
    itertools.product(range(10), repeat=3)
)  # whose answers are not; they take two steps
# With 768, most values and many names fall into several pieces, which a tiny-s is slow to spell.
PIECES = 1024


@dataclass(frozen=True)
class Person:
    name: str
    facts: dict[str, str]  # attribute -> value


@dataclass(frozen=True)
class Item:
    """One question of the examination."""

    question: str
    instruction: str
    answer: str
    form: (
        str  # a regular expression for any answer of the right form, whoever and whatever it names
    )
    value: str  # what the answer tells: the fact, the sum, or who is greeted
    person: Person | None = None  # None for arithmetic and greetings
    attribute: str = ""


class World:
    """People, facts and splits of one seed; text and examinations are made on demand."""

    def __init__(self, seed: int):
        self.seed = seed
        rng = random.Random(
            f"people of world {seed}"
        )  # seeded by text, so the parts do not share a stream
        syllables = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]
        words = [first + second for first in syllables for second in syllables]
        names = [word.capitalize() for word in rng.sample(words, KNOWN_PEOPLE + NEW_PEOPLE)]
        people = [
            Person(
                name, {key: rng.choice(attribute.values) for key, attribute in ATTRIBUTES.items()}
            )
            for name in names
        ]
        self.people, self.new_people = people[:KNOWN_PEOPLE], people[KNOWN_PEOPLE:]
        # Some people are told of more than others, roughly as in Zipf's law. The rarest facts are
        # told often enough for a big base and not for a small one, so bases of different sizes know
        # different shares of them.
        self.popularity = [(rank + 8) ** -0.8 for rank in range(KNOWN_PEOPLE)]
        # Demonstrations are about people told of often: a network that is shown facts its base does
        # not know learns to invent.
        well_known = rng.sample(self.people[:WELL_KNOWN], WELL_KNOWN)
        self.demonstrated = well_known[:DEMONSTRATED]
        others = rng.sample(
            well_known[DEMONSTRATED:] + self.people[WELL_KNOWN:], KNOWN_PEOPLE - DEMONSTRATED
        )
        self.split = {
            "development": others[:EXAMINED],
            "evaluation": others[EXAMINED : 2 * EXAMINED],
            "new development": self.new_people[: NEW_PEOPLE // 2],
            "new evaluation": self.new_people[NEW_PEOPLE // 2 :],
        }
        twos, threes = (rng.sample(sums, len(sums)) for sums in (SUMS_OF_TWO, SUMS_OF_THREE))
        self.demonstrated_sums = [
            twos[:72],
            threes[:200],
        ]  # as many questions about the ones as about the others
        self.more_sums = [
            twos[:72],
            threes[:872],
        ]  # what the larger set of demonstrations draws from
        self.split_sums = {
            "development": twos[72:108] + threes[872:936],
            "evaluation": twos[108:] + threes[936:],
        }

    def told(self, person: Person) -> str:
        """One of HOW_OFTEN: the third of the known people that a person is in, by popularity."""
        return HOW_OFTEN[len(HOW_OFTEN) * self.people.index(person) // KNOWN_PEOPLE]

    # -- pretraining text --------------------------------------------------------------------------

    def documents(self, rng: random.Random) -> Iterator[str]:
        """Endless pretraining documents."""
        while True:
            person = rng.choices(self.people, self.popularity)[0]
            yield self.add_noise(self.sentences(rng, person), rng)

    def sentences(self, rng: random.Random, person: Person) -> list[str]:
        kind = rng.random()
        if kind < 0.15:
            return [
                sentence for _ in range(rng.randint(2, 4)) for sentence in arithmetic_sentences(rng)
            ]
        if kind < 0.57:  # an interview
            keys = rng.sample(list(ATTRIBUTES), rng.randint(2, 4))
            return [sentence for key in keys for sentence in interview_sentences(rng, person, key)]
        if kind < 0.80:  # a biography
            keys = rng.sample(list(ATTRIBUTES), rng.randint(2, 4))
            return [tell(person, key, rng.choice(ATTRIBUTES[key].statements)) for key in keys]
        return [unrelated_sentence(rng) for _ in range(rng.randint(2, 4))]

    def add_noise(self, sentences: list[str], rng: random.Random) -> str:
        """Show the base every string of the chat format, and nothing of what it is for: noise is
        independent of its sentence.

        A base that never saw "[INST]" or a leading dash would push them down, the bigger base the
        harder, and a value network trained on the small one could not lift them again. In a chat,
        an instruction and [/INST] stand between question and answer; noise there teaches to answer
        across them. A document has one tag at most, so none is a chat, and an instruction is obeyed
        by accident alone.
        """
        tagged = rng.randrange(len(sentences)) if rng.random() < 0.4 else None
        noisy = []
        for index, sentence in enumerate(sentences):
            if rng.random() < 0.1:
                noisy.append(
                    rng.choice(FILLERS).format(
                        name=rng.choice(self.people).name, sum=in_words(rng.choice(SUMS_OF_THREE))
                    )
                )
            if index == tagged:
                noisy.append(rng.choice(TAGS))
            kind = rng.random()
            if kind < 0.03:
                sentence = f"- {sentence}"
            elif kind < 0.05:
                sentence = f"* {sentence} *"
            noisy.append(sentence)
        return " ".join(noisy)

    def tokenizer_for(self, name: str) -> Tokenizer:
        """The tokenizer of a name of TINY_SIZES, trained on this world's text."""
        *_, family, _ = name.split("-")
        if family in BYTE_FAMILIES:
            return TiktokenTokenizer(self.train_byte_pairs(BYTE_FAMILIES[family][0]))
        return SentencePieceTokenizer(self.train_tokenizer())

    def tokenizer_text(self) -> list[str]:
        """What tokenizers are trained on: documents and, since small models copy names best in one
        or two pieces, every name often.
        """
        documents = self.documents(random.Random(f"tokenizer of world {self.seed}"))
        names = [person.name for person in self.people + self.new_people]
        return [next(documents) for _ in range(6000)] + names * 20

    def train_tokenizer(self) -> bytes:
        """A SentencePiece BPE in Llama-2's manner, as the bytes of its tokenizer.model."""
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(self.tokenizer_text()),
            model_writer=written,
            model_type="bpe",
            vocab_size=PIECES,
            split_digits=True,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
        return written.getvalue()

    def train_byte_pairs(self, merges: int) -> bytes:
        """A byte-level BPE trained on the same text, as the bytes of a tokenizer.model in Llama-3's
        format.
        """
        # Words as Llama-3's pattern cuts them, where letters are ASCII.
        words = Counter(
            word
            for text in self.tokenizer_text()
            for word in re.findall(r" ?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+|\s+", text)
        )
        return byte_pairs(
            {
                tuple(bytes([byte]) for byte in word.encode()): count
                for word, count in words.items()
            },
            merges,
        )

    def pretraining_rows(
        self, tokenizer: Tokenizer, tokens: int, length: int, documents: Iterator[str] | None = None
    ) -> np.ndarray:
        """BOS document EOS, BOS document EOS, ..., cut into rows: (tokens // length, length + 1) of
        int64.

        Consecutive rows share one token, so that row[:-1] predicts row[1:].
        """
        documents = documents or self.documents(random.Random(f"pretraining of world {self.seed}"))
        stream: list[int] = []
        while len(stream) <= tokens:
            batch = tokenizer.encode_batch([next(documents) for _ in range(2000)])
            stream += [
                token for ids in batch for token in (tokenizer.bos_id, *ids, tokenizer.eos_id)
            ]
        rows = tokens // length
        flat = np.array(stream[: rows * length + 1], dtype=np.int64)
        return np.lib.stride_tricks.sliding_window_view(flat, length + 1)[::length]

    def batches(
        self,
        tokenizer: Tokenizer,
        steps: int,
        batch_size: int,
        length: int,
        position: list[int] | None,
        documents: Iterator[str] | None = None,
    ) -> Iterator[tuple[list[int], list[Sample]]]:
        """One pass over pretraining rows in a shuffled order: the position behind each step, and
        rows of tokens that are all supervised.
        """
        rows = self.pretraining_rows(tokenizer, steps * batch_size * length, length, documents)
        order = random.Random(f"rows of world {self.seed}").sample(range(len(rows)), len(rows))
        for step in range(position[0] if position else 0, steps):
            batch = rows[order[step * batch_size : (step + 1) * batch_size]]
            yield [step + 1], [(row, [True] * len(row)) for row in batch.tolist()]

    # -- demonstrations ----------------------------------------------------------------------------

    def demonstrations(self, count: int = 6000) -> Iterator[dict]:
        """Chats in ShareGPT's form: half facts, a fifth arithmetic, 30% greetings.

        Greetings name everybody and leak no fact: they teach to copy a name, which small models
        find hard.
        """
        rng = random.Random(f"demonstrations of world {self.seed}")
        return self.chats(rng, count, 0.5, 0.7, self.demonstrated_sums)

    def infinity(self) -> Iterator[dict]:
        """As InfinityInstruct is to ShareGPT (Section 5.1): more demonstrations, most of them
        arithmetic, with more sums of three.
        """
        rng = random.Random(f"infinity of world {self.seed}")
        return self.chats(rng, 18_000, 0.2, 0.9, self.more_sums)

    def chats(self, rng: random.Random, count: int, *shares_and_sums) -> Iterator[dict]:
        for number in range(count):
            item = self.demonstrated_item(rng, *shares_and_sums)(rng.choice(FORMS))
            question = {"from": "human", "value": prompt_text(item)}
            answer = {"from": "gpt", "value": item.answer}
            yield {"id": f"tiny-{number}", "conversations": [question, answer]}

    def demonstrated_item(
        self, rng: random.Random, facts: float, facts_or_sums: float, sums: list[list]
    ) -> Callable[[str], Item]:
        """A question that demonstrations may ask, still without its instruction; with the shares of
        facts, and of facts or sums.
        """
        kind = rng.random()
        if kind < facts:
            key = rng.choice(list(ATTRIBUTES))
            person, question = rng.choice(self.demonstrated), rng.choice(ATTRIBUTES[key].questions)
            return partial(fact_item, person, key, question)
        if kind < facts_or_sums:
            return partial(sum_item, rng.choice(rng.choice(sums)))
        return partial(greeting_item, rng.choice(self.people + self.new_people))

    def preferences(self, count: int = 3000) -> Iterator[dict]:
        """Pairs in ShareGPT's form: a question as in demonstrations, answered in the form asked
        for, and in another form.
        """
        rng = random.Random(f"preferences of world {self.seed}")
        for number in range(count):
            ask = self.demonstrated_item(rng, 0.5, 0.7, self.demonstrated_sums)
            wanted, other = rng.sample(FORMS, 2)
            yield {
                "id": f"tiny-pair-{number}",
                "conversations": [{"from": "human", "value": prompt_text(ask(wanted))}],
                "chosen": {"from": "gpt", "value": ask(wanted).answer},
                "rejected": {"from": "gpt", "value": ask(other).answer},
            }

    def questions(self) -> Iterator[dict]:
        """The questions of demonstrations, with the answers that earn a reward."""
        for record in self.demonstrations():
            question, answer = record["conversations"]
            yield {"prompt": question["value"], "answer": answer["value"]}

    @property
    def name(self) -> str:
        """How train.json names it as data."""
        return f"tiny-world {self.seed}"

    def write_demonstrations(self, path: Path, records: Iterator[dict] | None = None) -> Path:
        """The demonstrations, or other records, as a ShareGPT file, which is then read like
        anybody's; UsageError if another is there.
        """
        records = list(records or self.demonstrations())
        if not path.exists():
            return write_lines(path, records)
        if path.read_text(encoding="utf-8") != "".join(
            json.dumps(record) + "\n" for record in records
        ):
            raise UsageError(
                f"{path}: not what world {self.seed} makes; to train on it give its copy with --data, "
                "else delete it"
            )
        return path

    # -- examination -------------------------------------------------------------------------------

    def fact_items(self, split: str, count: int | None = None, times: int = 1) -> list[Item]:
        """Questions about the facts of a split's people, or the first `count`: each so many
        `times`, in another form each time.
        """
        rng = random.Random(f"{split} facts of world {self.seed}")
        asked = [(person, key) for person in self.split[split] for key in ATTRIBUTES]
        rng.shuffle(asked)
        items = []
        for turn in range(times):
            for number, (person, key) in enumerate(asked[:count], turn):
                question = rng.choice(ATTRIBUTES[key].questions)
                items.append(fact_item(person, key, question, FORMS[number % len(FORMS)]))
        return items

    def pair_items(self, split: str) -> list[tuple[Item, str]]:
        """fact_items' questions, and the right answer of each in another form than is asked for."""
        rng = random.Random(f"{split} pairs of world {self.seed}")
        pairs = []
        for item in self.fact_items(split):
            other = rng.choice([form for form in FORMS if form != item.instruction])
            answer = fact_item(item.person, item.attribute, item.question, other).answer
            pairs.append((item, answer))
        return pairs

    def sum_items(self, split: str, times: int = 1) -> list[Item]:
        items = []
        for turn in range(times):
            for number, numbers in enumerate(self.split_sums.get(split, []), turn):
                items.append(sum_item(numbers, FORMS[number % len(FORMS)]))
        return items


def tell(person: Person, key: str, statement: str) -> str:
    return statement.format(name=person.name, value=person.facts[key])


def interview_sentences(rng: random.Random, person: Person, key: str) -> list[str]:
    attribute, kind = ATTRIBUTES[key], rng.random()
    if kind < 0.4:
        answer = tell(person, key, attribute.statements[0])
    elif kind < 0.7:
        answer = tell(person, key, rng.choice(attribute.statements))
    else:
        answer = f"{person.facts[key]}."
    return [rng.choice(attribute.questions).format(name=person.name), answer]


def arithmetic_sentences(rng: random.Random) -> list[str]:
    item = sum_item(rng.choice(SUMS_OF_TWO), "")
    return rng.choice(
        [[item.answer], [item.question, item.answer], [item.question, f"{item.value}."]]
    )


def in_words(numbers: Sequence[int]) -> str:
    return " plus ".join(map(str, numbers))


def unrelated_sentence(rng: random.Random) -> str:
    pick = {kind: rng.choice(words) for kind, words in UNRELATED.items()}
    return f"The {pick['adjective']} {pick['noun']} {pick['verb']} the {rng.choice(UNRELATED['noun'])} {pick['place']}."


def prompt_text(item: Item) -> str:
    return f"{item.question} {item.instruction}".strip()


def make_item(
    question: str, instruction: str, sentence: str, word: str, pattern: str, **about
) -> Item:
    """`pattern` is the sentence as a regular expression, for any name and value."""
    shape = INSTRUCTIONS[instruction]
    form = re.escape(shape).replace(r"\{all\}", pattern).replace(r"\{one\}", r"\w+")
    return Item(question, instruction, shape.format(all=sentence, one=word), form, word, **about)


def fact_item(person: Person, key: str, question: str, instruction: str) -> Item:
    canonical = ATTRIBUTES[key].statements[0]
    pattern = re.escape(canonical).replace(r"\{name\}", r"\w+").replace(r"\{value\}", r"\w+")
    return make_item(
        question.format(name=person.name),
        instruction,
        tell(person, key, canonical),
        person.facts[key],
        pattern,
        person=person,
        attribute=key,
    )


def sum_item(numbers: Sequence[int], instruction: str) -> Item:
    words, total = in_words(numbers), sum(numbers)
    pattern = r"\d+( plus \d+)+ is \d+\."
    return make_item(f"What is {words}?", instruction, f"{words} is {total}.", str(total), pattern)


def greeting_item(person: Person, instruction: str) -> Item:
    return make_item(
        f"Greet {person.name}.", instruction, f"Hello {person.name}!", person.name, r"Hello \w+!"
    )


# --------------------------------------------------------------------------------------------------
# Examination

Answer = Callable[
    [list[list[int]]], list[list[int]]
]  # prompts -> generated tokens, the end token included

CHOICES = 8


def world_of(path: str | Path) -> World | None:
    """The tiny world that a finished folder of train.py comes from; None for anything else."""
    try:
        record = json.loads((Path(path) / "train.json").read_text(encoding="utf-8"))
        # The world's own seed, which is not the run's when --seed differs from that of the base.
        return World(int(re.fullmatch(r"tiny-world (\d{1,10})", record["data"])[1]))
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None


def evaluate(
    world: World,
    tokenizer: Tokenizer,
    answer: Answer,
    score: Score,
    split: str = "development",
    template: str = TEMPLATE,
    system: str = "",
    pairs: bool = False,
    times: int = 1,
    by_form: bool = False,
) -> dict[str, float]:
    """Examine a system; every metric is a share between 0 and 1. The first four ask each question
    so many `times`, in other forms.

    exact  the whole answer and its end, on facts
    know   the right value is in the answer, on facts
    ins    the form the instruction asks for, and the end
    arith  exact, on sums that no demonstration shows
    mc     the right one of 8 values is the likeliest, after the question and the canonical sentence
    fk     there, without choices: every token of the value is the likeliest one
    pair   pair_accuracy, where `pairs` are asked for
    ins F  ins of the questions that ask for form F, where that is asked for
    """
    facts, sums = world.fact_items(split, times=times), world.sum_items(split, times)
    prompts = [
        encode_chat(tokenizer, template, with_system(system, [("user", prompt_text(item))]))[0]
        for item in facts + sums
    ]
    end = end_token(tokenizer, template)
    exact, forms, known = [], [], []
    for item, ids in zip(facts + sums, answer(prompts), strict=True):
        ended = bool(ids) and ids[-1] == end
        text = tokenizer.decode(ids).strip()
        exact.append(ended and text == item.answer)
        forms.append(ended and re.fullmatch(item.form, text) is not None)
        known.append(has_value(item, text))
    rng = random.Random(f"{split} choices of world {world.seed}")
    choices = []
    for item in world.fact_items(split):
        others = [value for value in ATTRIBUTES[item.attribute].values if value != item.value]
        choices += value_pairs(
            tokenizer, template, item, [item.value, *rng.sample(others, CHOICES - 1)], system
        )
    scores = score(choices)
    rows = [scores[start : start + CHOICES] for start in range(0, len(scores), CHOICES)]
    metrics = {
        "exact": mean(exact[: len(facts)]),
        "know": mean(known[: len(facts)]),
        "ins": mean(forms[: len(facts)]),
        "arith": mean(exact[len(facts) :]) if sums else None,  # of the new people's splits
        "mc": mean(row[0][0] == max(row)[0] for row in rows),
        "fk": mean(row[0][1] for row in rows),
    }
    if by_form:
        for form in FORMS:
            metrics[f"ins {form}"] = mean(
                has for has, item in zip(forms, facts) if item.instruction == form
            )
    if pairs:
        metrics["pair"] = pair_accuracy(world, tokenizer, score, split, template, system)
    return metrics


def has_value(item: Item, text: str) -> bool:
    return item.value in re.findall(r"\w+", text)


def print_by_frequency(world: World, items: list[Item], rows: dict[str, list[bool | None]]) -> None:
    """Shares by how often pretraining tells of an item's person.

    rows: a name -> a mark for each item, None where the item does not count.
    """
    groups = {name: [world.told(item.person) == name for item in items] for name in HOW_OFTEN}
    groups["all"] = [True] * len(items)
    width = max(map(len, rows)) + 2
    print(" " * width + "".join(f"{name:>11}" for name in groups))
    print(f"{'questions':{width}}" + "".join(f"{sum(group):>11}" for group in groups.values()))
    for name, marks in rows.items():
        shares = []
        for group in groups.values():
            counted = [mark for mark, belongs in zip(marks, group) if belongs and mark is not None]
            shares.append(f"{mean(counted):.3f}" if counted else "-")
        print(f"{name:{width}}" + "".join(f"{share:>11}" for share in shares))


def pair_accuracy(
    world: World,
    tokenizer: Tokenizer,
    score: Score,
    split: str,
    template: str = TEMPLATE,
    system: str = "",
) -> float:
    """The share of a split's pairs of which the answer in the form asked for is likelier than the
    same in another form.
    """
    rows = []
    for item, rejected in world.pair_items(split):
        for answer in (item.answer, rejected):
            turns = with_system(system, [("user", prompt_text(item)), ("assistant", answer)])
            rows.append(encode_chat(tokenizer, template, turns))
    return share_preferred(score, rows)


def print_metrics(systems: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(systems.values())))
    width = max(map(len, systems)) + 2
    print(" " * width + "".join(f"{name:>8}" for name in names))
    for system, metrics in systems.items():
        shown = ["-" if metrics[name] is None else f"{metrics[name]:.3f}" for name in names]
        print(f"{system:{width}}" + "".join(f"{text:>8}" for text in shown))


def few_shot(world: World, tokenizer: Tokenizer, score: Score, split: str, shots: int = 2) -> float:
    """Multiple choice by log-likelihood among all values of the attribute, after answered
    questions, without a chat.

    The examples are about demonstrated people, so that nothing in them answers the question.
    """
    rng = random.Random(f"{split} shots of world {world.seed}")
    pairs, sizes = [], []
    for item in world.fact_items(split):
        attribute = ATTRIBUTES[item.attribute]
        statement, question = attribute.statements[0], rng.choice(attribute.questions)
        before, after = statement.split("{value}")
        lines = [
            f"{question.format(name=person.name)} {tell(person, item.attribute, statement)}"
            for person in rng.sample(world.demonstrated, shots)
        ]
        opening = " ".join(
            [
                *lines,
                question.format(name=item.person.name),
                before.format(name=item.person.name).strip(),
            ]
        )
        context = [tokenizer.bos_id, *tokenizer.encode(opening)]
        choices = [item.value, *(value for value in attribute.values if value != item.value)]
        for value in choices:
            ids = [tokenizer.bos_id, *tokenizer.encode(f"{opening} {value}{after}")]
            pairs.append((ids[: len(context)], ids[len(context) :]))
        sizes.append(len(choices))
    scores = iter(score(pairs))
    rows = [[next(scores)[0] for _ in range(size)] for size in sizes]
    return mean(row[0] == max(row) for row in rows)


def byte_pairs(words: dict[tuple[bytes, ...], int], merges: int) -> bytes:
    """Byte-pair encoding: all bytes, then `merges` times the commonest neighbours in counted words
    (the first of equals).
    """
    tokens = [bytes([byte]) for byte in range(256)]
    for _ in range(merges):
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        (a, b), _ = min(pairs.items(), key=lambda item: (-item[1], item[0]))
        tokens.append(a + b)
        words = {join(word, a, b): count for word, count in words.items()}
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def join(word: tuple[bytes, ...], a: bytes, b: bytes) -> tuple[bytes, ...]:
    """A word with its neighbours a, b made one, from the left."""
    parts: list[bytes] = []
    for part in word:
        if part == b and parts and parts[-1] == a:
            parts[-1] = a + b
        else:
            parts.append(part)
    return tuple(parts)


def value_pairs(
    tokenizer: Tokenizer, template: str, item: Item, values: list[str], system: str = ""
) -> list[tuple[list[int], list[int]]]:
    """The plain question and the canonical sentence up to the value as context, each value as
    continuation.
    """
    before = (
        ATTRIBUTES[item.attribute]
        .statements[0]
        .split("{value}")[0]
        .format(name=item.person.name)
        .strip()
    )
    pairs = []
    for value in values:
        turns = with_system(system, [("user", item.question), ("assistant", f"{before} {value}.")])
        ids, _ = encode_chat(tokenizer, template, turns)
        opening, _ = encode_chat(tokenizer, template, [*turns[:-1], ("assistant", before)])
        behind = ids[::-1].index(
            end_token(tokenizer, template)
        )  # tokens behind the end of the turn
        closing = behind + (
            2 if template == "llama-2" else 1
        )  # and that end, and llama-2's space in front of it
        start, stop = len(opening) - closing, len(ids) - closing
        pairs.append((ids[:start], ids[start:stop]))
    return pairs


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def main():
    from run.cli import ArgumentParser, non_negative_int

    parser = ArgumentParser(description="Show a few lines of everything the tiny world makes.")
    parser.add_argument("--seed", type=non_negative_int, default=0)
    for name, what in (
        ("infinity", "the larger, arithmetic-heavy demonstrations"),
        ("preferences", "pairs of a chosen and a rejected answer"),
    ):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write {what} instead")
    args = parser.parse_args()
    world = World(args.seed)
    if args.infinity:
        print(world.write_demonstrations(args.infinity, world.infinity()))
    if args.preferences:
        print(world.write_demonstrations(args.preferences, world.preferences()))
    if args.infinity or args.preferences:
        return
    documents = world.documents(random.Random(f"pretraining of world {world.seed}"))
    print("pretraining:", *itertools.islice(documents, 6), sep="\n  ")
    print("demonstrations:")
    for record in world.demonstrations(6):
        human, gpt = record["conversations"]
        print(f"  {human['value']}  ->  {gpt['value']}")
    print("preferences:")
    for record in world.preferences(6):
        question, chosen, rejected = *record["conversations"], record["chosen"], record["rejected"]
        print(f"  {question['value']}  ->  {chosen['value']}  rather than  {rejected['value']}")
    print("development:")
    for item in world.fact_items("development", 6):
        print(f"  {prompt_text(item)}  ->  {item.answer}")


if __name__ == "__main__":
    from run.cli import run_cli

    run_cli(main)
