"""What classes of transformers do to a loaded model that would change its results, undone.

One sets an embedding to zero, others go on with the rotary frequencies of a longer sequence.
"""

from pathlib import Path
from typing import Any

from lrmc_ray.models.names import WEIGHT_SUFFIX


def restore_padding_row(model: Any, directory: Path) -> None:
    """Give the padding token the embedding that it was saved with.

    Some classes of transformers set it to zero whenever they are loaded (Youtu). Where the output
    head is the same weight, training has changed it.
    """
    import torch
    from safetensors import safe_open

    embeddings = model.get_input_embeddings()
    row = getattr(embeddings, "padding_idx", None)
    if row is None or bool(embeddings.weight[row].any()):
        return
    name = next((n for n, p in model.named_parameters() if p is embeddings.weight), "")
    for path in sorted(directory.glob(f"*{WEIGHT_SUFFIX}")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118  # it is no dictionary
                with torch.no_grad():
                    embeddings.weight[row] = file.get_slice(name)[row].to(embeddings.weight)


def forget_lengths(body: Any, _arguments: Any = None) -> None:
    """Make dynamic NTK scaling forget the longest sequence that ``body`` has seen.

    Its rotary frequencies would stay those of that sequence, for shorter ones as well.
    """
    ending = "max_seq_len_cached"
    for module in body.modules():
        for name in [name for name in vars(module) if name.endswith(ending)]:
            kind = name.removesuffix(ending)  # one for each kind of layer, or the empty one
            original = getattr(module, f"{kind}original_inv_freq", None)
            if original is not None and int(getattr(module, name)) > module.original_max_seq_len:
                current = getattr(module, f"{kind}inv_freq")
                setattr(module, f"{kind}inv_freq", original.to(current.device))
                setattr(module, name, module.original_max_seq_len)
