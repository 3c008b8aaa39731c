#!/usr/bin/env bash
# transformers 5.23.0: AutoTokenizer takes the normalizer and the pre-tokenizer from the class that
# tokenizer_config.json names, and ignores those in tokenizer.json, which the library tokenizers reads.
#
# Input: a byte-level BPE whose tokenizer.json says that texts are put into lower case, saved with
# "tokenizer_class": "Qwen2Tokenizer".
# Seen with transformers 5.23.0, tokenizers 0.23.3:
#   PreTrainedTokenizerFast same tokens
#   Qwen2Tokenizer other tokens
# Source: Qwen2Tokenizer.__init__ in transformers/models/qwen2/tokenization_qwen2.py builds a
# Tokenizer(BPE(...)) of its own and sets normalizer and pre_tokenizer; of the file it takes the
# vocabulary and the merges.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' | tee seen
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

made = Tokenizer(models.BPE())
made.normalizer = normalizers.Lowercase()
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.decoder = decoders.ByteLevel()
made.train_from_iterator(
    ["Two and two"],
    trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ),
)
PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>").save_pretrained("saved")
config = json.loads(Path("saved/tokenizer_config.json").read_text())
for name in ("PreTrainedTokenizerFast", "Qwen2Tokenizer"):
    Path("saved/tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": name}))
    by_class = AutoTokenizer.from_pretrained("saved")("Two")["input_ids"]
    by_file = Tokenizer.from_file("saved/tokenizer.json").encode("Two").ids
    print(name, "same tokens" if by_class == by_file else "other tokens")
PYTHON
grep -qx "PreTrainedTokenizerFast same tokens" seen && grep -qx "Qwen2Tokenizer other tokens" seen
