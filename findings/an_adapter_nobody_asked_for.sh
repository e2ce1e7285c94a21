#!/bin/sh
# transformers 5.24.0, peft 0.21.2, torch 2.13.0: the same from_pretrained computes something else where peft is installed.
#
# A folder with a whole model and a LoRA adapter beside it (training scripts leave such folders) is loaded by
# AutoModelForCausalLM.from_pretrained with the adapter added to the model. Where peft is not installed, the same call on the
# same folder loads the model without it. Neither says a word: the logits depend on what else is installed.
#
# Output: the largest difference between the logits of the same folder with peft and without it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
cat > make.py <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48,
                                     num_hidden_layers=2, num_attention_heads=4))
model.save_pretrained("both")
lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
get_peft_model(model, lora).save_pretrained("both")
PY
cat > load.py <<'PY'
import sys
import torch
from transformers import AutoModelForCausalLM

with torch.no_grad():
    logits = AutoModelForCausalLM.from_pretrained("both")(torch.arange(10)[None]).logits
torch.save(logits, sys.argv[1])
PY
venv/bin/python make.py
venv/bin/python load.py with.pt > with.txt 2>&1
venv/bin/pip uninstall -q -y peft
venv/bin/python load.py without.pt > without.txt 2>&1
venv/bin/python - <<'PY'
import torch

difference = (torch.load("with.pt") - torch.load("without.pt")).abs().max().item()
said = [line for name in ("with", "without") for line in open(f"{name}.txt")
        if "adapter" in line.lower() or "peft" in line.lower()]
print(f"logits differ by up to {difference:.3f}; said about adapters: {said}")
if difference < 0.001 or said:
    raise SystemExit("this has changed")
PY
