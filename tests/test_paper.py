"""paper/: the rule for verdicts, the paper's own numbers, and that what is made is kept."""

import contextlib
import io
import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.measure import table
from data.errors import UsageError
from data.tiny_world import World
from paper import (
    appendix_b,
    continued,
    fig2,
    losses,
    networks,
    norm,
    report,
    rewards,
    sums,
    table1,
    table2,
    table4,
)
from paper.__main__ import METRICS, SCRIPTS, document
from paper.networks import (
    CONTINUE,
    NETWORKS,
    OWN_ANSWERS,
    Job,
    Kept,
    command_of,
    jobs_for,
    make,
    networks_of,
    parts_of,
    with_needs,
)
from paper.report import STAND_INS, between, percent, verdict
from run import jobs
from run.cli import run_cli
from tests.helpers import PAPER, inside, refused, worked
from vocab_map import build, overlap


@pytest.mark.parametrize(
    "gaps, expected",
    [
        ([0.3, 0.2, 0.4], "holds"),
        ([0.01, 0.01, 0.01], "holds"),
        ([0.5], "no verdict on one seed"),
        ([0.01, 0.01, 0.4], "undecided"),
        ([0.9, -0.1, -0.1], "undecided"),
        ([-0.3, 0.2], "undecided"),  # zero is within two standard errors
        ([0.3, 0.3, 0.3, 0.3, -0.01], "holds"),
        ([-0.2, -0.3, -0.2], "does not hold"),
        ([0.0, 0.0, 0.0], "undecided"),
    ],
)
def test_the_rule(gaps, expected):
    assert verdict(np.array(gaps)) == expected


def test_cells_and_tables():
    assert percent(np.array([0.5])) == "50.0" and percent(np.array([0.4, 0.5, 0.6])) == "50.0±10.0"
    lines = table([["a", "bcd"], ["1", "2"], ["33", "4"]]).splitlines()
    assert lines == ["| a  | bcd |", "| -- | --- |", "| 1  | 2   |", "| 33 | 4   |"]


def test_names_of_systems():
    assert parts_of("tiny-l") == ("tiny-l", {}, "")
    cascade = "value-cascade+-tiny-s"
    assert parts_of(f"tiny-l + {cascade} x 0.5") == ("tiny-l", {cascade: 0.5}, "")
    assert parts_of("tiny-l + a + b x 0.5") == ("tiny-l", {"a": 1.0, "b": 0.5}, "")
    mapped = parts_of("tiny-b-l + value-residual-tiny-m via paper")
    assert mapped == ("tiny-b-l", {"value-residual-tiny-m": 1.0}, "paper")
    assert networks_of("tiny-l + a + b x 0.5") == ["tiny-l", "a", "b"]
    assert networks_of("tiny-l + proxy-tiny-s") == ["tiny-l", "full-tiny-s", "tiny-s"]
    assert networks_of("tiny-l + value-residual-tiny-s x 2") == ["tiny-l", "value-residual-tiny-s"]
    assert with_needs(["full-tiny-m-continued"]) == [
        "tiny-m",
        "tiny-m-continued",
        "full-tiny-m-continued",
    ]


def recording(made: list, position: int):
    """In place of what makes a job: it makes none, and notes the folder that it would be for."""

    def no_job(*arguments, **_):
        made.append(arguments[position])

    return no_job


