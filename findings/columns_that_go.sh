#!/bin/sh
# datasets 5.2.0: a field that the first record lacks is lost; one inside a list of objects is added to all, as null.
#
# Dataset.from_list takes its columns from the first record. What later records have under other names (conversations, where
# the first has messages) is dropped without a word, and the rest of such a record is null. Inside a list of objects it is
# the other way round: each object gets all fields that any of them has. to_json writes the nulls. A reader that asks
# whether a field is there takes the wrong branch.
#
# Output: the records as they were given, and as they come out of the file.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0
cd "$folder"
HF_HOME="$folder/home" venv/bin/python - <<'PY'
import json
from datasets import Dataset, disable_progress_bars

disable_progress_bars()
given = [
    {"messages": [{"role": "user", "content": "q"}]},
    {"conversations": [{"from": "human", "value": "q"}]},
    {"messages": [{"role": "assistant", "content": "a", "tool": {"name": "x"}}]},
]
Dataset.from_list(given).to_json("data.jsonl")
found = [json.loads(line) for line in open("data.jsonl")]
for one, other in zip(given, found):
    print("given:", one, "found:", other)
expected = {"messages": [{"role": "user", "content": "q", "tool": None}]}
if found[0] != expected or found[1] != {"messages": None}:
    raise SystemExit("this has changed")
PY
