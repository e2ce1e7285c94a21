"""The device that networks compute on, and the dtype.

python sample.py --device cpu --dtype bfloat16
"""

import os

import torch

from data.errors import UsageError
from model import Llama, LlamaConfig


def pick_device(dtype: str | None, tiny: bool, wanted: str | None = None) -> tuple[str, str]:
    """The device and the dtype that were asked for, or their defaults; both are printed with the reason.

    Tiny networks get one thread on a CPU: the numbers are then the same on any number of cores. Two
    threads are 1.4 to 1.6 times as fast on a quiet machine, and many times slower on a busy one.
    """
    device, reason = find_device(wanted)
    default, why = "float32", "the default there"
    if not tiny and device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        default = "bfloat16"
    elif not tiny and device != "cuda" and cpu_has_bf16():
        default = "bfloat16"
        if device == "cpu":
            why = "which this processor computes with"
    if dtype:
        why = "as asked"
    threads = ""
    if device == "cpu":
        if tiny and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
        threads = f", threads {torch.get_num_threads()} (set OMP_NUM_THREADS to change it)"
    print(f"device {device} ({reason}), dtype {dtype or default} ({why}){threads}")
    return device, dtype or default


def find_device(wanted: str | None) -> tuple[str, str]:
    """A device that is there and computes rightly, the one asked for if any, and why it is this one."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(wanted, True):
        raise UsageError(f"--device {wanted}: torch {torch.__version__} finds none on this machine")
    if wanted == "mps":
        if agrees_with_cpu("mps"):
            return "mps", "as asked; nobody has tested it"
        return (
            "cpu",
            "mps was asked for, but a small network gets other logits there than on the CPU",
        )
    if wanted == "cpu":
        return "cpu", "as asked"
    if there["cuda"]:
        return "cuda", torch.cuda.get_device_name()
    return "cpu", "no CUDA device here"


@torch.random.fork_rng(devices=[])
def agrees_with_cpu(device: str) -> bool:
    """Whether a small network, trained for three steps on the device, has the logits that a CPU gives it.

    Some versions of torch have trained wrongly on mps and said nothing.
    """
    tokens, logits = torch.arange(64).view(4, 16), []
    for place in ("cpu", device):
        torch.manual_seed(0)
        llama = Llama(LlamaConfig(64, 32, 64, 2, 4, 2)).to(place)
        optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-2, fused=True)
        for _ in range(3):
            z = llama(tokens.to(place))  # (4, 16, V)
            z.log_softmax(-1)[:, :-1].gather(
                -1, tokens[:, 1:, None].to(place)
            ).mean().neg().backward()
            optimizer.step()
            optimizer.zero_grad()
        logits.append(llama(tokens.to(place)).detach().cpu())
    return torch.allclose(*logits, rtol=1e-2, atol=1e-2)


def cpu_has_bf16() -> bool:
    """Whether the processor has instructions for bfloat16.

    AVX512-BF16 or AMX. Without them it is slower than float32.
    """
    return any(
        getattr(torch.cpu, name, lambda: False)()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