@pytest.mark.parametrize("name", NETWORKS)
def test_every_command_trains_the_network_that_it_is_kept_as(name, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(jobs, "pretraining", recording(made, 2))
    monkeypatch.setattr(jobs, "post_training", recording(made, 5))
    monkeypatch.setattr(jobs, "refuse_missing", lambda args: None)
    monkeypatch.setattr(continued, "pretraining", recording(made, 2))
    monkeypatch.setattr(continued, "check_start", lambda start: (None, None))
    command = command_of(name, Path("out/seed0"))
    length = len(NETWORKS[name].program)
    scripts = {CONTINUE: "continued.py", OWN_ANSWERS: "train.py"}  # the latter after its data
    script = scripts.get(tuple(command[:length]), Path(command[0]).name)
    worked(tmp_path, script, *command[length:], "--resume")
    assert Path(made[-1]) == Path("out/seed0") / name
    assert {Path(path).name for path in made[:-1]} <= set(
        with_needs(NETWORKS[name].needs)
    )  # nothing else would be trained on the way


def test_own_answers_say_what_is_missing(tmp_path):
    for flags, cause in (
        ("--data sums-own.jsonl", "--with FOLDER say what is trained"),
        ("--data x.jsonl --with a", "no such questions; there are sums-own"),
        ("--data sums-own.jsonl --with a", "tiny-s: not there yet"),
    ):
        assert cause in refused(tmp_path, f"own_answers.py {flags}")


# ---- made and kept


def job(what: str, script: str, needs: tuple = ()) -> Job:
    return Job(what, Kept(0), [sys.executable, "-c", script], 1.0, list(needs))


def test_jobs_wait_for_their_needs_and_a_held_folder_is_waited_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    append = "open('order', 'a').write('%s ')"
    held = (
        "import pathlib, sys; flag = pathlib.Path('flag'); first = not flag.exists(); flag.touch()\n"
        "if first: sys.exit('x.training: another process is training there')\n" + append % "b"
    )
    make([job("c", append % "c", ["b"]), job("b", held, ["a"]), job("a", append % "a")], 2)
    assert (tmp_path / "order").read_text().split() == ["a", "b", "c"]
    said = capsys.readouterr().out
    assert "[3/3] seed 0, c" in said and "left" in said and "core-minutes" in said


def test_a_job_that_fails_is_told_with_its_last_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"seed 0, a: no such thing \(all of it in .*a.log\)"):
        make([job("a", "import sys; print('long story'); sys.exit('no such thing')")], 2)


def test_what_changed_is_measured_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "out/seed0/tiny-s/train.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    kept = Kept(0)
    assert not kept.has("tiny-s") and kept.measured("tiny-s") is None
    kept.vouch("tiny-s", 12.0)
    kept.keep("tiny-s", {"exact": 0.5})
    assert (
        Kept(0).has("tiny-s")
        and Kept(0).measured("tiny-s") == {"exact": 0.5}
        and jobs_for(["tiny-s"], 0) == []
    )
    os.utime(file, (1, 1))
    assert not Kept(0).has("tiny-s") and Kept(0).measured("tiny-s") is None
    assert [job.what for job in jobs_for(["tiny-s"], 0)] == ["tiny-s", "measuring tiny-s"]


def run_script(folder: Path, script, *arguments) -> tuple[int, str, str]:
    """Status, output and errors of a script of paper/, run in a folder of its own."""
    output, errors, status, argv, before = io.StringIO(), io.StringIO(), 0, sys.argv, os.getcwd()
    os.chdir(folder)
    sys.argv = ["paper", *arguments]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            run_cli(getattr(script, "main", lambda: report.run(script)))
    except SystemExit as ended:
        status = ended.code
    finally:
        os.chdir(before)
        sys.argv = argv
    return status, output.getvalue(), errors.getvalue()


@pytest.fixture
def hardly_trained(monkeypatch):
    """Every network of paper/, after two steps of training."""
    hardly = {
        name: replace(each, flags=f"{each.flags} --steps 2 --batch-size 2", seconds=1)
        for name, each in NETWORKS.items()
    }
    monkeypatch.setattr(networks, "NETWORKS", hardly)


@pytest.mark.slow
def test_the_other_losses_are_measured_and_written(tmp_path, hardly_trained):
    status, output, errors = run_script(
        tmp_path, losses, "--seeds", "1", "--processes", "2", "--results", "page"
    )
    assert status == 0 and "No verdict on one seed" in output, errors
    page = (tmp_path / "page/LOSSES.md").read_text()
    for base in losses.BASES:
        assert f"**On {base}**" in page
    cells = [line.split("|") for line in page.splitlines() if line.startswith("| (the teacher)")][0]
    assert cells[-2].strip() == "0.00" and 0 <= float(cells[-3]) <= 100  # no distance to itself


@pytest.mark.slow
def test_rewards_and_sums_are_measured_and_written(tmp_path, hardly_trained):
    status, output, errors = run_script(
        tmp_path, rewards, "--seeds", "1", "--processes", "2", "--results", "page"
    )
    assert status == 0 and "No verdict on one seed" in output, errors
    page = (tmp_path / "page/REWARDS.md").read_text()
    for script in (rewards, sums):
        assert f"## {script.TITLE}" in page
        assert all(f"\n| {name} " in page for name in script.VALUES)


