"""A base divided between several processes, one for each GPU, to decode with: tensor parallelism.

    torchrun --nproc_per_node=4 sample.py --base Llama-2-70b-hf --value FOLDER --chat

Each process has some heads of every layer, a part of every MLP and some rows of the vocabulary, and
reads no more than these from the files. Twice a layer the processes add up what they have computed,
and at the end all logits go to all of them. What is plugged in stays whole in each. model.py knows
nothing of it: it sees a Llama with fewer heads, and hooks do the talking.

torch.distributed.tensor.parallel (ColwiseParallel, RowwiseParallel) divides in the same way, but
the tensors that it computes with take 1.8 ms of Python a linear layer under inference_mode, and a
hook 0.02 (torch 2.13, one core, a group of one process): for the 560 layers of a 70B network, a
second a token.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from data.checkpoint import (
    ADAPTER,
    COMPUTED,
    EMBEDDING,
    HEAD,
    check_weights,
    explain_mismatch,
    tie_stored,
)
from data.errors import UsageError
from model import Llama, LlamaConfig, read_config, without_weights

# Weights are (outputs, inputs). A slice of the outputs is computed from all inputs; from a slice of
# the inputs, a summand of all outputs. One of each kind in turn takes one sum over processes.
BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_INPUTS = ("o_proj", "down_proj")


def load_divided(path: str | Path, dtype: torch.dtype | None, device: str) -> Llama:
    """Llama.from_pretrained, of which this process gets its part; logits (B, T, V) come out whole, in all processes the same.

    Its config counts the heads that are here. UsageError as there, and where the processes cannot
    share the heads.
    """
    path = Path(path)
    config, rank, count = read_config(path), dist.get_rank(), dist.get_world_size()
    check_divisible(path, config, count)
    if (path / ADAPTER[0]).exists():
        raise UsageError(
            f"{path}: a LoRA adapter is not merged into a base that is divided; decode in one process, or merge it once: "
            "merge_and_unload() in peft"
        )
    files = check_weights(path, config.tie_word_embeddings, dtype)
    with without_weights():
        shapes = {name: tuple(tensor.shape) for name, tensor in Llama(config).state_dict().items()}
    explain_mismatch(
        path, shapes, config.tie_word_embeddings
    )  # a slice of what is misshapen may fit
    part = replace(
        config,
        num_attention_heads=config.num_attention_heads // count,
        num_key_value_heads=config.num_key_value_heads // count,
        intermediate_size=config.intermediate_size // count,
        vocab_size=rows_of(config, count) + 1,
    )
    with without_weights():
        llama = Llama(part)
    tensors = {}
    for name, file in files_of(files).items():
        wanted = llama.get_parameter(name).shape
        # opened anew for each tensor: what was read of a file counts as this process's memory while
        # that is open
        with safe_open(file, framework="pt") as shard:
            tensors[name] = read_slice(shard.get_slice(name), name, wanted, rank, dtype, device)
    if config.tie_word_embeddings:
        tie_stored(tensors)
    llama.load_state_dict(tensors, strict=True, assign=True)
    llama.tie()
    llama.config = replace(part, vocab_size=config.vocab_size)
    connect(llama, rank, count)
    return llama.requires_grad_(False)


def check_divisible(path: Path, config: LlamaConfig, count: int) -> None:
    """UsageError unless each of so many processes can have as many heads, and as much of an MLP, as the others."""
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % count:
            raise UsageError(
                f"{path}: its {name}, {getattr(config, name)}, cannot be divided between {count} processes"
            )


def rows_of(config: LlamaConfig, count: int) -> int:
    """How many rows of the vocabulary each process has.

    The last one's may be fewer, and are padded.
    """
    return -(-config.vocab_size // count)


# --------------------------------------------------------------------------------------------------
# From the files


def files_of(files: list[Path]) -> dict[str, Path]:
    """The file that each tensor is in."""
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as shard:
            found |= {name: file for name in shard.keys() if not COMPUTED.search(name)}
    return found


def read_slice(
    stored, name: str, shape: tuple[int, ...], rank: int, dtype: torch.dtype | None, device: str
) -> Tensor:
    """This process's slice of a stored tensor, of this shape, or all of it: the norms' weights.

    Of the vocabulary it has the rows that there are, padded with zeros, and always one more of
    zeros. The bias of o_proj is added in one process alone, since the outputs of all are added up.
    """
    module = name.split(".")[-2]
    if name in (EMBEDDING, HEAD):
        rows, V = shape[0] - 1, stored.get_shape()[0]
        part = stored[min(rank * rows, V) : min((rank + 1) * rows, V)]
    elif module in BY_OUTPUTS:  # weights and biases
        part = stored[rank * shape[0] : (rank + 1) * shape[0]]
    elif module in BY_INPUTS and len(shape) == 1:
        part = stored[:] if rank == 0 else torch.zeros_like(stored[:])
    elif module in BY_INPUTS:
        part = stored[:, rank * shape[1] : (rank + 1) * shape[1]]
    else:
        part = stored[:]
    tensor = torch.zeros(shape, dtype=dtype or part.dtype, device=device)
    tensor[: len(part)] = part
    return tensor


# --------------------------------------------------------------------------------------------------
# What the processes tell each other


def connect(llama: Llama, rank: int, count: int) -> None:
    """Hooks that put together what the processes compute."""
    rows = rows_of(llama.config, count)  # and behind them the row of zeros

    def own_rows(_, arguments: tuple[Tensor]) -> Tensor:
        """Where tokens (B, T) stand here; those of other processes at the row of zeros."""
        tokens = arguments[0] - rank * rows
        return torch.where((tokens >= 0) & (tokens < rows), tokens, rows)

    def add_up(_, arguments, summand: Tensor) -> Tensor:
        dist.all_reduce(summand)
        return summand

    def gather(_, arguments, own: Tensor) -> Tensor:
        """Logits (..., rows + 1) of each process to (..., V)."""
        parts = [torch.empty_like(own) for _ in range(count)]
        dist.all_gather(parts, own)
        return torch.cat([part[..., :rows] for part in parts], dim=-1)[
            ..., : llama.config.vocab_size
        ]

    llama.model.embed_tokens.register_forward_pre_hook(own_rows)
    llama.lm_head.register_forward_hook(gather)
    adding = [llama.model.embed_tokens]
    for layer in llama.model.layers:
        adding += [layer.self_attn.o_proj, layer.mlp.down_proj]
    for module in adding:
        module.register_forward_hook(add_up)
