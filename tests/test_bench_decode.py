"""bench/decode.py and paper/table3.py: what they count and print, and, marked slow, that they run."""

import re

import pytest
import torch

from bench import decode
from bench.decode import (
    ALONE,
    BOTH,
    CONTENDERS,
    PROXY,
    SHAPES,
    THEIR_BOTH,
    THEIRS,
    VALUE,
    bytes_a_step,
    conclusions,
    deepen,
    fitting,
    show_speculation,
    weights_of,
)
from bench.measure import Result
from fast.graphs import CompiledGuided
from model import Llama
from paper import table3
from sample import Guided
from tests.helpers import PAPER, python, small


@torch.inference_mode()
def test_deepening_changes_the_cost_and_nothing_else():
    base, tokens = small(), torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    deep = deepen(base, 5)
    assert len(deep.model.layers) == 5 and torch.equal(deep(tokens), base(tokens))
    assert all(
        layer.mlp.up_proj.weight.any() for layer in deep.model.layers
    )  # and it does compute them


def test_bytes_of_a_step():
    """All weights but an untied embedding, and the keys and values of half the new tokens and all of the prompt."""
    with torch.device("meta"):
        count = {
            name: sum(parameter.numel() for parameter in Llama(SHAPES[name]).parameters())
            for name in ("TinyLlama", "110M")
        }
    assert weights_of(SHAPES["TinyLlama"]) == count["TinyLlama"] - 32000 * 2048
    assert weights_of(SHAPES["110M"]) == count["110M"]
    config = SHAPES["TinyLlama"]
    one, eight = [bytes_a_step(config, batch, 128, 2) for batch in (1, 8)]
    assert eight - one == 2 * 7 * 2 * 22 * 4 * 64 * (32 + 64) and one > 2 * weights_of(config)


def test_what_does_not_fit_is_left_out(monkeypatch):
    assert fitting("tiny-s", "tiny-l", "cpu") == list(CONTENDERS)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 80e9))
    assert fitting("TinyLlama", "Llama-2-7B", "cuda") == [ALONE, VALUE, BOTH, PROXY, THEIRS]
    assert fitting("TinyLlama", "Llama-2-13B", "cuda") == [ALONE, VALUE, BOTH]


def test_conclusions_are_of_times_side_by_side():
    results = {
        ALONE: Result(seconds=[1.0, 2.0, 4.0]),
        VALUE: Result(seconds=[0.5, 1.0, 2.0]),
        BOTH: Result(seconds=[1.5, 3.3, 6.0]),
        THEIRS: Result(seconds=[1.0, 3.0, 4.0]),
        THEIR_BOTH: Result("not installed (transformers)"),
    }
    assert conclusions(results).splitlines() == [
        "- value + base takes 1.00 (1.00 to 1.10) of the sum of what the two take alone",
        "- transformers, base alone, takes 1.00 (1.00 to 1.50) times as long as base alone here",
    ]


@pytest.mark.parametrize(
    "factor, verdict",
    [
        (0.5, "it pays: at best, K = 4, 2.00 times as fast, and 0.62"),
        (2.0, "it does not pay: at best, K = 4, 0.50 times as fast, and 2.50"),
    ],
)
def test_speculation_says_whether_it_pays(factor, verdict):
    drafts = [
        {
            "K": K,
            "draft": draft,
            "accepted": 0.9,
            "tokens a round": 1.8,
            "seconds": [seconds * factor, 2 * seconds * factor],
        }
        for K, draft, seconds in ((4, "z_delta", 1.0), (8, "z_delta", 1.1), (4, "both", 1.2))
    ]
    shown = show_speculation(
        {
            "answers": 3,
            "tokens": 30,
            "differing": 0,
            "compared": 6,
            "guided": [1.0, 2.0],
            "small": [0.2, 0.4],
            "alone": [0.8, 1.6],
            "drafts": drafts,
        }
    )
    assert f"- drafted by z_delta alone, {verdict}" in shown
    assert "0 of 6 differ" in shown and "| 0.900 " in shown and "| tiny-s with z_delta |" in shown
    assert "this base alone takes 4.00 (4.00 to 4.00) times as long as tiny-s alone" in shown
    assert "guided without speculation takes 1.25 (1.25 to 1.25) times as long" in shown


