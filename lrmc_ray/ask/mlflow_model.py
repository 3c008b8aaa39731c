"""A tuned model's directory as MLflow takes models: ``mlflow models serve -m best_model``.

The directory stays the Hugging Face directory that it is. Beside its files is ``MLmodel``, which
names this module; weights are neither copied nor written in another form. (MLflow 3.17's
transformers flavour cannot save what transformers 5 has written.)
"""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from lrmc_ray.ask.answering import Answerer, Generation
from lrmc_ray.ask.questions import question_of, with_system
from lrmc_ray.files.artifacts import write_atomically
from lrmc_ray.files.origin import read_origin
from lrmc_ray.record.taught_system import taught_system

MLMODEL = "MLmodel"
MAX_NEW_TOKENS = 128
_LONGEST = {"name": "max_new_tokens", "type": "long", "default": MAX_NEW_TOKENS, "shape": None}


def write_mlmodel(directory: Path) -> None:
    """Let MLflow load a model's directory, whose origin is written there already."""
    import yaml

    content = {
        "flavors": {
            "python_function": {
                "loader_module": __name__,
                "data": ".",
                "python_version": platform.python_version(),
            }
        },
        "mlflow_version": importlib.metadata.version("mlflow"),
        # MLflow hands on what a request says as `params` only where a signature names it.
        "signature": {"inputs": None, "outputs": None, "params": json.dumps([_LONGEST])},
    }
    write_atomically(directory / MLMODEL, yaml.safe_dump(content).encode())


def _load_pyfunc(path: str) -> "Answering":
    """What MLflow calls; the name is its own."""
    return Answering(Path(path))


class Answering:
    """The model as MLflow asks it: one answer for every prompt, as ``lrmc chat`` gives it."""

    def __init__(self, directory: Path) -> None:
        origin = read_origin(directory)
        self._system = None if origin is None else taught_system(origin.data)
        self._answerer = Answerer(
            directory, template_options=None if origin is None else origin.template_options
        )

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Answers to questions, greedily, behind the system message of the training data.

        Args:
            model_input: a table whose column ``prompt``, or else the first, has the questions, or
                a list of them.
            params: ``max_new_tokens``.
        """
        if hasattr(model_input, "columns"):
            name = "prompt" if "prompt" in model_input.columns else model_input.columns[0]
            model_input = model_input[name].tolist()
        longest = int((params or {}).get("max_new_tokens", MAX_NEW_TOKENS))
        return [
            self._answerer.answer(
                with_system(question_of(str(question)), self._system).messages, Generation(longest)
            ).text
            for question in model_input
        ]
