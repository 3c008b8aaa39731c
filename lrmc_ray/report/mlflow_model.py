"""A tuned model's directory as MLflow takes models: ``mlflow models serve -m best_model``.

The directory stays the Hugging Face directory that it is. Beside its files is ``MLmodel``, which
names this module; weights are neither copied nor written in another form. (MLflow 3.17's
transformers flavour cannot save what transformers 5 has written.)
"""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from lrmc_ray.files.artifacts import write_atomically
from lrmc_ray.models import load_model, load_tokenizer

MLMODEL = "MLmodel"
MAX_NEW_TOKENS = 128


def write_mlmodel(directory: Path) -> None:
    """Let MLflow load a model's directory."""
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
    }
    write_atomically(directory / MLMODEL, yaml.safe_dump(content).encode())


def _load_pyfunc(path: str) -> "Answering":
    """What MLflow calls; the name is its own."""
    return Answering(Path(path))


class Answering:
    """The model as MLflow asks it: one answer for every prompt."""

    def __init__(self, directory: Path) -> None:
        self._model = load_model(directory).eval()
        self._tokenizer = load_tokenizer(directory)

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Answers to questions, greedily.

        Args:
            model_input: a table whose column ``prompt``, or else the first, has the questions, or
                a list of them.
            params: ``max_new_tokens``.
        """
        if hasattr(model_input, "columns"):
            name = "prompt" if "prompt" in model_input.columns else model_input.columns[0]
            model_input = model_input[name].tolist()
        longest = int((params or {}).get("max_new_tokens", MAX_NEW_TOKENS))
        return [self._answer(str(question), longest) for question in model_input]

    def _answer(self, question: str, longest: int) -> str:
        if self._tokenizer.chat_template:
            messages = [{"role": "user", "content": question}]
            inputs = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        else:
            text = f"User:\n{question}\n\nAssistant:\n"
            inputs = self._tokenizer(text, return_tensors="pt")
        output = self._model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        answer: str = self._tokenizer.decode(
            output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return answer