@pytest.mark.slow
def test_a_script_makes_what_it_needs_is_stopped_goes_on_and_keeps_everything(
    tmp_path, monkeypatch, hardly_trained
):
    vouch, vouched = Kept.vouch, []

    def vouch_and_stop(self, network, core_seconds):
        vouch(self, network, core_seconds)
        vouched.append(network)
        if len(vouched) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Kept, "vouch", vouch_and_stop)
    status, output, errors = run_script(tmp_path, table4, "--seeds", "1", "--processes", "2")
    assert status == 130 and errors == "paper: stopped\n" and "[1/7]" in output
    files = [tmp_path / "out/seed0" / name / "train.json" for name in vouched]
    before = [file.stat().st_mtime_ns for file in files]
    status, output, errors = run_script(tmp_path, table4, "--seeds", "1", "--processes", "2")
    assert (
        status == 0
        and "[5/5]" in output
        and "forward passes a token" in output
        and "No verdict on one seed" in output
    ), errors
    assert [file.stat().st_mtime_ns for file in files] == before
    assert not list((tmp_path / "out").glob("**/*.tmp")) and not list(
        (tmp_path / "out").glob("**/*.training")
    )
    asked = []
    monkeypatch.setattr(report, "make", lambda jobs, processes: asked.append(jobs))
    status, again, errors = run_script(tmp_path, table4, "--seeds", "1")
    assert status == 0 and again == output[output.index("## Table 4") :] and asked == [[]], (
        errors
    )  # nothing is made again
    metrics = json.loads((tmp_path / "out/seed0/measured/tiny-m + proxy-tiny-s.json").read_text())[
        "metrics"
    ]
    assert (
        metrics["passes"] == 3
        and {"exact", "ins", "ins Be polite.", "arith", "2-shot", "new exact"} <= metrics.keys()
    )


def test_networks_with_other_settings_are_not_taken(tmp_path, hardly_trained):
    folder = tmp_path / "out/seed0/tiny-m"
    folder.mkdir(parents=True)
    settings = dict(job="pretrain", bases=[], start="scratch:tiny-m", steps=5)
    (folder / "train.json").write_text(json.dumps(settings))
    status, _, errors = run_script(tmp_path, table4, "--seeds", "1", "--processes", "1")
    assert (
        status == 2
        and errors.count("\n") == 1
        and "with other settings" in errors
        and "tiny-m" in errors
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "0"], "whole number from 1 to 100"),
        (["--processes", "none"], "--processes"),
        (["--results", __file__], "not a folder"),
        (["--fast"], "unrecognized"),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    status, _, errors = run_script(tmp_path, table4, *arguments)
    assert status == 2 and errors.count("\n") == 1 and message in errors


# ---- what is written


def lucky_results(seeds: int):
    """Any number for every system that a script of paper/ may ask for."""
    luck, values = np.random.default_rng(0), {}

    def results(system, metric):
        others = ("new 2-shot", "passes", "base passes", "kl", "pair")
        is_of_a_form = metric.startswith("ins ")
        assert system in results.allowed
        assert metric in METRICS or metric in others or is_of_a_form
        return values.setdefault((system, metric), luck.random(seeds))

    results.allowed = {
        system for script in [*SCRIPTS, losses, rewards, sums] for system in script.SYSTEMS
    }
    return results


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_section_can_be_written_from_its_own_systems(seeds, tmp_path, monkeypatch):
    results = lucky_results(seeds)
    everything = results.allowed
    used = with_needs(network for system in everything for network in networks_of(system))
    assert used == list(NETWORKS)  # none is trained for nothing
    monkeypatch.setattr(fig2, "failures", lambda: "")
    monkeypatch.setattr(norm, "supervised_positions", lambda: 10.0)
    monkeypatch.setattr(appendix_b, "section", lambda seeds: "")  # it would train tokenizers
    monkeypatch.chdir(tmp_path)
    for script in [*SCRIPTS, losses, rewards, sums]:
        results.allowed = set(script.SYSTEMS)
        text = report.section_text(script, results, seeds)
        assert f"`python -m {script.__name__} --seeds {seeds}`" in text and len(
            script.CLAIMS
        ) == text.count("\n- **")
    results.allowed = everything
    for seed in range(seeds):
        kept = Kept(seed)
        kept.ledger = {network: {"made": 0, "core_seconds": 60.0} for network in NETWORKS}
        networks.write(kept.folder / "networks.json", kept.ledger)
    of_the_paper = with_needs(
        network
        for script in SCRIPTS
        for system in script.SYSTEMS
        for network in networks_of(system)
    )
    assert len(NETWORKS) - len(
        of_the_paper
    ) == 26 and f"in {seeds * len(of_the_paper)} core-minutes" in document(results, seeds)


