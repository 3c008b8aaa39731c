#!/usr/bin/env bash
# lm-eval 0.4.13: a task with a test_split and no other split draws its few-shot examples from the
# tested items, and does not leave the tested item out. So some prompts hold the question that is
# asked with its answer before it, and a model that copies is right there.
#
# Input: 40 questions in a JSONL file, test_split alone, num_fewshot: 5; once as it is, once with
# fewshot_split: test beside it.
# Seen with lm-eval 0.4.13, datasets 5.2.0:
#   without fewshot_split 8 of 40 prompts hold the tested question with its answer
#   with fewshot_split 0 of 40 prompts hold the tested question with its answer
# Source: ConfigurableTask.fewshot_context in lm_eval/api/task.py gives the sampler the tested item
# only where fewshot_cfg.split == config.test_split. Without fewshot_split that is None == "test",
# although Task.fewshot_docs has taken the test documents for want of others.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet lm-eval==0.4.13 datasets==5.2.0
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" "$folder/venv/bin/python" - <<'PYTHON' 2>stderr | tee seen || { cat stderr; exit 1; }
import json
from pathlib import Path

from lm_eval.tasks import TaskManager

items = [{"question": f"Q{n:02}?", "answer": f"A{n:02}"} for n in range(40)]
Path("items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
for name, more in (("without", {}), ("with", {"fewshot_split": "test"})):
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "num_fewshot": 5,
        **more,
    }
    Path(f"{name}.yaml").write_text(json.dumps(task))
    loaded = TaskManager(include_defaults=False).load([f"{name}.yaml"])["tasks"][name]
    loaded.set_fewshot_seed(1234)
    loaded.build_all_requests()
    held = sum(
        f"{one.doc['question']} {one.doc['answer']}" in one.args[0] for one in loaded.instances
    )
    print(f"{name} fewshot_split {held} of 40 prompts hold the tested question with its answer")
PYTHON
grep -qx "without fewshot_split 8 of 40 prompts hold the tested question with its answer" seen &&
    grep -qx "with fewshot_split 0 of 40 prompts hold the tested question with its answer" seen
