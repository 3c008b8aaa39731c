#!/usr/bin/env bash
# datasets 5.2.0: load_dataset("json") gives other values than the file has: a text that reads as a
# date becomes a time, and an integer beside a fraction becomes a fraction.
#
# Input: JSON lines with texts that read as dates, and with 7 beside 7.5.
# Seen with datasets 5.2.0, pyarrow 25.0.1:
#   "2024-01-01" becomes 2024-01-01 00:00:00
#   7 becomes 7.0
# Source: Json._generate_tables in datasets/packaged_modules/json/json.py reads with
# pyarrow.json.read_json, which infers timestamps, and one type for the numbers of a column.
# Texts are kept where features=Features({"answer": Value("string")}) is given; then 7 is "7".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==25.0.1
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" "$folder/venv/bin/python" - <<'PYTHON' 2>stderr | tee seen || { cat stderr; exit 1; }
import json
from pathlib import Path

from datasets import load_dataset

for name, values in (("dates", ["2024-01-01", "2024-01-02"]), ("numbers", [7, 7.5])):
    rows = "".join(json.dumps({"answer": value}) + "\n" for value in values)
    Path(f"{name}.jsonl").write_text(rows)
    found = load_dataset("json", data_files={"test": f"{name}.jsonl"})["test"]
    print(json.dumps(values[0]), "becomes", found[0]["answer"])
PYTHON
grep -qx '"2024-01-01" becomes 2024-01-01 00:00:00' seen && grep -qx "7 becomes 7.0" seen
