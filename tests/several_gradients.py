"""What two processes together leave in .grad, against one process; test_distributed.py starts it with torchrun.

Final weights would hide a wrong scale: Adam's steps do not depend on the gradient's size.
"""

import itertools
import sys
from functools import partial

import torch
import torch.distributed as dist

import fast.loss
from ivl import SCHEMES, ValueModel
from run.processes import SeveralProcesses
from tests.helpers import small, value_network
from train import (
    Objective,
    OneProcess,
    accumulate_gradient,
    count_answer_pairs,
    count_supervised,
    language_loss,
)

FULL = "full"  # in a scheme's place: a network by itself
PAIRS, TEACHER = "pairs", "teacher"  # and a residual value network by these losses


def parts_of_a_step(rows: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three parts for two processes, so one process gets a blank one; one part has no supervised token.

    `rows` is 2 for pairs.
    """
    generator = torch.Generator().manual_seed(0)
    tokens, labels = [torch.randint(50, (4 * rows, 9), generator=generator) for _ in range(2)]
    labels[0, :7] = labels[3 * rows :] = -100
    return list(zip(tokens.split([rows, 2 * rows, rows]), labels.split([rows, 2 * rows, rows])))


def gradients(
    scheme: str, checkpointing: bool, twin: str, processes: OneProcess
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """A step's metrics and the gradient of every parameter, with a plain loss or a fast one."""
    if scheme == FULL:
        network, base = small(num_hidden_layers=2), None
        llamas, loss = [network], language_loss if twin == "plain" else fast.loss.language_loss
    elif scheme in (PAIRS, TEACHER):
        network, base = value_network("residual"), small(vocab_size=53).requires_grad_(False)
        teacher = small(hidden_size=16).requires_grad_(False)
        if isinstance(processes, SeveralProcesses):
            teacher = processes.divide_base(teacher)
        of_teacher = partial(
            ValueModel.teacher_loss if twin == "plain" else fast.loss.teacher_loss, teacher=teacher
        )
        llamas, loss = (
            network.llamas,
            partial(ValueModel.pair_loss, beta=0.5) if scheme == PAIRS else of_teacher,
        )
    else:
        network, base = value_network(scheme), small(vocab_size=53).requires_grad_(False)
        llamas, loss = (
            network.llamas,
            partial(ValueModel.loss if twin == "plain" else fast.loss.value_loss, l1=0.3),
        )
    for llama in llamas:
        llama.model.gradient_checkpointing = checkpointing
    objective = processes.share_out(Objective(network, loss), "float32")
    if base is not None and isinstance(processes, SeveralProcesses):
        base = processes.divide_base(base)
    for _ in range(2):  # the second time over what the first has left behind
        objective.zero_grad(set_to_none=True)
        parts, count = (
            (parts_of_a_step(2), count_answer_pairs)
            if scheme == PAIRS
            else (parts_of_a_step(), count_supervised)
        )
        metrics = accumulate_gradient(objective, base, parts, "float32", processes, count)
    return metrics, [processes.whole(parameter.grad) for parameter in network.parameters()]


def main():
    kinds = list(itertools.product([*SCHEMES, FULL, PAIRS, TEACHER], [False, True]))
    alone = {kind: gradients(*kind, "plain", OneProcess()) for kind in kinds}
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    for kind, twin, shard in itertools.product(kinds, ["plain", "fast"], [False, True]):
        metrics, found = gradients(*kind, twin, SeveralProcesses("cpu", shard))
        expected, exact = alone[kind]
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert abs(metrics[name] - value) < 1e-5 * max(1, abs(value)), (
                kind,
                twin,
                shard,
                name,
                metrics,
                expected,
            )
        for ours, theirs in zip(found, exact, strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-4, atol=1e-6, msg=f"{kind} {twin} {shard}"
            )
        if dist.get_rank() == 0:
            print("same", *kind, twin, "sharded" if shard else "whole", file=sys.stderr)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
