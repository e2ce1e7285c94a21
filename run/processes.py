"""Several processes, one for each GPU: to train one network by DistributedDataParallel, or FSDP2 with --shard, or to decode.

    torchrun --nproc_per_node=8 train.py --base PATH --value --data chats.json --shard
    torchrun --nproc_per_node=4 sample.py --base PATH --value FOLDER --chat          # the base divided: run/tensor_parallel.py

Every process reads the same batches and computes its own share of their parts. With DDP each holds
the whole network, and gradients are averaged. With --shard each holds a slice of every weight,
gradient and moment, and of the frozen base's weights, and a layer is put together just before it
computes.

The loop in train.py knows OneProcess, whose methods are identities; SeveralProcesses fills them.
While decoding, all processes read the same, compute the same logits and pick the same tokens, and
the first prints them.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from data.errors import UsageError
from ivl import Probe, ValueModel
from model import Llama, without_weights
from train import Objective, OneProcess, Part


@contextmanager
def join_processes(args) -> Iterator["Alone"]:
    """The processes that train together; says what they have computed."""
    if args.shard and "LOCAL_RANK" not in os.environ:
        raise UsageError(
            "--shard divides the weights between processes; start them with torchrun --nproc_per_node=N"
        )
    with join_decoders(args.device, args.shard) as processes:
        yield processes
        seconds = sum(os.times()[:4])  # of this process and those that it started
        print(f"{seconds:.0f} core-seconds (the time that all processor cores worked)")
        if getattr(args, "next", ""):
            print(f"next: {args.next}")


@contextmanager
def join_decoders(device: str | None = None, shard: bool = False) -> Iterator["Alone"]:
    """One process or, under torchrun, this one among the others, with a GPU of its own.

    The first does the talking.
    """
    if "LOCAL_RANK" not in os.environ:
        yield Alone()
        return
    lacking = [
        name
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if name not in os.environ
    ]
    if lacking or not os.environ["LOCAL_RANK"].isdecimal():
        raise UsageError(
            f"LOCAL_RANK is set, as torchrun does, but {', '.join(lacking) or 'to no number'}"
            f"{' is not' if lacking else ''}; unset it, or start with torchrun"
        )
    if device == "mps":
        raise UsageError("--device mps: for one process; start without torchrun")
    device = "cuda" if torch.cuda.is_available() and device != "cpu" else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))
    with contextlib.ExitStack() as stack:  # an error that leaves it can be told
        if dist.get_rank():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield SeveralProcesses(device, shard)
        print(end="", flush=True)
    dist.destroy_process_group()
    os._exit(
        0
    )  # DTensor's caches keep gloo's threads, and one that is still busy when Python ends would abort it


class Alone(OneProcess):
    """What a run's folder and a chat ask of processes, too."""

    def first_does(self, action: Callable[[], None]) -> None:
        """The first process acts, the others wait."""
        action()

    def ask(self, prompt: str) -> str:
        """A line of standard input, which the first process reads for all; EOFError at its end."""
        return input(prompt)

    def own(self, device: str) -> str:
        """Which one of this kind of device is this process's."""
        return device

    def slice_of(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        """What this process holds of a whole tensor that belongs to a parameter."""
        return tensor


class SeveralProcesses(Alone):
    def __init__(self, device: str, shard: bool):
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.device, self.shard = device, shard
        self.parallel: DistributedDataParallel | None = None

    def share_out(self, objective: Objective, dtype: str) -> nn.Module:
        if self.shard:
            return divide(objective, in_bfloat16=dtype == "bfloat16")
        self.parallel = DistributedDataParallel(objective, gradient_as_bucket_view=True)
        return self.parallel

    def mine(self, parts: list[Part]) -> Iterator[Part]:
        """Parts rank, rank + count, ..., padded with parts of no supervised token so that all have the same number.

        Gradients are averaged at the last one of a step.
        """
        tokens, labels, *rewards = parts[0]
        blank = (tokens, torch.full_like(labels, -100), *rewards)
        even = parts + [blank] * (-len(parts) % self.count)
        own = even[self.rank :: self.count]
        for number, part in enumerate(own, 1):
            if self.parallel is not None:
                self.parallel.require_backward_grad_sync = number == len(
                    own
                )  # as DDP's no_sync does
            yield part

    def sum(self, numbers: dict[str, float]) -> dict[str, float]:
        summed = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return dict(zip(numbers, summed.tolist()))

    def whole(self, tensor: Tensor) -> Tensor:
        """Put together from the slices of all processes; all of them have to ask."""
        return tensor.detach().full_tensor() if is_slice(tensor) else tensor.detach()

    def first_does(self, action: Callable[[], None]) -> None:
        """If the first fails, all fail."""
        dist.barrier()  # nobody is still looking at the files
        failure = [None]
        if self.rank == 0:
            try:
                action()
            except (UsageError, OSError, SafetensorError) as error:
                failure = [str(error)]
        dist.broadcast_object_list(failure)
        if failure[0]:
            raise UsageError(failure[0])

    def ask(self, prompt: str) -> str:
        line = [None]
        if self.rank == 0:
            with contextlib.suppress(EOFError):
                line = [input(prompt)]
        dist.broadcast_object_list(line)
        if line[0] is None:
            raise EOFError
        return line[0]

    def own(self, device: str) -> str:
        return (
            f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
        )  # safetensors takes "cuda" for the first

    def divide_base(self, base: Llama) -> Llama:
        return divide(base) if self.shard else base

    def slice_of(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        if not is_slice(parameter):
            return tensor
        from torch.distributed.tensor import distribute_tensor

        tensor = tensor.to(parameter.device)
        return distribute_tensor(
            tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
        )

    def undivided(self, network: Llama | ValueModel) -> Llama | ValueModel:
        """Itself or, where it is sharded, a whole one in every process."""
        if not any(is_slice(parameter) for parameter in network.parameters()):
            return network
        if isinstance(network, ValueModel):
            return ValueModel(self.undivided(network.network), network.info)
        with without_weights():
            if isinstance(network, Llama):
                plain = Llama(network.config)
            else:
                plain = Probe(network.vocab_size, network.gate_proj.out_features)
        plain.load_state_dict(
            {name: self.whole(tensor) for name, tensor in network.state_dict().items()}, assign=True
        )
        if isinstance(plain, Llama):
            plain.tie()
        return plain


def is_slice(tensor: Tensor) -> bool:
    """Whether each process holds a part of it.

    What deals with that is imported late: it takes a second, and one process has no use for it.
    """
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def divide(module: nn.Module, in_bfloat16: bool = False) -> nn.Module:
    """Shard a module in place, layer by layer; the embedding, the head and the rest belong to the module itself.

    in_bfloat16: it computes in bfloat16, with gradients summed in float32.
    """
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    policy = MixedPrecisionPolicy()
    if in_bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layers in [part for part in module.modules() if isinstance(part, nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer, mp_policy=policy)
    fully_shard(
        module, mp_policy=policy, reshard_after_forward=False
    )  # a loss reads lm_head's weight after the forward pass
    if isinstance(module, Llama):
        register_fsdp_forward_method(module, "hidden_and_head")
    return module
