#!/bin/sh
# safetensors 0.8.0, torch 2.13.0: tensors that were loaded change when their file is overwritten in place.
#
# load_file and safe_open's get_tensor hand out tensors whose memory is the file, mapped. A program that serves a model goes
# on with other weights as soon as somebody copies a new checkpoint over the old one, file by file; no call of its own does
# that. It happens after the file was closed, too, and by get_slice as well. A copy (clone, or to(copy=True)) is safe.
#
# Output: a weight as it was loaded, and what it is after the file was overwritten.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 safetensors==0.8.0 numpy packaging
cd "$folder"
venv/bin/python - <<'PY'
import shutil
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

for number in (1.0, 2.0):
    save_file({"weight": torch.full((1000, 1000), number)}, f"{number:g}.safetensors")
loaded = load_file("1.safetensors")["weight"]
with safe_open("1.safetensors", framework="pt") as file:
    got, copied = file.get_tensor("weight"), file.get_tensor("weight").clone()
before = loaded[-1, -1].item()
shutil.copyfile("2.safetensors", "1.safetensors")
print(f"loaded {before}; after a copy over the file: load_file {loaded[-1, -1]}, get_tensor {got[-1, -1]}, cloned {copied[-1, -1]}")
if (before, loaded[-1, -1].item(), got[-1, -1].item(), copied[-1, -1].item()) != (1, 2, 2, 1):
    raise SystemExit("this has changed")
PY
