"""The real world's small examination: capitals of countries, in five forms of answer.

    python -m data.capitals                                            # a few lines of everything
    python train.py --base out/smollm2-135m --value --data capitals    # 30 countries are demonstrated

A language model of 135M parameters knows many capitals and does not keep to a form it is told to
answer in. Demonstrations are about 30 countries; half of the others are there to choose by
(development), half to report on (evaluation).
"""

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.chat import encode_chat, end_tokens, with_system
from data.files import write_lines
from data.tokenizer import Tokenizer

DEMONSTRATED = 30  # countries
# Table 5's settings are for 86,000 conversations; these are 150. Chosen by 18 of seed 0's
# development countries, at a constant rate of 1e-4: exact .43, .44, .60 after 8, 16, 32 steps, of
# .00 to .11 without; a cosine over 48 steps does as much. Higher rates cost knowledge.
CAPITALS_TRAINING = dict(steps=48, batch_size=8, grad_accum=1, lr=1e-4)
CAPITALS_PAIRS = dict(
    steps=24, batch_size=8, grad_accum=1, lr=2e-5
)  # tried once (paper/LOSSES.md), not chosen among others
CAPITALS_REWARDS = dict(steps=16, batch_size=8, grad_accum=4, lr=2e-5)  # not tried among others

# Countries and their capitals; other accepted spellings or names follow the first.
COUNTRIES = """
Afghanistan: Kabul
Albania: Tirana
Algeria: Algiers
Angola: Luanda
Argentina: Buenos Aires
Armenia: Yerevan
Australia: Canberra
Austria: Vienna
Azerbaijan: Baku
Bangladesh: Dhaka|Dacca
Belarus: Minsk
Belgium: Brussels
Bolivia: Sucre|La Paz
Bosnia and Herzegovina: Sarajevo
Brazil: Brasilia|Brasília
Bulgaria: Sofia
Cambodia: Phnom Penh
Cameroon: Yaounde|Yaoundé
Canada: Ottawa
Chile: Santiago
China: Beijing|Peking
Colombia: Bogota|Bogotá
Costa Rica: San Jose|San José
Croatia: Zagreb
Cuba: Havana
Cyprus: Nicosia
the Czech Republic: Prague
Denmark: Copenhagen
the Dominican Republic: Santo Domingo
Ecuador: Quito
Egypt: Cairo
Estonia: Tallinn
Ethiopia: Addis Ababa
Finland: Helsinki
France: Paris
Georgia: Tbilisi
Germany: Berlin
Ghana: Accra
Greece: Athens
Guatemala: Guatemala City
Haiti: Port-au-Prince
Honduras: Tegucigalpa
Hungary: Budapest
Iceland: Reykjavik|Reykjavík
India: New Delhi|Delhi
Indonesia: Jakarta
Iran: Tehran|Teheran
Iraq: Baghdad
Ireland: Dublin
Israel: Jerusalem
Italy: Rome
Jamaica: Kingston
Japan: Tokyo
Jordan: Amman
Kenya: Nairobi
Kuwait: Kuwait City
Laos: Vientiane
Latvia: Riga
Lebanon: Beirut
Libya: Tripoli
Lithuania: Vilnius
Madagascar: Antananarivo
Malaysia: Kuala Lumpur
Mexico: Mexico City
Mongolia: Ulaanbaatar|Ulan Bator
Morocco: Rabat
Mozambique: Maputo
Myanmar: Naypyidaw|Nay Pyi Taw
Nepal: Kathmandu
the Netherlands: Amsterdam
New Zealand: Wellington
Nicaragua: Managua
Nigeria: Abuja
Norway: Oslo
Oman: Muscat
Pakistan: Islamabad
Panama: Panama City
Paraguay: Asuncion|Asunción
Peru: Lima
the Philippines: Manila
Poland: Warsaw
Portugal: Lisbon
Qatar: Doha
Romania: Bucharest
Russia: Moscow
Saudi Arabia: Riyadh
Senegal: Dakar
Serbia: Belgrade
Slovakia: Bratislava
Slovenia: Ljubljana
Somalia: Mogadishu
South Korea: Seoul
Spain: Madrid
Sudan: Khartoum
Sweden: Stockholm
Switzerland: Bern|Berne
Syria: Damascus
Thailand: Bangkok
Tunisia: Tunis
Turkey: Ankara
Uganda: Kampala
Ukraine: Kyiv|Kiev
the United Kingdom: London
Uruguay: Montevideo
Venezuela: Caracas
Vietnam: Hanoi
Zimbabwe: Harare
"""
CAPITALS = {
    country: names.split("|")
    for country, names in (line.split(": ") for line in COUNTRIES.strip().splitlines())
}

INSTRUCTIONS = {  # what is asked for: the answer, of a whole sentence or of the capital alone
    "": "{sentence}",
    "Answer in one word.": "{capital}",
    "Put a star on both sides.": "* {sentence} *",
    "Say it twice.": "{sentence} {sentence}",
    "Begin with a dash.": "- {sentence}",
}
SENTENCE = "The capital of {country} is {capital}."