def test_the_norms_table_counts_supervised_positions_as_training_does(
    home, short_exam, monkeypatch
):
    status, output, _ = inside(
        home,
        "train.py --base --value --no-full --l1 1 --out normed --steps 1",
    )
    monkeypatch.chdir(home)
    counted = norm.supervised_positions()
    said = float(re.search(r"text and ([\d.]+) supervised", output)[1])  # of the first thousand
    assert status == 0 and abs(counted - said) < 0.5


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    for script in SCRIPTS:
        report.draw(script, lucky_results(3), tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "fig2.png",
        "fig3.png",
        "fig4.png",
        "norm.png",
    }


def test_without_matplotlib_there_are_no_pictures_and_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.draw(fig2, lucky_results(1), tmp_path)
    assert "not drawn" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, scripts",
    [("RESULTS.md", SCRIPTS), ("LOSSES.md", [losses]), ("REWARDS.md", [rewards, sums])],
)
def test_the_committed_results_are_whole(name, scripts):
    text = (Path(report.__file__).parent / name).read_text()
    for script in scripts:
        assert f"## {script.TITLE}" in text
        for claim in script.CLAIMS:
            assert claim.says in text
    assert "--seeds 3" in text and "no verdict" not in text
    assert all(
        (Path(report.__file__).parent / name).is_file()
        for name in re.findall(r"\]\((\S+\.png)\)", text)
    )


@pytest.mark.slow
def test_overlaps_are_those_of_vocab_map(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["appendix_b", "--seeds", "1"])
    run_cli(appendix_b.main)
    output = capsys.readouterr().out
    row = [line for line in output.splitlines() if line.startswith("| tiny-b / tiny ")][0]
    world = World(0)
    texts = [
        "\n".join(turn["value"] for turn in record["conversations"])
        for record in world.demonstrations()
    ]
    base, value = world.tokenizer_for("tiny-b-m"), world.tokenizer_for("tiny-m")
    found = overlap(texts[len(texts) // 2 :], base, value, build(base, value).value_tokens)
    assert row.split("|")[-2].split(", ")[1].strip() == f"{100 * found:.1f}"


def test_claims_are_gaps_over_seeds():
    known = {"a": np.array([0.5, 0.7]), "b": np.array([0.4, 0.9])}
    gap = between("a", "b", "exact")(lambda system, metric: known[system])
    np.testing.assert_allclose(gap, [0.1, -0.2])
    np.testing.assert_allclose(
        between("a", "b", "exact", 0.05)(lambda system, metric: known[system]), [0.15, -0.15]
    )
    assert set(STAND_INS.values()) - {""} <= set(METRICS)


# ---- the paper's own numbers


@pytest.fixture(scope="module")
def paper() -> list[list[str]]:
    if not PAPER.is_file():
        pytest.skip("the paper's text is not beside the repository")
    return [re.split(r"\t", line.strip()) for line in PAPER.read_text().splitlines()]


def test_table_1_is_copied_rightly(paper):
    rows, block = {}, None
    names = {
        "Tinyllama-1.1B": "tiny-s",
        "Llama-2-7B": "tiny-m",
        "Llama-2-13B": "tiny-l",
        "Codellama-7B": "tiny-m-continued",
    }
    for line in paper:
        if len(line) == 1:
            block = names.get(line[0])
        elif len(line) == 12 and block:
            rows.setdefault(block, {})[line[0]] = tuple(map(float, line[1:]))
    assert rows == {
        block: {row: tuple(map(float, numbers)) for row, numbers in each.items()}
        for block, each in table1.PAPER.items()
    }


def test_tables_2_and_4_are_copied_rightly(paper):
    found = {
        4: {},
        3: {},
    }  # lines of Table 2 have four cells, such as "4.92" and "5.37 (+0.45)", those of Table 4 three
    for line in paper:
        cells = [cell.partition(" (")[0] for cell in line[1:]]
        if len(line) in found and all(re.fullmatch(r"[\d.]+", cell) for cell in cells):
            found[len(line)].setdefault(
                line[0].replace("Toxicgen ↓", "ToxiGen"), tuple(map(float, cells))
            )
    for name, numbers in table2.PAPER.items():
        assert found[4][name] == numbers
    for name, numbers in table4.PAPER.items():
        assert found[3][name] == numbers


def test_the_examination_of_paper_is_on_evaluation_people():
    """No choice of ours may have seen them: the commands that print while choosing examine development people."""
    world = World(0)
    assert not {person.name for person in world.split["evaluation"]} & {
        person.name for person in world.split["development"]
    }
    source = (Path(report.__file__).parent / "measure.py").read_text()
    assert (
        source.count('"evaluation"') + source.count('"new evaluation"') == 4
        and "development" not in source
    )
