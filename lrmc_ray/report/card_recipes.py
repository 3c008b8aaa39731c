"""How a model's directory is used by other programs, as its card says it."""

_RECIPES = """\
```bash
# in this directory
vllm serve . --served-model-name NAME                # vLLM
echo 'FROM .' > Modelfile && ollama create NAME       # Ollama
hf upload USER/NAME .                                # the Hugging Face Hub
```
"""


def recipes(name: str) -> str:
    """Commands for a model's directory of that name."""
    shown = "".join(c if c.isalnum() or c in "-._" else "-" for c in name) or "my-model"
    return _RECIPES.replace("NAME", shown.lower())
