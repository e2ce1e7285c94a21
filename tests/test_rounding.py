"""tests/rounding.py: what it sets is what the commands run with, and what it reads is the whole table."""

import torch

from tests.helpers import ROOT
from tests.rounding import read_table, run

TRAIN = """
import sys

import torch

def accumulate_gradient(objective, base, parts, dtype):
    for tokens, labels in parts:
        print(tokens.tolist(), labels.tolist())

def main():
    print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), sys.argv[1:])
    accumulate_gradient(None, None, [(torch.tensor([1, 2]), torch.tensor([3, 4]))], "float32")

if __name__ == "__main__":
    main()
"""


def test_variations_change_what_they_say_and_nothing_else(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    for package in ("run", "data"):
        (tmp_path / package).symlink_to(ROOT / package)
    one, two = (
        run("train.py --seed 0", tmp_path, variation, tmp_path) for variation in ("default", "rows")
    )
    assert one == "DEFAULT 1 ['--seed', '0']\n[1, 2] [3, 4]\n"
    widest = torch.backends.cpu.get_cpu_capability()
    assert two == one.replace("DEFAULT", widest).replace("[1, 2] [3, 4]", "[2, 1] [4, 3]")


def test_a_table_ends_where_its_numbers_end():
    output = (
        "           exact  arith\nfirst      0.1     0.2\n\n"
        "              exact  arith\ntiny-s alone  0.000  -\nbase+value    0.250  1.000\n\n126 core-seconds\n"
    )
    assert read_table(output, "exact") == {
        "tiny-s alone": {"exact": 0.0, "arith": None},
        "base+value": {"exact": 0.25, "arith": 1.0},
    }
    assert read_table(output.replace("\n\n126", "\n126"), "exact").keys() == {
        "tiny-s alone",
        "base+value",
    }
