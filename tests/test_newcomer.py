"""What somebody who is new here would run into: each was met once."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import model
from data.errors import UsageError
from ivl import ValueModel
from model import Llama
from run import cli, plug
from sample import Guided, generate
from tests.helpers import SHORT, VALUE, inside, refused, small, stop_at, value_network, weights

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
    assert cli.find_device("mps")[0] == "mps"

    def damaged(self, place):
        if place == "mps":
            self.lm_head.weight.data[5] += 1
        return move(self, "cpu")

    monkeypatch.setattr(Llama, "to", damaged)
    device, reason = cli.find_device("mps")
    assert device == "cpu" and "other logits" in reason


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
