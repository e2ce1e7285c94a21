"""What two processes together leave in .grad, against one process; test_distributed.py starts it with torchrun.

Final weights would hide a wrong scale: Adam's steps do not depend on the gradient's size.
"""

import sys

import torch
import torch.distributed as dist

from tests.helpers import small, value_network
from train import Objective, accumulate_gradient, divide, share_out, whole


def parts_of_a_step() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three parts for two processes, so one process gets a blank one; one part has no supervised token."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = [torch.randint(50, (4, 9), generator=generator) for _ in range(2)]
    labels[0, :7] = labels[3] = -100
    return [(tokens[:1], labels[:1]), (tokens[1:3], labels[1:3]), (tokens[3:], labels[3:])]


def gradients(scheme: str, shard: bool, checkpointing: bool) -> tuple[dict[str, float], list[torch.Tensor]]:
    network, base = value_network(scheme) if scheme else small(num_hidden_layers=2), small(vocab_size=53) if scheme else None
    for llama in [network] if not scheme else network.llamas:
        llama.model.gradient_checkpointing = checkpointing
    objective = share_out(network, 0.3, shard, "float32") if dist.is_initialized() else Objective(network, 0.3)
    if shard:
        base = base and divide(base.requires_grad_(False))
    for _ in range(2):  # the second time over what the first has left behind
        objective.zero_grad(set_to_none=True)
        metrics = accumulate_gradient(objective, base, parts_of_a_step(), "float32")
    return metrics, [whole(parameter.grad) for parameter in network.parameters()]


def main():
    kinds = [(scheme, checkpointing) for scheme in ["residual", "cascade", "cascade+", "probe", ""] for checkpointing in (False, True)]
    alone = {kind: gradients(kind[0], False, kind[1]) for kind in kinds}
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    for kind in kinds:
        for shard in (False, True):
            metrics, found = gradients(kind[0], shard, kind[1])
            for name, value in alone[kind][0].items():
                assert abs(metrics[name] - value) < 1e-5 * max(1, abs(value)), (kind, shard, name, metrics, alone[kind][0])
            for ours, theirs in zip(found, alone[kind][1], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=f"{kind} {shard}")
            if dist.get_rank() == 0:
                print("same", *kind, "sharded" if shard else "whole", file=sys.stderr)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
