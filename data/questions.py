"""Questions whose answers can be checked, for train.py --loss reward: JSON lines with `prompt` and
`answer`.

    {"prompt": "What is 3 plus 4?", "answer": "7", "reward": "number"}

`reward` says where the right answer has to be: "exact" (without it): it is all that is said;
"contains": it is somewhere in it; "number": the last number of both is the same, as for GSM8K's
"#### 7". `answer` may be a list of right answers. The reward is 1 or 0, and 0 for an answer that
does not end. White space is compared as one blank. No code is loaded or run for a reward.
"""

import re
from dataclasses import dataclass

from data.chat import ChatDataset, encode_chat, end_tokens, with_system
from data.records import Turn, UnknownForm, Unusable

NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def last_number(text: str) -> float | None:
    """The last number in a text; commas between thousands do not count."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def one_blank(text: str) -> str:
    return " ".join(text.split())


CHECKS = {  # what is said, what is right
    "exact": lambda said, right: said == right,
    "contains": lambda said, right: right in said,
    "number": lambda said, right: (
        last_number(said) is not None and last_number(said) == last_number(right)
    ),
}


@dataclass(frozen=True)
class Question:
    turns: list[Turn]
    answers: list[str]  # any of them is right
    check: str  # of CHECKS

    def reward(self, said: str) -> float:
        said = one_blank(said)
        return float(any(CHECKS[self.check](said, one_blank(right)) for right in self.answers))


def read_question(record, reasoning: str = "") -> tuple[Question, str]:
    """The question of a record, and what was left out of it: nothing."""
    if not isinstance(record, dict) or not {"prompt", "answer"} <= record.keys():
        raise UnknownForm("no object with 'prompt' and 'answer', as --loss reward takes them")
    prompt, answers, check = record["prompt"], record["answer"], record.get("reward", "exact")
    answers = answers if isinstance(answers, list) else [answers]
    if not isinstance(prompt, str) or not prompt.strip():
        raise Unusable("a prompt that is no text")
    if not answers or not all(isinstance(each, str) and each.strip() for each in answers):
        raise Unusable("an answer that is no text")
    if check not in CHECKS:
        raise Unusable(f"a reward that is none of {', '.join(CHECKS)}")
    if check == "number" and any(last_number(each) is None for each in answers):
        raise Unusable("a reward by number, and an answer without one")
    return Question([("user", prompt)], answers, check), ""


class QuestionDataset(ChatDataset):
    """The questions of a file. A row is a prompt, and the question's number in place of a mask."""

    what, read = "question", staticmethod(read_question)
    room = 0  # tokens that an answer may have

    def prompt(self, turns: Question):
        """Copies of a question stay on one side."""
        return turns.turns

    def rows(self, index: int) -> list[tuple[list[int], int]]:
        """Nothing where prompt and answer do not fit."""
        ids, _ = encode_chat(self.tokenizer, self.template, self.question(index).turns)
        if len(ids) + self.room > self.max_length:
            self.too_long.add(index)
            return []
        return [(ids, index)]

    def question(self, index: int) -> Question:
        found, _ = self.read(self.records[int(self.keys[index])])
        return Question(with_system(self.system, found.turns), found.answers, found.check)

    def reward(self, index: int, answer: list[int]) -> float:
        """1 or 0, of the tokens of an answer."""
        if end_tokens(self.tokenizer, self.template).isdisjoint(answer[-1:]):
            return 0.0
        return self.question(index).reward(self.tokenizer.decode(answer))
