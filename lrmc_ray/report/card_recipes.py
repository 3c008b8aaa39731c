"""How a model's directory is used by other programs, as its card says it."""

_RECIPES = """\
```bash
# in this directory, with vLLM, with Ollama, to the Hugging Face Hub
vllm serve . --served-model-name NAME
echo 'FROM .' > Modelfile && ollama create NAME
hf upload USER/NAME .
```
"""


def recipes(name: str) -> str:
    """Commands for a model's directory of that name."""
    shown = "".join(c if c.isalnum() or c in "-._" else "-" for c in name) or "my-model"
    return _RECIPES.replace("NAME", shown.lower())
