#!/bin/sh
# transformers 5.24.0: a config.json with rope_parameters and rope_scaling loses the first, theta too, without a word.
#
# transformers 5 keeps theta and the scaling together under rope_parameters. Who adds the older rope_scaling to stretch a
# context, as model cards say, gets a model with theta 10000 instead of the one in the file: rope_scaling replaces the whole
# of rope_parameters, and what is missing in it is filled with the default. No warning, no error; the logits differ.
#
# Output: the theta that the file gives, and the one that the configuration has.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0
cd "$folder"
venv/bin/python - <<'PY'
import json
from transformers import AutoConfig

wanted = {"rope_type": "default", "rope_theta": 500000.0}
for scaling in (None, {"rope_type": "linear", "factor": 2.0}):
    with open("config.json", "w") as file:
        json.dump({"model_type": "llama", "rope_parameters": wanted, "rope_scaling": scaling}, file)
    found = AutoConfig.from_pretrained(".").rope_parameters
    print(f"rope_scaling {scaling}: theta is {found['rope_theta']}, in the file {wanted['rope_theta']}")
    expected = 500000.0 if scaling is None else 10000.0
    if found["rope_theta"] != expected:
        raise SystemExit("this has changed")
PY
