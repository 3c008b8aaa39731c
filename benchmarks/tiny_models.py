"""Tiny random models of every causal class that transformers knows, for tests and tables.

``make("gemma3_text", sliding_window=16)`` is a model of some ten thousand parameters, float32, in
evaluation mode. :data:`SIZES` is what is made small in every configuration that has it,
:data:`OPTIONS` what single types need besides.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 128
POSITIONS = 512
"""Most tokens of a sequence."""

_LAYERS = 2
_HEADS = 4
_WIDTH = 32
_INNER = 48
_HEAD_WIDTH = _WIDTH // _HEADS

SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ["vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"], VOCABULARY
    ),
    **dict.fromkeys(["pronunciation_vocab_size", "shape_vocab_size"], VOCABULARY),
    **dict.fromkeys(
        ["max_position_embeddings", "max_seq_len", "context_length", "n_positions", "n_ctx"],
        POSITIONS,
    ),
    **dict.fromkeys(["max_target_positions", "max_source_positions"], POSITIONS),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size"], _WIDTH),
    **dict.fromkeys(["input_embedding_size", "output_embedding_size"], _WIDTH),
    **dict.fromkeys(["pronunciation_embed_dim", "shape_embed_dim", "dim_model_base"], _WIDTH),
    **dict.fromkeys(
        [
            *("intermediate_size", "d_inner", "dim_ff", "dff", "feed_forward_size", "ffn_dim"),
            *("decoder_ffn_dim", "encoder_ffn_dim", "dense_intermediate_size"),
            *("expert_ffn_hidden_size", "ffn_hidden_size", "intermediate_size_mlp"),
            *("moe_intermediate_size", "moe_shared_expert_intermediate_size"),
            *("shared_expert_intermediate_size", "shared_experts_intermediate_size"),
            *("shared_intermediate_size",),
        ],
        _INNER,
    ),
    **dict.fromkeys(
        [
            *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
            *("encoder_layers", "num_decoder_layers", "num_encoder_layers"),
        ],
        _LAYERS,
    ),
    **dict.fromkeys(
        [
            *("num_attention_heads", "attention_heads", "n_head", "n_heads", "num_heads"),
            *("decoder_attention_heads", "encoder_attention_heads"),
            *("num_decoder_attention_heads", "num_encoder_attention_heads"),
            *("swa_num_attention_heads",),
        ],
        _HEADS,
    ),
    **dict.fromkeys(["num_key_value_heads", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(
        ["head_dim", "attention_head_size", "dim_head", "kv_channels", "swa_head_dim"], _HEAD_WIDTH
    ),
    **dict.fromkeys(
        ["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rotary_dim"], _HEAD_WIDTH
    ),
    "query_pre_attn_scalar": _HEAD_WIDTH,
    **dict.fromkeys(
        [
            *("kv_lora_rank", "q_lora_rank", "o_lora_rank", "gated_norm_rank", "laurel_rank"),
            *("hc_lowrank", "adapter_rank", "d_rel", "router_hidden_size"),
            *("hidden_size_per_layer_input",),
        ],
        16,
    ),
    "index_head_dim": 16,
    "index_n_heads": 16,  # with few, keys tie at a score of 0, and which is selected is chance
    "index_topk": 24,
    "index_block_size": 8,
    "index_topk_blocks": 3,
    **dict.fromkeys(
        [
            *("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
            *("zero_expert_num",),
        ],
        4,
    ),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(["n_group", "topk_group"], 1),
    **dict.fromkeys(["linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"], 8),
    **dict.fromkeys(["linear_num_heads", "linear_num_value_heads"], 4),
    "linear_num_key_heads": 2,
    **dict.fromkeys(["mamba_d_state", "ssm_state_size", "state_size"], 8),
    **dict.fromkeys(["mamba_head_dim", "mamba_d_head"], 8),
    **dict.fromkeys(["chunk_size", "mamba_chunk_size"], 16),
    "initializer_range": 0.2,  # logits that differ, so that a mistake shows
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_LATENT = {"num_key_value_heads": _HEADS}  # keys and values come from one latent vector
_LINEAR_FIRST = {"layer_types": ["linear_attention", "full_attention"]}
_MAMBA_HEADS = {"mamba_n_heads": 8}
_HYBRID = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
_SHARED_CACHE = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_ASSISTANT = {
    "backbone_hidden_size": _WIDTH,
    "text_config": {
        **_SHARED_CACHE,
        "num_kv_shared_layers": 4,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
    },
}

_BORDERS = (
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "attention_window_size",
    "attention_chunk_size",
    "keep_window_size",
)

OPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        [
            *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"),
            *("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"),
        ],
        _LATENT,
    ),
    "bailing_hybrid": {**_LATENT, **_LINEAR_FIRST},
    "kimi_linear": {**_LATENT, **_LINEAR_FIRST},
    **dict.fromkeys(["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"], _LINEAR_FIRST),
    "bamba": {**_MAMBA_HEADS, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA_HEADS, **_LINEAR_FIRST},
    "falcon_h1": {"mamba_d_ssm": 64, **_MAMBA_HEADS},
    "gemma3n_text": {**_SHARED_CACHE, "num_kv_shared_layers": 2},
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "sliding_attention"],
    },
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [16, 32],
        "attn_layers": ["local", "lsh"],
    },
    "xlstm": {"hidden_size": 64, "num_heads": 4, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8.0, "kv_n_heads": 2},
        "ffn_config": {"hidden_size": _WIDTH, "ffn_hidden_size": _INNER},
    },
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {
        **_LATENT,
        "layer_types": ["indexed_attention", "sliding_attention"],
        "swa_num_attention_heads": _HEADS,
        "swa_num_key_value_heads": _HEADS,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": _HEAD_WIDTH,
        "swa_v_head_dim": _HEAD_WIDTH,
    },
    "gemma4_unified": {
        "vision_config": {"mm_embed_dim": _WIDTH, "output_proj_dims": _WIDTH, "mm_posemb_size": 16}
    },
    "qwen4_exp_text": {
        **_LINEAR_FIRST,
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 24,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": _HYBRID,
    "zamba2": _HYBRID,
}
"""By model type; those of a part stand under its name."""


def long_rope(border: int) -> dict[str, Any]:
    """Options of Phi-3: sequences of more tokens have other rotary frequencies."""
    factors = {
        "short_factor": [1.0] * (_HEAD_WIDTH // 2),
        "long_factor": [4.0] * (_HEAD_WIDTH // 2),
    }
    return {
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10_000.0, **factors},
        "original_max_position_embeddings": border,
    }


def dynamic_ntk(border: int) -> dict[str, Any]:
    """Options of Llama and its like: the frequencies grow with longer sequences."""
    return {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
        "max_position_embeddings": border,
    }


def causal_types() -> list[str]:
    """Every model type that ``AutoModelForCausalLM`` has a class for."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def short_borders(model_type: str, length: int = 24) -> dict[str, Any]:
    """Options that make every window and chunk of a type ``length`` tokens; {} without any."""
    config_class = CONFIG_MAPPING[model_type]
    if part := config_class.sub_configs_defaults.get("text_config"):
        inner = short_borders(part.model_type, length) if part.model_type in CONFIG_MAPPING else {}
        return {"text_config": inner} if inner else {}
    known = {field.name for field in dataclasses.fields(config_class)}
    options: dict[str, Any] = {name: length for name in _BORDERS if name in known}
    if "local_attention" in known:
        options["local_attention"] = 2 * length  # to both sides
    if "use_sliding_window" in known:
        options |= {"use_sliding_window": True}
        if "max_window_layers" in known:
            options |= {"max_window_layers": 1}
        elif "layer_types" in known:
            options |= {"layer_types": ["sliding_attention", "full_attention"]}
    return options


