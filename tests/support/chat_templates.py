"""Chat templates that behave as those of well-known models do, and tokenizers to render them."""

import importlib.util
import re
from pathlib import Path

SPECIAL = re.compile(
    r"<[|\uff5c][^<>{}|\uff5c ]+[|\uff5c]>|<\|?turn\|?>|</?s>|<(?:start|end)_of_turn>|<eos>|<bos>"
    r"|<end_of_utterance>|<\|tool_response>|<tool_call\|>|\[gMASK\]|<sop>|\[/?INST\]"
)
ENDS = (
    *(
        "<|im_end|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "<|endoftext|>",
        "<turn|>",
        "<end_of_turn>",
    ),
    *(
        "<|END_OF_TURN_TOKEN|>",
        "<|eot_id|>",
        "<|return|>",
        "<end_of_utterance>",
        "</s>",
        "[e~[",
        "<eos>",
    ),
)

RETHINKING = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|Assistant|>' }}"
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}"
    "<|end|>{% else %}{{ '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
"""The prompt opens a think block, as QwQ's does."""

END_AND_MORE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ '<eos>' }}{% endif %}"
)
"""Something stands behind the end of the last turn, as in Phi-3."""

DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '[SYS]Be good.[/SYS]' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + '</s>' }}"
    "{% else %}{{ '[INST]' + m.content + '[/INST]' }}{% endif %}{% endfor %}"
)
"""The generation prompt adds nothing, and a system prompt is there by default: Devstral."""

COMMAND_R7B = (
    "{{ '<bos>' }}{% if messages[0].role != 'system' %}{{ '<|START_OF_TURN_TOKEN|>"
    "<|SYSTEM_TOKEN|>You are Command.<|END_OF_TURN_TOKEN|>' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}"
    "{% if m.reasoning_content %}{{ '<|START_THINKING|>' + m.reasoning_content"
    " + '<|END_THINKING|>' }}{% endif %}"
    "{{ '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' }}"
    "{% elif m.role in ('user', 'system') %}{{ '<|START_OF_TURN_TOKEN|><|' + m.role | upper"
    " + '_TOKEN|>' + m.content + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    "<|START_THINKING|>' }}{% endif %}"
)
"""The prompt opens a think block of its own kind; a tag stands around the answer."""

MINIMAX_M2 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{{ ']~!b[]~b]system\n' + (messages[0].content if messages[0].role == 'system'"
    " else 'You are MiniMax.') + '[e~[\n' }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ ']~b]user\n' + m.content + '[e~[\n' }}{% elif m.role == 'assistant' %}"
    "{{ ']~b]ai\n' }}{% if m.reasoning_content and loop.index0 > ns.last %}"
    "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '[e~[\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ']~b]ai\n<think>\n' }}{% endif %}"
)
"""The prompt opens a think block, the reasoning of earlier turns is dropped."""

DEEPSEEK_V3_1 = (
    "{% set ns = namespace(asked=false) %}{{ '<bos>' }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{% set ns.asked = true %}{{ '<\uff5cUser\uff5c>' + m.content }}"
    "{% elif m.role == 'assistant' %}{% if ns.asked %}"
    "{{ '<\uff5cAssistant\uff5c></think>' }}{% endif %}{% set ns.asked = false %}"
    "{{ m.content.split('</think>')[-1] + '<\uff5cend\u2581of\u2581sentence\uff5c>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt and ns.asked %}"
    "{{ '<\uff5cAssistant\uff5c>' + ('<think>' if thinking else '</think>') }}{% endif %}"
)
"""The prompt closes a think block that nothing opened; an answer that comes first has no header."""

GLM_4_7 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ '[gMASK]<sop>' }}"
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content and loop.index0 > ns.last %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% else %}{{ '</think>' }}{% endif %}"
    "{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|assistant|>' + ('</think>' if enable_thinking is defined and not enable_thinking"
    " else '<think>') }}{% endif %}"
)
"""The next turn's header ends a turn; an answer without reasoning closes the prompt's block."""

NEMOTRON_3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{{ '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else '')"
    " + '<|im_end|>\n' }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n<think>' }}{% if m.reasoning_content and loop.index0 > ns.last %}"
    "{{ '\n' + m.reasoning_content + '\n' }}{% endif %}{{ '</think>' + m.content"
    " + '<|im_end|>\n' }}{% elif m.role == 'user' %}"
    "{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
"""The prompt opens a think block with a line break that the rendered answer does not have."""

FAULTY = "{% for m in messages %}{{ m.content + 1 }}{% endfor %}"

MARKED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def shipped() -> dict[str, str]:
    """The templates in the package ``trl``, by their names."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "chat_templates"
    return {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("*.jinja"))}


def tokenizer_for(template: str | None, *extra: str, prefix_space: bool = False):
    """A byte-level BPE, or one with metaspaces, that knows the template's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = sorted({*SPECIAL.findall(template or ""), "<bos>", "<eos>", *extra})
    tokenizer = Tokenizer(models.BPE(unk_token="<eos>"))
    if prefix_space:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = [chr(code) for code in range(33, 127)] + ["\n", "▁", "Ω", "é"]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(special) + 60,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    texts = ["\n\nTwo.\n\nU = R I\n\n\n", "Two and two", "Power? Ohm? the sum", "\n\n"] * 8
    tokenizer.train_from_iterator(texts, trainer)
    end = next(token for token in ENDS if token in special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token=end)
    fast.chat_template = template
    return fast


INSTRUCTIONS = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "' [/INST]' }}{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
"""Llama 2's."""


def byte_fallback_tokenizer(*, legacy: bool, first: bool = False):
    """A tokenizer as Llama 2 has it: a prefix space, and bytes for what the vocabulary lacks.

    Args:
        legacy: the prefix space is put by the normalizer, also behind special tokens.
        first: ``<s>`` is put before every text.
    """
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    merges = [("▁", "T"), ("T", "w"), ("▁T", "w"), ("▁Tw", "o"), ("Tw", "o")]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    words += [chr(code) for code in range(33, 127)] + ["".join(merge) for merge in merges]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [AddedToken(word, normalized=False, special=True) for word in words[:3]]
    tokenizer.add_special_tokens(special)
    if first:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = INSTRUCTIONS
    return fast
