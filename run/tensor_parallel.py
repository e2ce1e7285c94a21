"""A base divided between several processes, one for each GPU, to decode with: PyTorch's own tensor parallelism.

    torchrun --nproc_per_node=4 sample.py --base Llama-2-70b-hf --value FOLDER --chat

Each process has some heads of every layer, a part of every MLP and some rows of the vocabulary, and reads no
more than these from the files. Twice a layer the processes add up what they have computed, and at the end each
gets all logits, the same in all of them. What is plugged in stays whole in each. model.py knows nothing of it: what it sees
is a Llama with fewer heads.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from data.checkpoint import EMBEDDING, HEAD, check_weights, explain_mismatch, is_computed
from data.errors import UsageError
from model import Attention, Llama, LlamaConfig, read_config

# A weight is (outputs, inputs). Divided by its outputs it computes a slice of them, from all inputs; divided by its inputs
# it computes a summand of all outputs, from a slice of the inputs, and the processes add up. So a pair of them takes one sum.
BY_OUTPUTS, BY_INPUTS = ColwiseParallel(), RowwiseParallel()
DIVISION = {
    "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),  # rows: tokens of other processes give 0 to the sum
    "model.layers.*.self_attn.q_proj": BY_OUTPUTS, "model.layers.*.self_attn.k_proj": BY_OUTPUTS,
    "model.layers.*.self_attn.v_proj": BY_OUTPUTS, "model.layers.*.self_attn.o_proj": BY_INPUTS,
    "model.layers.*.mlp.gate_proj": BY_OUTPUTS, "model.layers.*.mlp.up_proj": BY_OUTPUTS,
    "model.layers.*.mlp.down_proj": BY_INPUTS,
    "lm_head": ColwiseParallel(output_layouts=Replicate()),  # all logits in every process
}


def load_divided(path: str | Path, dtype: torch.dtype | None, device: str) -> Llama:
    """Llama.from_pretrained, of which this process gets its slice.

    Its config counts the heads that are here. UsageError as there, and where the processes cannot share the heads.
    """
    path = Path(path)
    config = read_config(path)
    check_divisible(path, config, dist.get_world_size())
    with torch.device("meta"):
        llama = Llama(config)
    files = check_weights(path, config.tie_word_embeddings, dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in llama.state_dict().items()}
    explain_mismatch(path, shapes, config.tie_word_embeddings)  # now, since slices all fit
    divide(llama, init_device_mesh(torch.device(device).type, (dist.get_world_size(),)))
    load_slices(llama, files, dtype, device)
    return llama.requires_grad_(False)


def check_divisible(path: Path, config: LlamaConfig, count: int) -> None:
    """UsageError unless each of so many processes can have as many heads, and as much of an MLP, as the others."""
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % count:
            raise UsageError(f"{path}: its {name}, {getattr(config, name)}, cannot be divided between {count} processes")


def divide(llama: Llama, mesh: DeviceMesh) -> None:
    """Make a network, on the meta device, this process's slice of it."""
    parallelize_module(llama, mesh, DIVISION, src_data_rank=None)
    config, count = llama.config, mesh.size()
    llama.config = replace(config, num_attention_heads=config.num_attention_heads // count,
                           num_key_value_heads=config.num_key_value_heads // count)
    for module in llama.modules():
        if isinstance(module, Attention):
            module.heads, module.kv_heads = llama.config.num_attention_heads, llama.config.num_key_value_heads


def load_slices(llama: Llama, files: list[Path], dtype: torch.dtype | None, device: str) -> None:
    """Give it the weights in these files, a slice of each."""
    wanted, tensors = llama.state_dict(), {}
    for file in files:
        with safe_open(file, framework="pt") as shard:
            names = [name for name in shard.keys() if not is_computed(name)]
        for name in names:
            # opened for each tensor anew: what was read of a file stays in memory for as long as that is open
            with safe_open(file, framework="pt") as shard:
                tensors[name] = read_slice(shard.get_slice(name), wanted[name], dtype, device)
    if llama.config.tie_word_embeddings:
        tensors[HEAD] = tensors[EMBEDDING]
    llama.load_state_dict(tensors, strict=True, assign=True)
    llama.tie()


def read_slice(stored, wanted: Tensor, dtype: torch.dtype | None, device: str) -> Tensor:
    """What this process holds of a stored tensor: all of it or, where a DTensor is wanted, a slice in one of its dimensions."""
    if not isinstance(wanted, DTensor):
        return stored[:].to(device, dtype, copy=True)
    mesh, [placement] = wanted.device_mesh, wanted.placements
    # As torch.chunk cuts: equal slices, rounded up, of which the last are shorter, or empty.
    whole = wanted.shape[placement.dim]
    size = -(-whole // mesh.size())
    first, last = [min(whole, size * rank) for rank in (mesh.get_local_rank(), mesh.get_local_rank() + 1)]
    part = stored[first:last] if placement.dim == 0 else stored[:, first:last]
    part = part.to(device, dtype, copy=True).contiguous()
    return DTensor.from_local(part, mesh, wanted.placements, run_check=False, shape=wanted.shape, stride=wanted.stride())
