"""A model small enough for tests of the plumbing: 0.2M parameters, its own BPE, random weights."""

import json
import random
from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(directory: Path, *, seed: int = 0, tied: bool = True) -> Path:
    """Save a random Llama with a byte-level BPE of 512 tokens and a chat template."""
    import pydoc_data.topics

    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    topics = sorted(pydoc_data.topics.topics.items())[:20]
    tokenizer.train_from_iterator([text for _, text in topics], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


def make_model_of_type(model_type: str, directory: Path) -> Path:
    """Save a tiny random model of another type: the same tokenizer, windows of 16 tokens."""
    from benchmarks.tiny_models import make, short_borders

    make_model(directory)
    (directory / "model.safetensors").unlink()
    (directory / "generation_config.json").unlink(missing_ok=True)
    options = short_borders(model_type, 16) | {"vocab_size": 512, "eos_token_id": 1}
    make(model_type, **options).save_pretrained(directory)
    return directory


def make_data(path: Path, *, num_rows: int = 40, seed: int = 0) -> Path:
    """Write questions and answers of unequal lengths."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            a, b = rng.randint(1, 99), rng.randint(1, 99)
            question = " and ".join(["What is", *[str(a)] * rng.randint(1, 5)])
            row = {"prompt": f"{question} plus {b}?", "completion": f"It is {a + b}." * (1 + a % 3)}
            file.write(json.dumps(row) + "\n")
    return path
