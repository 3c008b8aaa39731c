"""Scores that nobody wants any more: their command has ended, and shut Ray down."""

import pytest
import ray

from lrmc_ray.config import ResourceSettings
from lrmc_ray.errors import EvaluationError
from lrmc_ray.evaluate.processes import ScoredModel, score_in_tasks
from lrmc_ray.evaluate.request import KeptApart, ScoreRequest
from lrmc_ray.files.place import LocalPlace


def test_ray_is_not_started_again(tmp_path, monkeypatch):
    """Whatever is asked of it would start it."""
    assert not ray.is_initialized()

    def start(*_, **__):
        raise AssertionError("Ray is started")

    monkeypatch.setattr(ray, "init", start)
    request = ScoreRequest(
        tasks=(("wordnet", "general"),),
        batch_tokens=64,
        precision="fp32",
        limit=2,
        split="dev",
        kept=KeptApart(0.5, 0),
        drift_samples={},
        drift_texts=None,
        template_options={},
    )
    model = ScoredModel(tmp_path, LocalPlace(), is_base=True)
    with pytest.raises(EvaluationError, match="scoring was given up"):
        score_in_tasks(model, [request], ResourceSettings(), tmp_path, lambda: False)
    assert not ray.is_initialized()