def make_config(model_type: str, **options: Any) -> Any:
    """A configuration of tiny sizes.

    Args:
        model_type: one that transformers knows, of a causal model or of a part of one.
        options: laid over the tiny sizes; of a part, a dictionary under the part's name.
    """
    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(config_class)}

    def own(values: Mapping[str, Any]) -> dict[str, Any]:
        """Under the class's own names, so that no setting is given under two."""
        renamed = {n: m for n, m in config_class.attribute_map.items() if m in known}
        return {renamed.get(name, name): value for name, value in values.items()}

    sizes = {name: value for name, value in own(SIZES).items() if name in known}
    sizes |= own(OPTIONS.get(model_type, {}))
    options = own(options)
    for part, default in config_class.sub_configs_defaults.items():
        given = {**sizes.pop(part, {}), **options.pop(part, {})}
        if default.model_type in CONFIG_MAPPING:
            sizes[part] = make_config(default.model_type, **given).to_dict()
        elif given:
            sizes[part] = given
    return config_class(**{**sizes, **options})


def make(model_type: str, *, seed: int = 0, **options: Any) -> Any:
    """A random causal model of tiny sizes, float32, in evaluation mode.

    Args:
        model_type: one of :func:`causal_types`.
        seed: of the weights.
        options: see :func:`make_config`.
    """
    config = make_config(model_type, **options)
    torch.manual_seed(seed)
    factory: Any = AutoModelForCausalLM
    return factory.from_config(config, dtype=torch.float32).eval()
