"""A search whose tau is larger than what was recorded: said in one line, then recorded again."""

import json
import subprocess
import sys

import pytest

from tests.support.tiny import make_data


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_search_says_why_it_records_again(tiny_model, tmp_path):
    data = str(make_data(tmp_path / "train.jsonl"))
    common = ["--model", str(tiny_model), "--train-data", data, "--output", str(tmp_path / "runs")]

    def run(name, *options):
        words = [sys.executable, "-m", "lrmc_ray", name, *common, *options]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return " ".join(done.stderr.split())

    tasks = ["--domain-tasks", "capitals", "--general-tasks", "plain_english"]
    search = ["--space", "smoke", *tasks, "evaluate.limit=4", "search.trials=2"]
    assert "once more" not in run("record", "record.tau=0.99")
    said = run("tune", *search)
    assert said.count("tau 0.999 (there 0.99) is asked for now, so they are recorded once mo") == 1
    assert "record once with the largest that you need" in said
    found = (tmp_path / "runs" / "records").glob("*/manifest.json")
    taus = [json.loads(path.read_text())["identity"]["tau"] for path in found]
    assert sorted(taus) == [0.99, 0.999]
    assert "once more" not in run("tune", *search, "search.trials=3")
