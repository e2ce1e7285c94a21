"""What commands import before they do anything: bench/startup.py measures the time of that."""

import torch

from model import Llama, without_weights
from tests.helpers import ROOT, fresh, small

NO_TORCH = """import sys, data.capitals, data.chat, data.tiny_world, run.curves
assert "torch" not in sys.modules"""
LOADED = """import sys, sample, run.plug
sample.Guided(sample.Llama.from_pretrained(sys.argv[1])).step(sample.torch.tensor([[1]]))
late = {"torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"}
assert not late & sys.modules.keys(), late & sys.modules.keys()"""


def test_commands_of_data_import_no_torch():
    done = fresh(ROOT, "-c", NO_TORCH)
    assert done.returncode == 0, done.stderr


def test_a_base_is_loaded_without_torchs_compiler_and_without_what_several_processes_take(tmp_path):
    small().save_pretrained(tmp_path)
    done = fresh(ROOT, "-c", LOADED, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_network_without_weights_draws_no_random_numbers():
    config = small().config
    before = torch.get_rng_state()
    with without_weights():
        shapes = {name: tensor.shape for name, tensor in Llama(config).state_dict().items()}
    assert torch.equal(torch.get_rng_state(), before)
    assert shapes == {name: tensor.shape for name, tensor in small().state_dict().items()}
