"""What somebody who is new here would run into: each was met once."""

import csv
import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import model
from data.errors import UsageError
from data.tiny_world import TINY_SIZES
from ivl import ValueModel
from model import Llama
from run import cli, curves, device, plug
from run.folder import Run
from run.jobs import training_costs
from run.processes import Alone
from sample import Guided, generate
from tests.helpers import (
    ROOT,
    SHORT,
    VALUE,
    inside,
    refused,
    small,
    stop_at,
    value_network,
    weights,
)
from train import TINY_POST_TRAINING

# ---- what is trained is what is measured, and what is saved


class Dropped(nn.Module):
    """A layer with dropout behind it, as tutorials put one in."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.dropout = layer, nn.Dropout(0.5)

    def forward(self, *inputs):
        return self.dropout(self.layer(*inputs))


def test_dropout_is_off_while_answering():
    value = ValueModel(small(num_hidden_layers=1))
    options = dict(max_new_tokens=8, stop_ids=set())
    plain = generate(Guided(small(), value), [[5, 9, 11]], **options)
    value.network.model.norm = Dropped(value.network.model.norm)
    value.train()
    tokens = torch.tensor([[5, 9, 11]])
    assert not torch.equal(value(tokens), value(tokens))
    assert generate(Guided(small(), value), [[5, 9, 11]], **options) == plain
    assert torch.equal(value(tokens), value(tokens))


def test_what_is_loaded_is_ready_to_answer(tmp_path):
    small().save_pretrained(tmp_path / "base")
    assert not any(part.training for part in Llama.from_pretrained(tmp_path / "base").modules())


def test_dropout_drops_while_training_and_a_resumed_run_drops_the_same(home, tmp_path, monkeypatch):
    """With the plain network between two such runs: other weights, so something was dropped."""
    (tmp_path / "out/seed0").mkdir(parents=True)
    (tmp_path / "out/seed0/tiny-s").symlink_to(home / "out/seed0/tiny-s")
    command = ["train.py", "--base", "--value", "--no-full", "--steps", "6", "--batch-size", "2"]
    command += ["--save-every", "3", "--out"]
    make, modes = ValueModel.__init__, []

    def with_dropout(self, network, info=None):
        make(self, network, info)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens, base_logits=None, caches=None):
        modes.append(self.training)
        return self.dropout(self.network(tokens, caches[0] if caches else None))

    monkeypatch.setattr("run.jobs.examine", lambda guided, *rest, **options: {"exact": 0.0})
    assert inside(tmp_path, *command, "plain")[0] == 0
    monkeypatch.setattr(ValueModel, "__init__", with_dropout)
    monkeypatch.setattr(ValueModel, "forward", forward)
    assert inside(tmp_path, *command, "whole")[0] == 0
    assert modes == [True] * 6
    stop_at(tmp_path, 4, *command, "parts")
    assert inside(tmp_path, *command, "parts", "--resume")[0] == 0
    plain, whole, parts = [weights(tmp_path / name) for name in ("plain", "whole", "parts")]
    name = "model.norm.weight"
    assert not torch.equal(plain[name], whole[name]) and torch.equal(whole[name], parts[name])


def test_a_network_that_would_load_as_another_is_not_saved(tmp_path):
    tied, untied = small(tie_word_embeddings=True), small()
    tied.lm_head.weight = nn.Parameter(tied.lm_head.weight.clone())
    untied.lm_head.weight = untied.model.embed_tokens.weight
    wider = small()
    wider.model.layers[0].mlp.up_proj = nn.Linear(32, 48)
    for network, message in ((tied, "not tied"), (untied, "is tied"), (wider, "up_proj.bias")):
        for saved in (network, ValueModel(network)):
            with pytest.raises(UsageError, match=f"not saved: .*{message}"):
                saved.save_pretrained(tmp_path / "out")
    value = value_network("residual")
    value.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(UsageError, match="not saved: scale"):
        value.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_saved_is_not_trained_either(home, tmp_path, monkeypatch):
    monkeypatch.setattr(Llama, "tie", lambda self: None)
    message = refused(
        tmp_path, "train.py", "--base", home / "out/seed0/tiny-s", "--value", "--no-full", *SHORT
    )
    assert "not saved: the config says tie_word_embeddings True" in message


def test_the_activation_is_saved_and_checked(tmp_path, monkeypatch):
    small().save_pretrained(tmp_path / "silu")
    monkeypatch.setattr(model, "HIDDEN_ACT", "gelu")
    gelu = small()
    gelu.save_pretrained(tmp_path / "gelu")
    assert json.loads((tmp_path / "gelu/config.json").read_text())["hidden_act"] == "gelu"
    x, mlp = torch.randn(3, 32), gelu.model.layers[0].mlp
    inner = nn.functional.gelu(mlp.gate_proj(x)) * mlp.up_proj(x)
    torch.testing.assert_close(mlp(x), mlp.down_proj(inner))
    Llama.from_pretrained(tmp_path / "gelu")
    with pytest.raises(UsageError, match="hidden_act 'silu' .* 'gelu'"):
        Llama.from_pretrained(tmp_path / "silu")
    monkeypatch.undo()
    with pytest.raises(UsageError, match="hidden_act 'gelu' .* 'silu'"):
        Llama.from_pretrained(tmp_path / "gelu")


# ---- devices


def test_a_device_that_is_not_there_is_refused(home):
    for script in ("train.py", "sample.py"):
        assert "--device mps: torch" in refused(home, script, "--base", "tiny-s", "--device", "mps")


def test_a_device_can_be_asked_for(home):
    status, output, errors = inside(home, "sample.py", "--device", "cpu", "--prompt", "Hello")
    assert status == 0 and "device cpu (as asked)" in output, errors


def test_a_device_that_computes_otherwise_is_not_taken(monkeypatch):
    """Where mps is, of which there is none here: a move to it that damages a weight, and one that does not."""
    move = Llama.to
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(Llama, "to", lambda self, place: move(self, "cpu"))
    real = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda x, *rest: x if rest == ("mps",) else real(x, *rest)
    )
    assert device.find_device("mps")[0] == "mps"

    def damaged(self, place):
        if place == "mps":
            self.lm_head.weight.data[5] += 1
        return move(self, "cpu")

    monkeypatch.setattr(Llama, "to", damaged)
    where, reason = device.find_device("mps")
    assert where == "cpu" and "other logits" in reason


# ---- which value network is taken


def test_a_base_without_a_value_network_answers_alone(home, checkpoint, tmp_path):
    (tmp_path / "out/seed0").mkdir(parents=True)
    (tmp_path / "out/seed0/tiny-s").symlink_to(home / "out/seed0/tiny-s")
    for base, questions in ((checkpoint, ["--prompt", "Hello"]), ("tiny-s", [])):
        ask = ["sample.py", "--base", base, "--max-new-tokens", "4", *questions]
        status, output, errors = inside(tmp_path, *ask)
        assert status == 0 and "the base answers alone" in output, errors
        assert f"{base.name if questions else base} alone" in output and "+ value" not in output
    message = refused(tmp_path, "sample.py", "--base", checkpoint, "--explain", "--prompt", "Hello")
    assert "no value network" in message
    assert "no value network under out/ yet" in refused(tmp_path, "sample.py", "--prompt", "Hello")
    message = refused(tmp_path, "sample.py --base tiny-l")
    assert "not there yet; `python train.py --base tiny-l --seed 0` makes it" in message


def test_a_base_takes_no_value_network_of_the_other_kind_unless_it_is_named(home, monkeypatch):
    monkeypatch.chdir(home)
    assert plug.newest_value(None) == plug.newest_value("tiny-l") == VALUE
    assert plug.newest_value("out/seed0/tiny-s") == VALUE
    big = SimpleNamespace(vocab_size=32000)
    monkeypatch.setattr(plug, "load_tokenizer", lambda path: big)
    assert plug.newest_value("out/seed0/tiny-s") is None  # its tokenizer is a real one's now


def test_that_it_is_the_newest_is_said(home):
    ask = ["sample.py", "--prompt", "Hello", "--max-new-tokens", "2"]
    says = "(residual; the newest, --value names another)"
    assert says in inside(home, *ask)[1]
    assert says not in inside(home, *ask, "--value", VALUE)[1]


# ---- what is shown while training


def test_rates_have_two_or_three_digits():
    numbers = [0.04, 3.8, 9.97, 38.4, 999.6, 1234, 99_700, 123_456, 3.4e6]
    assert [cli.rate(number) for number in numbers] == [
        *("0.0", "3.8", "10", "38", "1.0k", "1.2k", "100k", "123k", "3.4M")
    ]


def test_progress_is_one_line_on_a_terminal_and_plain_lines_elsewhere(monkeypatch, capsys):
    cli.show_progress("one")
    assert capsys.readouterr().out == "one\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "20")
    cli.show_progress("step 1 " * 5)
    cli.show_progress("step 2", keep=True)
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert list(cli.watch([7, 8, 9], "examining")) == [7, 8, 9]
    first, *rest = capsys.readouterr().out.split(cli.CLEAR)[1:]
    assert len(first) == 20 and first.endswith("\r")
    assert rest[0] == "step 2\n" and rest[1].startswith("examining: 1 of 3, ") and rest[-1] == ""


def test_the_main_job_says_which_network_it_trains_how_long_it_takes_and_what_is_next(
    home, tmp_path, short_exam, monkeypatch
):
    shutil.copytree(home / "out/seed0/tiny-s", tmp_path / "out/seed0/tiny-s")
    for name in ("run.jobs.TINY_POST_TRAINING", "train.TINY_POST_TRAINING"):
        monkeypatch.setattr(name, TINY_POST_TRAINING | dict(steps=3, batch_size=4))
    status, output, errors = inside(tmp_path, "train.py")
    assert status == 0, errors
    begun = [line.partition(", ")[0] for line in output.splitlines() if re.match(r"\d of", line)]
    assert begun == ["1 of 2: training in full", "2 of 2: training a value network (residual)"]
    shown = [line for line in output.splitlines() if line.startswith("step")]
    assert " left, of all about " in shown[0] and " of all" not in shown[-1]
    assert "|z_delta|, the mean size of the value network's logits" in output
    *_, seconds, following = output.splitlines()
    assert re.match(r"\d+ core-seconds \(", seconds)
    assert following == "next: python train.py --base tiny-l && python sample.py --base tiny-l"


def test_what_is_finished_is_not_counted(tmp_path, home):
    """The networks of a command, by what they cost."""
    given = dict(job="value", base=["tiny-s"], value="", teacher="", data=None, no_full=False)
    given |= dict(loss="ce", plugged=[], home=tmp_path, bases=[Path("tiny-s")], out=None)
    args = SimpleNamespace(**given)
    assert len(training_costs(args)) == 3
    args.base = ["tiny-s", "tiny-m"]
    assert training_costs(args)[:2] == [TINY_SIZES["tiny-s"][1], TINY_SIZES["tiny-m"][1]]
    args.home = home / "out/seed0"
    assert len(training_costs(args)) == 3  # tiny-s is there
    args.no_full = True
    assert len(training_costs(args)) == 2
    args.job, args.base = "pretrain", ["tiny-s"]
    assert training_costs(args) == []


@pytest.mark.parametrize(
    "flags",
    ["--with nowhere", "--loss kl --teacher nowhere", "--data nowhere", "--value nowhere"],
)
def test_a_name_of_nothing_is_refused_before_a_base_is_pretrained(flags, tmp_path):
    command = "train.py --base --value" if "--value" not in flags else "train.py --base"
    message = refused(tmp_path, f"{command} {flags}")
    assert re.search(r"--\w+ nowhere: no such (folder|file)", message)
    assert not (tmp_path / "out").exists()


def test_an_empty_argument_is_named(tmp_path):
    for flag in ("--base", "--data", "--out"):
        assert f"{flag} is empty" in refused(tmp_path, "train.py", "--value", flag, "")


def test_a_log_has_each_step_once_also_of_a_resumed_run_and_is_drawn(home, tmp_path, monkeypatch):
    (tmp_path / "out/seed0").mkdir(parents=True)
    (tmp_path / "out/seed0/tiny-s").symlink_to(home / "out/seed0/tiny-s")
    command = ["train.py", "--base", "--value", "--no-full", "--steps", "9", "--batch-size", "2"]
    command += ["--save-every", "3", "--out"]
    monkeypatch.setattr("run.jobs.examine", lambda guided, *rest, **options: {"exact": 0.0})
    assert inside(tmp_path, *command, "whole")[0] == 0
    report = Run.report

    def stop(self, step, *rest):
        report(self, step, *rest)
        if step == 4:  # two steps behind the checkpoint
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "report", stop)
        assert inside(tmp_path, *command, "parts")[0] == 130
    assert len(curves.read_log(tmp_path / "parts")) == 5
    assert inside(tmp_path, *command, "parts", "--resume")[0] == 0
    whole, parts = [curves.read_log(tmp_path / name) for name in ("whole", "parts")]
    assert [step["step"] for step in whole] == list(range(1, 10))
    for one, other in zip(whole, parts, strict=True):
        assert {**one, "tokens/s": 0} == {**other, "tokens/s": 0}
    assert {"loss", "ce", "base_ce", "l1", "lr", "tokens/s"} <= whole[0].keys()
    curves.write_csv({"whole": whole, "parts": parts}, tmp_path / "curves.csv")
    rows = list(csv.DictReader((tmp_path / "curves.csv").open()))
    assert len(rows) == 18 and float(rows[0]["loss"]) == whole[0]["loss"]
    assert curve_of(whole) == ([1.5, 3.5, 5.5, 7.5, 9.0], pytest.approx(pairs_of(whole)))


def curve_of(steps: list[dict]) -> tuple[list[float], list[float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "POINTS", 5)
        return curves.curve(steps, "loss")


def pairs_of(steps: list[dict]) -> list[float]:
    losses = [step["loss"] for step in steps]
    return [sum(losses[at : at + 2]) / len(losses[at : at + 2]) for at in range(0, 9, 2)]


def test_curves_are_a_picture_with_matplotlib(tmp_path):
    pytest.importorskip("matplotlib")
    steps = [{"step": step, "loss": 3 / step, "lr": 0.1} for step in range(1, 500)]
    curves.draw({"a": steps}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_a_log_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no log.jsonl"):
        curves.read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2}\nnothing\n{"step": 2}\n')
    with pytest.raises(UsageError, match="line 2"):
        curves.read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2}\n{"ste')
    assert curves.read_log(tmp_path) == [{"step": 1, "loss": 2}]


def test_a_line_is_a_mean_over_the_steps_since_the_one_before(tmp_path, capsys, monkeypatch):
    """By a clock on which a step takes 0.7 s: lines of steps 1, 4, 7 and the last."""
    settings = SimpleNamespace(steps=10, lr=1.0, warmup=0.04, floor=0.0)
    run = Run(tmp_path / "run", settings, False, 100, Alone())
    run.work.mkdir()
    run.first, run.tokens, run.unreported = 0, 0, []
    now = [0.0]
    monkeypatch.setattr("run.folder.time", SimpleNamespace(monotonic=lambda: now[0]))
    run.started = run.stepped = run.reported = 0.0
    for step in range(10):
        now[0] += 0.7
        run.report(step, {"loss": float(step), "ce": 0.0}, 7)
    shown = re.findall(r"step +(\d+)/10 .* loss ([\d.]+)  10 tokens/s", capsys.readouterr().out)
    assert shown == [("1", "0.000"), ("4", "2.000"), ("7", "5.000"), ("10", "8.000")]


# ---- files are closed


def test_files_of_records_are_closed_also_those_that_are_refused(tmp_path):
    """By a Python that tells of files left open."""
    record = (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    (tmp_path / "plain.jsonl").write_text(record)
    (tmp_path / "wide.jsonl").write_text(record, encoding="utf-16")
    (tmp_path / "small.jsonl.gz").write_bytes(gzip.compress(record.encode("utf-16")))
    (tmp_path / "damaged.jsonl.gz").write_bytes(gzip.compress(record.encode())[:-9])
    (tmp_path / "foreign.jsonl").write_bytes(b"PAR1" + bytes(90))
    program = f"""
from pathlib import Path
from data.errors import UsageError
from data.records import Records
for path in sorted(Path({str(tmp_path)!r}).iterdir()):
    try:
        print(path.name, len(list(Records(path))))
    except UsageError as error:
        print(path.name, "refused")
"""
    done = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        *("damaged.jsonl.gz refused", "foreign.jsonl refused", "plain.jsonl 1"),
        *("small.jsonl.gz 1", "wide.jsonl 1"),
    ]


# ---- who decided


def test_the_columns_of_tokens_that_moved_say_that_they_are_probabilities(home):
    ask = ["sample.py", "--explain", "--prompt", "Greet Ruja.", "--max-new-tokens", "3"]
    status, output, errors = inside(home, *ask)
    assert status == 0, errors
    head = next(line for line in output.splitlines() if "base alone  " in line)
    assert head.rstrip().endswith("less probable") and "more probable" in head
