"""The loss at full size: fast/loss.py against the plain losses, the kernels interpreted and compiled; bench/loss.py."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fast.loss
import ivl
import train
from ivl import SCHEMES, ValueModel, ivl_loss
from tests.helpers import interpreted, python, small, value_network

# ---- twins


def tokens_and_labels(ignored: str) -> tuple[Tensor, Tensor]:
    """Rows enough for three chunks of 64, the last one not full, with labels ignored in some places or in all."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = [torch.randint(50, (5, 50), generator=generator) for _ in range(2)]
    skipped = torch.rand(5, 50, generator=generator) < (0.3 if ignored == "some" else 2)
    skipped[1] = True  # a whole row of the batch
    return tokens, labels.masked_fill(skipped, -100)


def assert_twins(plain, other, network: torch.nn.Module, base, ignored: str, *rest) -> None:
    """Two losses agree: loss, every metric and every gradient."""
    results = []
    for loss_of in (plain, other):
        network.zero_grad(set_to_none=True)
        loss, metrics = loss_of(network, base, *tokens_and_labels(ignored), *rest)
        loss.backward()
        results.append(
            {"loss": loss.detach()}
            | metrics
            | {name: parameter.grad for name, parameter in network.named_parameters()}
        )
    assert list(results[0]) == list(results[1])
    for name, value in results[0].items():
        assert value is not None and bool(value.any()) == (ignored == "some"), (
            name
        )  # all ignored: 0, with a gradient
        torch.testing.assert_close(results[1][name].double(), value.double(), msg=name)
    assert base is None or all(parameter.grad is None for parameter in base.parameters())