@pytest.mark.skipif(not PAPER.is_file(), reason="the paper's text is not here")
def test_the_papers_table_3():
    text = PAPER.read_text(encoding="utf-8")
    for name, row in table3.PAPER.items():
        cells = re.search(rf"^{re.escape(name)}\t\d\t(.*)$", text, re.M)[1].split("\t")
        assert [
            tuple(float(part.rstrip("GBs")) for part in cell.split("/")) for cell in cells
        ] == list(row)


def test_table_3_beside_the_papers():
    measured = [
        {
            ALONE: Result(seconds=[0.01], peak=10**9),
            VALUE: Result(seconds=[0.002], peak=10**9),
            BOTH: Result(seconds=[0.012 * slower], peak=2 * 10**9),
        }
        for slower in (1, 1, 1.25)
    ]
    rows = table3.paper_rows("23M", "110M") + table3.our_rows(measured, "23M", "110M")
    assert rows[3] == ["1.1B + 7B over 7B", "1.79", "1.90", "2.25"]
    assert rows[6] == ["our 23M + 110M", "1.54 s, 2.00 GB", "6.14 s, 2.00 GB", "15.36 s, 2.00 GB"]
    assert rows[7][1:] == ["1.20 (1.20 to 1.20)", "1.20 (1.20 to 1.20)", "1.50 (1.50 to 1.50)"]
    assert "keeps 80% of its tokens per second" in table3.slowdown(
        measured
    ) and "keeps 83%" in table3.slowdown(measured)


def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch):
    for arguments, message in [
        (["--pair", "tiny-s", "nothing"], "--pair: invalid choice"),
        (["--ahead", "40"], "from 1 to 32"),
        (["--tokens", "0"], "positive whole"),
        (["--speculate", str(tmp_path)], "not there; `python train.py`"),
        (["--ahead", "4"], "--ahead goes with --speculate"),
        (["--layers", "8"], "--layers goes with --speculate"),
        (["--speculate", str(tmp_path), "--layers", "2"], "tiny-l has 4 to begin with"),
        (["--speculate", str(tmp_path), "--batch", "1"], "--batch does not go with --speculate"),
        (["--speculate", str(tmp_path), "--tokens", "8"], "--tokens does not go with --speculate"),
        (["--speculate", str(tmp_path), "--pair", "tiny-s", "tiny-l"], "--pair does not go with"),
    ]:
        monkeypatch.setattr("sys.argv", ["decode.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            decode.run_cli(decode.main)
        errors = capsys.readouterr().err
        assert ended.value.code == 2 and errors.count("\n") == 1 and message in errors


def test_flags_that_were_not_given_have_their_usual_values(monkeypatch):
    monkeypatch.setattr("sys.argv", ["decode.py"])
    args = decode.arguments()
    assert (args.batch, args.ahead, args.layers, args.rounds) == ([1, 8], [2, 4, 6, 8, 12], 28, 3)


def test_on_a_gpu_steps_are_captured():
    assert decode.guided_on("cuda") is CompiledGuided and decode.guided_on("cpu") is Guided


@pytest.mark.slow
def test_benches_print_their_tables(tmp_path, three_seeds):
    few = "--tokens 8 --rounds 1".split()
    output = python("-m bench.decode --pair tiny-s tiny-l", *few)
    assert (
        output.count("| value + base ") == 2 and "failed" not in output and "of the sum" in output
    )
    output = python(
        "-m bench.decode --speculate",
        three_seeds / "out/seed0",
        *"--rounds 1 --ahead 4 6".split(),
    )
    undeepened, deepened = output.split("deepened to")
    assert (
        all(re.search("it (pays|does not pay)", part) for part in (undeepened, deepened))
        and "0 of 192 differ" in output
    )
    assert "our 23M + 110M" in python("-m paper.table3 --rounds 1")