@dataclass
class Item:
    country: str
    instruction: str

    @property
    def question(self) -> str:
        return f"What is the capital of {self.country}? {self.instruction}".strip()

    def answers(self) -> list[str]:
        """The right answers, in each accepted spelling; the first is what is demonstrated."""
        return [self.fill(capital) for capital in CAPITALS[self.country]]

    def fill(self, capital: str) -> str:
        sentence = SENTENCE.format(country=self.country, capital=capital)
        return INSTRUCTIONS[self.instruction].format(sentence=sentence, capital=capital)

    def has_form(self, text: str) -> bool:
        """Whether a text has the form asked for, whatever capital it names."""
        # one to three words that begin with a capital letter
        name = r"[^\W\d_a-z][\w'’-]*( [^\W\d_a-z][\w'’-]*){0,2}"
        pattern = (
            re.escape(self.fill("CAPITAL"))
            .replace("CAPITAL", f"(?P<name>{name})", 1)
            .replace("CAPITAL", "(?P=name)")
        )
        found = re.fullmatch(pattern, text)
        return found is not None and not re.fullmatch(
            r"(.+) \1", found["name"]
        )  # not said twice where once was asked for

    def names_capital(self, text: str) -> bool:
        return any(
            re.search(rf"\b{re.escape(capital)}\b", text) for capital in CAPITALS[self.country]
        )


class Capitals:
    """Which countries are demonstrated and which are asked, by a seed."""

    def __init__(self, seed: int):
        self.name = f"capitals {seed}"
        order = random.Random(f"capitals {seed}").sample(list(CAPITALS), len(CAPITALS))
        half = (len(order) - DEMONSTRATED) // 2
        self.demonstrated = order[:DEMONSTRATED]
        self.split = {
            "development": order[DEMONSTRATED : DEMONSTRATED + half],
            "evaluation": order[DEMONSTRATED + half :],
        }

    def items(self, split: str) -> list[Item]:
        return asked_of(self.split[split])

    def demonstrations(self) -> list[dict]:
        """ShareGPT's form, a record for each demonstrated country and form of answer."""
        records = []
        for number, item in enumerate(asked_of(self.demonstrated)):
            question = {"from": "human", "value": item.question}
            answer = {"from": "gpt", "value": item.answers()[0]}
            id = f"{item.country} {number % len(INSTRUCTIONS)}"
            records.append({"id": id, "conversations": [question, answer]})
        return records

    def preferences(self) -> list[dict]:
        """Pairs in ShareGPT's form: each demonstrated question, answered in the form asked for, and
        in another form.
        """
        rng, pairs = random.Random(f"pairs of {self.name}"), []
        for item, record in zip(asked_of(self.demonstrated), self.demonstrations()):
            question, chosen = record["conversations"]
            form = rng.choice([form for form in INSTRUCTIONS if form != item.instruction])
            rejected = {"from": "gpt", "value": Item(item.country, form).answers()[0]}
            sides = {"chosen": chosen, "rejected": rejected}
            pairs.append({"id": record["id"], "conversations": [question]} | sides)
        return pairs

    def questions(self) -> list[dict]:
        """Each demonstrated question, with the answers that earn a reward."""
        return [
            {"prompt": item.question, "answer": item.answers()}
            for item in asked_of(self.demonstrated)
        ]

    def write(self, records: list[dict], path: Path) -> Path:
        return write_lines(path, records)

    def evaluate(
        self,
        tokenizer: Tokenizer,
        answer: Callable[[list[list[int]]], list[list[int]]],
        split: str,
        template: str,
        system: str,
    ) -> dict[str, float]:
        """Examine a system, which answers prompts of token ids; every metric is a share between 0
        and 1.

        exact  the whole answer and its end
        know   the capital is in the answer
        ins    the form asked for, and the end
        """
        items, ends = self.items(split), end_tokens(tokenizer, template)
        prompts = [
            encode_chat(tokenizer, template, with_system(system, [("user", item.question)]))[0]
            for item in items
        ]
        marks = Counter()
        for item, ids in zip(items, answer(prompts), strict=True):
            ended, text = not ends.isdisjoint(ids[-1:]), tokenizer.decode(ids).strip()
            marks["exact"] += ended and text in item.answers()
            marks["know"] += item.names_capital(text)
            marks["ins"] += ended and item.has_form(text)
        return {name: marks[name] / len(items) for name in ("exact", "know", "ins")}


def asked_of(countries: list[str]) -> list[Item]:
    return [Item(country, form) for country in countries for form in INSTRUCTIONS]


def main():
    from run.cli import ArgumentParser, non_negative_int

    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    what = "of the split into countries demonstrated and asked"
    parser.add_argument("--seed", type=non_negative_int, default=0, help=what)
    capitals = Capitals(parser.parse_args().seed)
    print(f"{len(CAPITALS)} countries; demonstrated: {', '.join(capitals.demonstrated)}")
    for split, countries in capitals.split.items():
        print(f"{split} ({len(countries)}): {', '.join(countries)}")
    for item in capitals.items("development")[: len(INSTRUCTIONS)]:
        print(f"{item.question}  ->  {item.answers()[0]}")


if __name__ == "__main__":
    from run.cli import run_cli

    run_cli(main)
