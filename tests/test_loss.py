"""The loss at full size: chunked heads, the Triton kernel interpreted and compiled, memory; bench/loss.py."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import ivl
from ivl import ivl_loss, ivl_loss_from_hidden
from tests.helpers import python, small

# ---- chunked heads


def heads(dtype=torch.float64, Vb=53, Vv=50) -> tuple[torch.Tensor, ...]:
    """Hidden states (3, 7, D) and heads of two networks, and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(0)
    h_base, h_value = [torch.randn(3, 7, D, generator=generator, dtype=dtype) for D in (12, 16)]
    W_base, W_value = [torch.randn(V, D, generator=generator, dtype=dtype) for V, D in ((Vb, 12), (Vv, 16))]
    labels = torch.randint(min(Vb, Vv), (3, 7), generator=generator)
    labels[0, :4] = labels[2, 5] = -100
    return h_base, W_base, h_value, W_value, labels


def loss_and_gradients(loss: torch.Tensor, metrics: dict, *leaves: torch.Tensor) -> list[torch.Tensor]:
    loss.backward()
    return [loss.detach(), *metrics.values(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
@pytest.mark.parametrize("l1", [0.0, 0.7])
@pytest.mark.parametrize("with_base, Vb, Vv", [(False, 50, 50), (True, 50, 50), (True, 53, 50), (True, 50, 53)])
def test_chunked_is_unchunked(with_base, Vb, Vv, l1, chunk):
    results = []
    for chunked in (False, True):
        h_base, W_base, h_value, W_value, labels = heads(torch.float32, Vb, Vv)
        h_base.requires_grad_(), W_base.requires_grad_(), h_value.requires_grad_(), W_value.requires_grad_()
        if chunked:
            base = (h_base, W_base) if with_base else (None, None)
            found = ivl_loss_from_hidden(*base, h_value, W_value, labels, l1, chunk)
        else:
            found = ivl_loss(h_base @ W_base.T if with_base else None, h_value @ W_value.T, labels, l1)
        results.append(loss_and_gradients(*found, h_value, W_value))
        assert h_base.grad is None and W_base.grad is None  # stop_gradient
    for unchunked, chunked in zip(*results):
        torch.testing.assert_close(chunked, unchunked, rtol=1e-5, atol=1e-6)


def test_the_usual_chunk_has_as_many_rows_as_keep_logits_few():
    seen = []
    original = ivl.loss_and_gradient
    try:
        ivl.loss_and_gradient = lambda z_base, z_delta, *rest: seen.append(len(z_delta)) or original(z_base, z_delta, *rest)
        h, W = torch.randn(200, 8), torch.randn(32000, 8)
        ivl_loss_from_hidden(None, None, h, W, torch.randint(32000, (200,)))
    finally:
        ivl.loss_and_gradient = original
    assert seen == [75, 75, 50]


@pytest.mark.parametrize("frozen", ["h_value", "W_value", "both"])
def test_what_is_frozen_gets_no_gradient(frozen):
    h_base, W_base, h_value, W_value, labels = heads()
    h_value.requires_grad_(frozen == "W_value"), W_value.requires_grad_(frozen == "h_value")
    loss, _ = ivl_loss_from_hidden(h_base, W_base, h_value, W_value, labels, 0.3, 4)
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
        assert (h_value.grad is None, W_value.grad is None) == (frozen == "h_value", frozen == "W_value")
    with torch.no_grad():
        assert torch.equal(loss, ivl_loss_from_hidden(h_base, W_base, h_value, W_value, labels, 0.3, 4)[0])


def test_chunked_with_every_row_ignored_is_zero_with_gradients():
    h_base, W_base, h_value, W_value, labels = heads()
    h_value.requires_grad_(), W_value.requires_grad_()
    loss, metrics = ivl_loss_from_hidden(h_base, W_base, h_value, W_value, torch.full_like(labels, -100), 1.0)
    loss.backward()
    assert loss.item() == 0 and all(value.item() == 0 for value in metrics.values())
    assert h_value.grad.shape == h_value.shape and not h_value.grad.any() and not W_value.grad.any()


def test_an_upstream_gradient_scales_and_only_once():
    results = []
    for scale in (1.0, -2.5):
        h_base, W_base, h_value, W_value, labels = heads()
        h_value.requires_grad_(), W_value.requires_grad_()
        loss, _ = ivl_loss_from_hidden(h_base, W_base, h_value, W_value, labels, 0.3, 4)
        (scale * loss).backward(retain_graph=True)
        results.append([h_value.grad.clone(), W_value.grad.clone()])
        with pytest.raises(RuntimeError, match="differentiated once"):
            loss.backward()
    for one, other in zip(*results):
        torch.testing.assert_close(-2.5 * one, other)


def test_under_autocast_products_are_rounded_and_sums_are_not():
    h_base, W_base, h_value, W_value, labels = heads(torch.float32)
    h_value.requires_grad_(), W_value.requires_grad_()
    exact = loss_and_gradients(*ivl_loss_from_hidden(h_base, W_base, h_value, W_value, labels, 0.3), h_value, W_value)
    h_value.grad = W_value.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss_and_gradients(*ivl_loss_from_hidden(h_base, W_base.bfloat16(), h_value, W_value, labels, 0.3, 4), h_value, W_value)
    assert rounded[0].dtype == rounded[-1].dtype == torch.float32
    for one, other in zip(exact, rounded):
        assert (one - other).norm() <= 0.02 * one.norm()
    assert (exact[-1] - rounded[-1]).norm() > 1e-4 * exact[-1].norm()  # it did compute in bfloat16


def test_a_label_outside_the_vocabulary_is_an_error_here_too():
    h_base, W_base, h_value, W_value, labels = heads(Vb=50, Vv=53)
    labels[1, 1] = 50
    with pytest.raises(ValueError, match="outside 0..49"):
        ivl_loss_from_hidden(h_base, W_base, h_value, W_value, labels)


# ---- the kernel


def test_the_kernel_in_the_interpreter():
    pytest.importorskip("triton")
    output = python("-m", "pytest", "-p", "no:cacheprovider", "tests/interpreted_kernel.py", TRITON_INTERPRET="1")
    assert "skipped" not in output and "100%" in output


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_without_spilling(capability, tmp_path, monkeypatch):
    """To machine code, with no GPU: no program's stack holds a byte, wide loads, and the next block fetched early."""
    triton = pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: kernels are interpreted here")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    def compiled(kernel, signature: dict, constants: dict, divisible: bool):
        pointers_and_sizes = [(at,) for at, name in enumerate(signature) if "scale" not in name and name not in constants]
        attributes = {at: [["tt.divisibility", 16]] for at in pointers_and_sizes} if divisible else {}
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, attributes)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": ivl.WARPS})
        (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
        usage = subprocess.run([cuobjdump, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True).stdout
        assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage
        return made.asm["ptx"]

    for dtype, divisible, has_base, has_gradient in [("bf16", True, True, True), ("fp16", True, True, True), ("fp32", True, True, True),
                                                     ("bf16", False, True, True), ("bf16", True, False, True), ("bf16", True, True, False)]:
        signature = dict(z_base=f"*{dtype}", z_delta=f"*{dtype}", labels="*i64", gradient=f"*{dtype}", stats="*fp32", base_stride="i32",
                         delta_stride="i32", gradient_stride="i32", Vb="i32", Vv="i32", ce_scale="fp32", l1_scale="fp32")
        constants = dict(HAS_BASE=has_base, HAS_GRADIENT=has_gradient, BLOCK=ivl.BLOCK, STAGES=ivl.STAGES)
        ptx = compiled(ivl.loss_kernel, signature, constants, divisible)
        if divisible:
            assert "cp.async" in ptx  # blocks on their way while one is added up, 16 bytes a thread
            assert not has_gradient or "st.global.v4" in ptx
    compiled(ivl.scale_kernel, dict(x="*bf16", factor="*fp32", size="i32"), dict(BLOCK=ivl.BLOCK), True)


# ---- gradient checkpointing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_nothing(dtype):
    tokens = torch.randint(50, (2, 9))
    results = []
    for forgetful in (False, True):
        llama = small(num_hidden_layers=3)
        llama.model.gradient_checkpointing = forgetful
        calls = []
        llama.model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, _ = ivl_loss_from_hidden(None, None, *llama.hidden_and_head(tokens), tokens.roll(-1, 1))
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
step = functools.partial(functools.partial, bench.loss.from_hidden, bench.loss.eager, N=2048, V=32000, D=256, dtype=torch.float32)
results = compare({"eager": step(chunked=False), "chunked": step(chunked=True)}, "cpu", rounds=2, calls=1)
print(json.dumps({name: vars(result) for name, result in results.items()}))
"""


def test_chunked_takes_a_quarter_of_the_memory_and_no_more_time():
    numbers = json.loads(python("-c", MEMORY, OMP_NUM_THREADS="2"))
    eager, chunked = numbers["eager"], numbers["chunked"]
    assert chunked["growth"] <= eager["growth"] / 4
    assert eager["growth"] > 4 * 2048 * 32000 * 4  # both logits, at least their sum, and the way back
    assert min(ours / theirs for ours, theirs in zip(chunked["seconds"], eager["seconds"])) <= 1.1


@pytest.mark.slow
def test_benches_print_their_tables(tmp_path):
    output = python("-m", "bench.loss", "--rows", "30", "--vocab", "100", "--hidden", "8", "--rounds", "1", "--json", tmp_path / "loss.json")
    assert output.count("| eager ") == 2 and "ivl_loss_from_hidden" in output and "failed" not in output
    numbers = json.loads((tmp_path / "loss.json").read_text())
    assert numbers["sizes"][0]["from_hidden"]["ivl_loss_from_hidden"]["seconds"]
    output = python("-m", "bench.train", "--tokens", "64", "--rounds", "1")
    assert output.count("| ours") == 2 and "failed" not in output