@pytest.mark.parametrize("l1", [0.0, 0.3])
@pytest.mark.parametrize("ignored", ["some", "all"])
@pytest.mark.parametrize("Vb", [50, 53])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_fast_loss_of_a_value_network_is_the_plain_one(scheme, Vb, ignored, l1, monkeypatch):
    monkeypatch.setattr(fast.loss, "CHUNK_ON_CPU", 0)  # chunks of 64 rows, the fewest
    base, value = small(vocab_size=Vb).double(), value_network(scheme).double()
    assert_twins(ValueModel.loss, fast.loss.value_loss, value, base, ignored, l1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ignored", ["some", "all"])
def test_the_fast_loss_of_a_network_by_itself_is_the_plain_one(ignored, tied, monkeypatch):
    monkeypatch.setattr(fast.loss, "CHUNK_ON_CPU", 0)
    network = small(tie_word_embeddings=tied).double()
    assert_twins(train.language_loss, fast.loss.language_loss, network, None, ignored)


@pytest.mark.parametrize(
    "scheme, chunks",
    [("residual", [64, 64, 11]), ("cascade", [139]), ("cascade+", [139]), ("probe", [139])],
)
def test_the_fast_loss_calls_the_plain_formula(scheme, chunks, monkeypatch):
    """For each chunk of rows where there are chunks, so that a change of ivl_loss reaches both twins."""
    seen = []

    def counting(z_base, z_delta, labels, l1):
        seen.append(len(z_delta))
        return ivl_loss(z_base, z_delta, labels, l1)

    assert fast.loss.ivl_loss is ivl.ivl_loss
    monkeypatch.setattr(fast.loss, "ivl_loss", counting)
    monkeypatch.setattr(fast.loss, "CHUNK_ON_CPU", 0)
    fast.loss.value_loss(value_network(scheme), small(), *tokens_and_labels("some"))
    assert seen == chunks


@pytest.mark.parametrize(
    "loss_of", [train.language_loss, fast.loss.language_loss], ids=["plain", "fast"]
)
def test_a_network_by_itself_has_ordinary_cross_entropy(loss_of):
    network, (tokens, labels) = small(), tokens_and_labels("some")
    loss, metrics = loss_of(network, None, tokens, labels)
    torch.testing.assert_close(
        loss, F.cross_entropy(network(tokens).flatten(0, 1), labels.flatten())
    )
    assert list(metrics) == ["ce"] and metrics["ce"] == loss and not metrics["ce"].requires_grad
    with torch.autocast("cpu", torch.bfloat16):  # logits in bfloat16, their sums not
        assert loss_of(network, None, tokens, labels)[0].dtype == torch.float32
    loss, metrics = loss_of(network, None, tokens, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == metrics["ce"].item() == 0
    assert not any(parameter.grad.any() for parameter in network.parameters())


# ---- chunked heads


def heads(dtype=torch.float64, Vb=53, Vv=50) -> tuple[Tensor, ...]:
    """Hidden states (3, 7, D) and heads of two networks, and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(0)
    h_base, h_value = [torch.randn(3, 7, D, generator=generator, dtype=dtype) for D in (12, 16)]
    W_base, W_value = [
        torch.randn(V, D, generator=generator, dtype=dtype) for V, D in ((Vb, 12), (Vv, 16))
    ]
    labels = torch.randint(min(Vb, Vv), (3, 7), generator=generator)
    labels[0, :4] = labels[2, 5] = -100
    return h_base, W_base, h_value, W_value, labels


def from_hidden(
    h_base: Tensor, W_base: Tensor, h_value: Tensor, W_value: Tensor, labels: Tensor, *rest
) -> fast.loss.Loss:
    """value_loss_from_hidden of the supervised rows."""
    rows = labels != -100
    return fast.loss.value_loss_from_hidden(
        h_base[rows], W_base, h_value[rows], W_value, labels[rows], *rest
    )


def loss_and_gradients(loss: Tensor, metrics: dict, *leaves: Tensor) -> list[Tensor]:
    loss.backward()
    return [loss.detach(), *metrics.values(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
@pytest.mark.parametrize("l1", [0.0, 0.7])
@pytest.mark.parametrize("Vb, Vv", [(50, 50), (53, 50), (50, 53)])
def test_chunked_is_unchunked(Vb, Vv, l1, chunk):
    results = []
    for chunked in (False, True):
        h_base, W_base, h_value, W_value, labels = heads(torch.float32, Vb, Vv)
        (
            h_base.requires_grad_(),
            W_base.requires_grad_(),
            h_value.requires_grad_(),
            W_value.requires_grad_(),
        )
        if chunked:
            found = from_hidden(h_base, W_base, h_value, W_value, labels, l1, chunk)
        else:
            found = ivl_loss(h_base @ W_base.T, h_value @ W_value.T, labels, l1)
        results.append(loss_and_gradients(*found, h_value, W_value))
        assert h_base.grad is None and W_base.grad is None  # stop_gradient
    for unchunked, chunked in zip(*results):
        torch.testing.assert_close(chunked, unchunked, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "V, chunks", [(32000, [75, 75, 50]), (50000, [64, 64, 64, 8]), (1000, [200])]
)
def test_the_usual_chunk_has_as_many_rows_as_keep_logits_few(V, chunks):
    seen = []

    def loss_of(z: Tensor, rows: slice) -> fast.loss.Loss:
        assert len(z) == len(range(200)[rows])
        seen.append(len(z))
        return z.mean(), {"mean": z.detach().mean()}

    h, W = torch.randn(200, 8), torch.randn(V, 8)
    loss, metrics = fast.loss.in_chunks(loss_of, h, W)
    assert seen == chunks
    for mean in (loss, metrics["mean"]):  # chunks weigh as much as they have rows
        torch.testing.assert_close(mean, (h @ W.T).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["h_value", "W_value", "both"])
def test_what_is_frozen_gets_no_gradient(frozen):
    h_base, W_base, h_value, W_value, labels = heads()
    h_value.requires_grad_(frozen == "W_value"), W_value.requires_grad_(frozen == "h_value")
    loss, _ = from_hidden(h_base, W_base, h_value, W_value, labels, 0.3, 4)
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
        assert (h_value.grad is None, W_value.grad is None) == (
            frozen == "h_value",
            frozen == "W_value",
        )
    with torch.no_grad():
        assert torch.equal(loss, from_hidden(h_base, W_base, h_value, W_value, labels, 0.3, 4)[0])


def test_chunked_of_no_rows_is_zero_with_gradients():
    h_base, W_base, h_value, W_value, labels = heads()
    h_value.requires_grad_(), W_value.requires_grad_()
    loss, metrics = from_hidden(
        h_base, W_base, h_value, W_value, torch.full_like(labels, -100), 1.0
    )
    loss.backward()
    assert loss.item() == 0 and all(value.item() == 0 for value in metrics.values())
    assert h_value.grad.shape == h_value.shape and not h_value.grad.any() and not W_value.grad.any()


def test_an_upstream_gradient_scales_and_only_once():
    results = []
    for scale in (1.0, -2.5):
        h_base, W_base, h_value, W_value, labels = heads()
        h_value.requires_grad_(), W_value.requires_grad_()
        loss, _ = from_hidden(h_base, W_base, h_value, W_value, labels, 0.3, 4)
        (scale * loss).backward(retain_graph=True)
        results.append([h_value.grad.clone(), W_value.grad.clone()])
        with pytest.raises(RuntimeError, match="differentiated once"):
            loss.backward()
    for one, other in zip(*results):
        torch.testing.assert_close(-2.5 * one, other)


def test_under_autocast_products_are_rounded_and_sums_are_not():
    h_base, W_base, h_value, W_value, labels = heads(torch.float32)
    h_value.requires_grad_(), W_value.requires_grad_()
    exact = loss_and_gradients(
        *from_hidden(h_base, W_base, h_value, W_value, labels, 0.3), h_value, W_value
    )
    h_value.grad = W_value.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = from_hidden(h_base, W_base.bfloat16(), h_value, W_value, labels, 0.3, 4)
        rounded = loss_and_gradients(loss, metrics, h_value, W_value)
    assert rounded[0].dtype == rounded[-1].dtype == torch.float32
    for one, other in zip(exact, rounded):
        assert (one - other).norm() <= 0.02 * one.norm()
    assert (exact[-1] - rounded[-1]).norm() > 1e-4 * exact[-1].norm()  # it did compute in bfloat16


def test_a_label_outside_the_vocabulary_is_an_error_here_too():
    h_base, W_base, h_value, W_value, labels = heads(Vb=50, Vv=53)
    labels[1, 1] = 50
    with pytest.raises(ValueError, match="outside 0..49"):
        from_hidden(h_base, W_base, h_value, W_value, labels)


# ---- the kernels


def test_the_kernels_in_the_interpreter():
    triton = pytest.importorskip("triton")
    if (
        np.lib.NumpyVersion(triton.__version__) < "3.7.0"
        and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
    ):
        pytest.skip(
            "the interpreter of this Triton does not run with this NumPy, which takes no array of one number for a number"
        )
    output = interpreted("-m pytest -n 0 -p no:cacheprovider tests/interpreted_kernel.py")
    assert "skipped" not in output and "100%" in output


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_without_spilling(capability, tmp_path, monkeypatch):
    """To machine code, with no GPU: no program's stack holds a byte, wide loads, and the next block fetched early."""
    triton = pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: kernels are interpreted here")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    def compiled(kernel, signature: dict, constants: dict, divisible: bool):
        pointers_and_sizes = [(at,) for at, name in enumerate(signature) if name not in constants]
        attributes = (
            {at: [["tt.divisibility", 16]] for at in pointers_and_sizes} if divisible else {}
        )
        signature = signature | dict.fromkeys(constants, "constexpr")
        source = ASTSource(
            kernel, {name: signature[name] for name in kernel.arg_names}, constants, attributes
        )
        made = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": ivl.WARPS}
        )
        (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
        usage = subprocess.run(
            [cuobjdump, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True
        ).stdout
        assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage
        return made.asm["ptx"]

    constants = dict(BLOCK=ivl.BLOCK, STAGES=ivl.STAGES)
    for dtype, divisible in [("bf16", True), ("fp16", True), ("fp32", True), ("bf16", False)]:
        inputs = dict(z_base=f"*{dtype}", z_delta=f"*{dtype}", labels="*i64", stats="*fp32")
        sizes = dict(base_stride="i32", delta_stride="i32", Vb="i32", Vv="i32")
        outputs = dict(gradient=f"*{dtype}", d_ce="*fp32", d_norm="*fp32")
        forward = compiled(ivl.forward_kernel, inputs | sizes, constants, divisible)
        backward = compiled(ivl.backward_kernel, inputs | outputs | sizes, constants, divisible)
        if divisible:
            # blocks on their way while one is added up, 16 bytes a thread
            assert "cp.async" in forward and "cp.async" in backward
            assert "st.global.v4" in backward


# ---- gradient checkpointing


@pytest.mark.parametrize(
    "loss_of", [train.language_loss, fast.loss.language_loss], ids=["plain", "fast"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_nothing(dtype, loss_of):
    tokens = torch.randint(50, (2, 9))
    results = []
    for forgetful in (False, True):
        llama = small(num_hidden_layers=3)
        llama.model.gradient_checkpointing = forgetful
        calls = []
        llama.model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, _ = loss_of(llama, None, tokens, tokens.roll(-1, 1))
        loss.backward()
        assert len(calls) == 1 + forgetful
        results.append([parameter.grad for parameter in llama.parameters()])
        with torch.no_grad():
            llama(tokens)
        assert len(calls) == 2 + forgetful  # nothing to compute again
    assert all(map(torch.equal, *results))


# ---- what the bench measures


MEMORY = """
import functools, json, torch, bench.loss
from bench.measure import compare
step = functools.partial(functools.partial, bench.loss.from_hidden, N=2048, V=32000, D=256, dtype=torch.float32)
results = compare({"eager": step(bench.loss.eager), "chunked": step(None)}, "cpu", rounds=1, calls=1)
print(json.dumps({name: vars(result) for name, result in results.items()}))
"""


@pytest.mark.slow
def test_chunked_takes_a_quarter_of_the_memory():
    numbers = json.loads(python("-c", MEMORY))
    eager, chunked = numbers["eager"], numbers["chunked"]
    assert chunked["growth"] <= eager["growth"] / 4
    assert (
        eager["growth"] > 4 * 2048 * 32000 * 4
    )  # both logits, at least their sum, and the way back


@pytest.mark.slow
def test_benches_print_their_tables():
    small = "--rows 30 --vocab 100 --hidden 8 --rounds 1".split()
    output = python("-m bench.loss", *small)
    assert output.count("| eager ") == 2
    assert "| value_loss_from_hidden " in output and "failed" not in output
    kernel = interpreted("-m bench.loss --only settings", *small)
    assert kernel.count(" MB at the peak ") == 1 and "| (1024, 4, 4) " in kernel
    assert "failed" not in kernel
    output = python("-m bench.train --tokens 64 --rounds 1")
    assert output.count("| ours") == 2 and "failed" not in output
