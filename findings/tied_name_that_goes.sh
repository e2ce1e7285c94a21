#!/bin/sh
# safetensors 0.8.0, torch 2.13.0: save_model drops the name of a tied weight under which others look for it.
#
# Of two names of one tensor, save_model keeps the one that comes first in alphabetical order, not the one that the module
# made first. A language model whose lm_head is tied to model.embed_tokens is stored as lm_head.weight alone, where
# save_pretrained of transformers stores model.embed_tokens.weight alone. A loader that knows one convention finds no
# embedding in files of the other. The name that went stands in the file's metadata only.
#
# Output: the names in the file, and its metadata.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 safetensors==0.8.0 numpy packaging
cd "$folder"
venv/bin/python - <<'PY'
import torch
from safetensors import safe_open
from safetensors.torch import save_model


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(5, 3)})
        self.lm_head = torch.nn.Linear(3, 5, bias=False)
        self.lm_head.weight = self.model["embed_tokens"].weight


save_model(Model(), "model.safetensors")
with safe_open("model.safetensors", framework="pt") as file:
    names, about = list(file.keys()), file.metadata()
print("stored:", names, "metadata:", about)
if names != ["lm_head.weight"] or about.get("model.embed_tokens.weight") != "lm_head.weight":
    raise SystemExit("this has changed")
PY
