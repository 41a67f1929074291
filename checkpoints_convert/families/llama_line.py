"""The Llama line of Hugging Face as tables for `Decoder`: Llama, Mistral, Qwen, Gemma, Phi 3.

A config.json is read as transformers reads it: a missing key has that family's default, rope is
described by `rope_parameters` (transformers 5, one dictionary, or one for each type of layer) or by
`rope_theta` and `rope_scaling` (files on the hub). It is written as transformers 5 writes it.
"""

import dataclasses
import math
from typing import Any

from checkpoints_convert import json_fields as kinds
from checkpoints_convert.families import rope as rotations
from checkpoints_convert.families.family import Family, activation, row
from checkpoints_convert.families.rope import LAYER_TYPES, SCALED, rope_to_hf, ropes
from jaxllm.models.decoder import Config, Decoder


def windows(raw: dict[str, Any], types: list[str] | None) -> tuple[int | None, ...]:
    """The window of each layer; () where none has one. types: None is a window in all layers."""
    size, layers = raw.get("sliding_window"), raw["num_hidden_layers"]
    if types is None:
        types = ["sliding_attention"] * layers
    if len(types) != layers:
        raise ValueError(
            f"huggingface.load: layer_types must name one for each layer, got {len(types)} for {layers}"
        )
    if size is None or "sliding_attention" not in types:
        return ()
    return tuple(size if kind == "sliding_attention" else None for kind in types)


def types_from(raw: dict[str, Any], first: int) -> list[str]:
    """`layer_types`, or for files without: a window from layer `first` on (Qwen)."""
    if raw.get("layer_types") is not None:
        return raw["layer_types"]
    count = raw["num_hidden_layers"]
    return ["full_attention" if i < first else "sliding_attention" for i in range(count)]


def types_every(raw: dict[str, Any], period: int) -> list[str]:
    """`layer_types`, or for files without: every `period`-th layer has no window (Gemma)."""
    if raw.get("layer_types") is not None:
        return raw["layer_types"]
    count = raw["num_hidden_layers"]
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(count)]


def decoder(raw: dict[str, Any], rope_fields: dict[str, Any], **fields) -> Config:
    """Our config: what every family names alike, the rotations, and a family's own fields."""
    heads, width, head_dim = raw["num_attention_heads"], raw["hidden_size"], raw.get("head_dim")
    if head_dim is None and width % heads:
        raise ValueError(
            "huggingface.load: num_attention_heads must divide hidden_size where there is no head_dim, "
            f"got {heads}, {width}"
        )
    common = {
        "layers": raw["num_hidden_layers"],
        "width": width,
        "heads": heads,
        "kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": head_dim or width // heads,
        "ffn": raw["intermediate_size"],
        "vocab": raw["vocab_size"],
        "context": rotations.context(raw, rope_fields["rope"]),
        "tied": raw["tie_word_embeddings"],
        "activation": activation(raw.get("hidden_activation") or raw.get("hidden_act")),
        "norm_eps": float(raw["rms_norm_eps"]),
    }
    config = Config(**(common | rope_fields | fields))
    for rope in filter(None, (config.rope, config.local_rope)):
        rope.check(config.head_dim)
    return config


def llama(raw: dict[str, Any]) -> Config:
    bias = bool(raw["attention_bias"])
    return decoder(raw, ropes(raw), qkv_bias=bias, out_bias=bias, mlp_bias=raw["mlp_bias"])


def mistral(raw: dict[str, Any]) -> Config:
    return decoder(raw, ropes(raw), windows=windows(raw, None))


def qwen2(raw: dict[str, Any]) -> Config:
    return decoder(raw, ropes(raw), windows=_qwen_windows(raw), qkv_bias=True)


def qwen3(raw: dict[str, Any]) -> Config:
    bias = bool(raw["attention_bias"])
    windows = _qwen_windows(raw)
    return decoder(raw, ropes(raw), windows=windows, qk_norm=True, qkv_bias=bias, out_bias=bias)


def _qwen_windows(raw: dict[str, Any]) -> tuple[int | None, ...]:
    if not raw["use_sliding_window"]:
        return ()
    return windows(raw, types_from(raw, raw["max_window_layers"]))


def _gemma(raw: dict[str, Any], rope_fields: dict[str, Any], **fields) -> Config:
    if raw.get("use_bidirectional_attention"):
        raise ValueError("huggingface.load: attention must be causal, got use_bidirectional_attention=True")
    raw = raw | {"hidden_activation": raw["hidden_activation"] or "gelu_pytorch_tanh"}
    scalar, bias = raw["query_pre_attn_scalar"], raw["attention_bias"]
    head_dim = raw["head_dim"] or raw["hidden_size"] // raw["num_attention_heads"]
    return decoder(
        raw,
        rope_fields,
        **fields,
        norm_offset=1.0,
        post_norms=True,
        embedding_scale=raw["hidden_size"] ** 0.5,
        attention_scale=None if scalar == head_dim else scalar**-0.5,
        attention_softcap=_cap(raw["attn_logit_softcapping"]),
        logit_softcap=_cap(raw["final_logit_softcapping"]),
        qkv_bias=bias,
        out_bias=bias,
    )


def _cap(value) -> float | None:
    return None if value is None else float(value)


def gemma2(raw: dict[str, Any]) -> Config:
    return _gemma(raw, ropes(raw), windows=windows(raw, types_every(raw, 2)))


def gemma3_text(raw: dict[str, Any]) -> Config:
    period = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6
    return _gemma(
        raw,
        ropes(raw, theta=1_000_000.0, local_theta=10_000.0),
        windows=windows(raw, types_every(raw, period)),
        qk_norm=True,
        context=raw["max_position_embeddings"],  # here it is what a linear rotation reaches
    )


def text_part(raw: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the text part of a model that also reads images."""
    kinds.check_fields("config.json of gemma3", raw, {"text_config": kinds.null_or(kinds.OBJECT)})
    of_both = ("tie_word_embeddings", "eos_token_id", "quantization_config")
    return (raw.get("text_config") or {}) | {key: raw[key] for key in of_both if key in raw}


def phi3(raw: dict[str, Any]) -> Config:
    p = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    fraction = p.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1
    if (p.get("rope_type") or p.get("type")) == "yarn":
        p["rope_type"] = "longrope"  # the first files said yarn and meant this
    raw = raw | {"rope_scaling": None, "rope_parameters": p}
    return decoder(raw, ropes(raw, fraction=fraction), windows=windows(raw, None))


def to_hf_config(c: Config) -> dict[str, Any]:
    """Our config in all keys that a family of this line has; each writes its own of them."""
    reached = c.rope.factor if c.rope.kind == "linear" else 1  # times what the file says (`rope.context`)
    scalar = c.head_dim if c.attention_scale is None else round(c.attention_scale**-2, 9)
    raw: dict[str, Any] = {
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": math.ceil(c.context / reached),
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "hidden_act": "gelu_pytorch_tanh" if c.activation == "gelu_tanh" else c.activation,
        "rope_parameters": rope_to_hf(c.rope),
    }
    if c.rope.kind in SCALED:
        raw["original_max_position_embeddings"] = c.rope.original_context
    window = {size for size in c.windows if size is not None}
    raw["sliding_window"] = min(window) if window else None
    raw["attention_bias"], raw["mlp_bias"] = c.qkv_bias, c.mlp_bias
    raw["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar
    raw["attn_logit_softcapping"] = c.attention_softcap
    raw["final_logit_softcapping"] = c.logit_softcap
    return raw


def _types(c: Config) -> list[str]:
    return ["full_attention" if c.window(i) is None else "sliding_attention" for i in range(c.layers)]


SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "original_max_position_embeddings",  # of ropes that know it
)


def written(c: Config, *keys: str) -> dict[str, Any]:
    """The keys that all families have, and those of the others that are named, in one order."""
    return {key: value for key, value in to_hf_config(c).items() if key in SHARED or key in keys}


def llama_to(c: Config) -> dict[str, Any]:
    return written(c, "head_dim", "hidden_act", "attention_bias", "mlp_bias")


def mistral_to(c: Config) -> dict[str, Any]:
    return written(c, "head_dim", "hidden_act", "sliding_window")


def qwen_to(c: Config) -> dict[str, Any]:
    raw = written(c, "head_dim", "hidden_act", "sliding_window", "attention_bias")
    raw |= {"use_sliding_window": bool(c.windows), "layer_types": _types(c)}
    return raw


def gemma_to(c: Config) -> dict[str, Any]:
    own = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
    raw = written(c, "head_dim", "sliding_window", "attention_bias", *own)
    raw |= {"hidden_activation": to_hf_config(c)["hidden_act"], "layer_types": _types(c)}
    return raw


def gemma3_to(c: Config) -> dict[str, Any]:
    local = c.rope if c.local_rope is None else c.local_rope
    both = {"full_attention": rope_to_hf(c.rope), "sliding_attention": rope_to_hf(local)}
    return gemma_to(c) | {"rope_parameters": both, "max_position_embeddings": c.context}


def phi3_to(c: Config) -> dict[str, Any]:
    raw = written(c, "hidden_act", "sliding_window")
    raw["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return raw


LAYER = "model.layers.{i}."
HEAD = (
    row("model.embed_tokens.weight", "embedding.table"),
    row("model.norm.weight", "norm.scale"),
    row("lm_head.weight", "head.w"),
)
NORMS = (
    row(LAYER + "input_layernorm.weight", "layers.{i}.attention_norm.scale"),
    row(LAYER + "post_attention_layernorm.weight", "layers.{i}.mlp_norm.scale"),
)
GEMMA_NORMS = (
    row(LAYER + "input_layernorm.weight", "layers.{i}.attention_norm.scale"),
    row(LAYER + "post_attention_layernorm.weight", "layers.{i}.attention_post_norm.scale"),
    row(LAYER + "pre_feedforward_layernorm.weight", "layers.{i}.mlp_norm.scale"),
    row(LAYER + "post_feedforward_layernorm.weight", "layers.{i}.mlp_post_norm.scale"),
)
ATTENTION = tuple(
    row(LAYER + f"self_attn.{name}_proj.{theirs}", f"layers.{{i}}.attention.{name}.{ours}")
    for name in "qkvo"
    for theirs, ours in (("weight", "w"), ("bias", "bias"))
)
QK_NORMS = tuple(
    row(LAYER + f"self_attn.{name}_norm.weight", f"layers.{{i}}.attention.{name}_norm.scale") for name in "qk"
)
MLP = tuple(
    row(LAYER + f"mlp.{name}_proj.{theirs}", f"layers.{{i}}.mlp.{name}.{ours}")
    for name in ("gate", "up", "down")
    for theirs, ours in (("weight", "w"), ("bias", "bias"))
)
FUSED = (
    row(LAYER + "self_attn.qkv_proj.weight", *(f"layers.{{i}}.attention.{n}.w" for n in "qkv")),
    row(LAYER + "self_attn.o_proj.weight", "layers.{i}.attention.o.w"),
    row(LAYER + "mlp.gate_up_proj.weight", "layers.{i}.mlp.gate.w", "layers.{i}.mlp.up.w"),
    row(LAYER + "mlp.down_proj.weight", "layers.{i}.mlp.down.w"),
)

FIELDS = rotations.CONFIG_FIELDS | {
    "vocab_size": kinds.SIZE,
    "hidden_size": kinds.SIZE,
    "intermediate_size": kinds.SIZE,
    "num_hidden_layers": kinds.SIZE,
    "num_attention_heads": kinds.SIZE,
    "num_key_value_heads": kinds.null_or(kinds.SIZE),
    "head_dim": kinds.null_or(kinds.SIZE),
    "max_position_embeddings": kinds.SIZE,
    "hidden_act": kinds.null_or(kinds.TEXT),
    "rms_norm_eps": kinds.NOT_NEGATIVE,
    "tie_word_embeddings": kinds.FLAG,
    "attention_bias": kinds.FLAG,
    "mlp_bias": kinds.FLAG,
    "sliding_window": kinds.null_or(kinds.SIZE),
    "layer_types": kinds.null_or(kinds.list_of(kinds.one_of(*LAYER_TYPES))),
    "eos_token_id": kinds.TOKENS,
}
QWEN_FIELDS = FIELDS | {"use_sliding_window": kinds.FLAG, "max_window_layers": kinds.COUNT}
GEMMA_FIELDS = FIELDS | {
    "hidden_activation": kinds.null_or(kinds.TEXT),
    "query_pre_attn_scalar": kinds.POSITIVE,
    "attn_logit_softcapping": kinds.null_or(kinds.POSITIVE),
    "final_logit_softcapping": kinds.null_or(kinds.POSITIVE),
    "sliding_window_pattern": kinds.null_or(kinds.SIZE),
    "_sliding_window_pattern": kinds.null_or(kinds.SIZE),
}
COMMON = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
QWEN = COMMON | {
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
GEMMA = COMMON | {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    model=Decoder,
    config=llama,
    to_hf_config=llama_to,
    rows=(*HEAD, *NORMS, *ATTENTION, *MLP),
    fields=FIELDS,
    defaults=COMMON | {"max_position_embeddings": 2048, "eos_token_id": 2},
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    model=Decoder,
    config=mistral,
    to_hf_config=mistral_to,
    rows=(*HEAD, *NORMS, *ATTENTION, *MLP),
    fields=FIELDS,
    defaults=COMMON
    | {
        "max_position_embeddings": 4096 * 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "eos_token_id": 2,
    },
)
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    model=Decoder,
    config=qwen2,
    to_hf_config=qwen_to,
    rows=(*HEAD, *NORMS, *ATTENTION, *MLP),
    fields=QWEN_FIELDS,
    defaults=QWEN,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    model=Decoder,
    config=qwen3,
    to_hf_config=qwen_to,
    rows=(*HEAD, *NORMS, *ATTENTION, *QK_NORMS, *MLP),
    fields=QWEN_FIELDS,
    defaults=QWEN | {"head_dim": 128},
)
GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    model=Decoder,
    config=gemma2,
    to_hf_config=gemma_to,
    rows=(*HEAD, *GEMMA_NORMS, *ATTENTION, *MLP),
    fields=GEMMA_FIELDS,
    defaults=GEMMA
    | {
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
)
GEMMA3_TEXT = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    model=Decoder,
    config=gemma3_text,
    to_hf_config=gemma3_to,
    rows=(*HEAD, *GEMMA_NORMS, *ATTENTION, *QK_NORMS, *MLP),
    fields=GEMMA_FIELDS,
    defaults=GEMMA
    | {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "max_position_embeddings": 131_072,
    },
)
PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    model=Decoder,
    config=phi3,
    to_hf_config=phi3_to,
    rows=(*HEAD, *NORMS, *FUSED),
    fields=FIELDS,
    defaults=COMMON
    | {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "eos_token_id": 32_000,
    },
)
# The text part of a checkpoint that reads images too; written back as gemma3_text.
GEMMA3 = dataclasses.replace(
    GEMMA3_TEXT,
    model_type="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    flat=text_part,
    ignored=(*GEMMA3_TEXT.ignored, r"(^|\.)vision_tower\.", r"(^|\.)multi_modal_projector\."),
    aliases=(("lm_head.weight", "language_model.lm_head.weight"),),
    prefixes=("model.", "model.language_model.", "language_model.model."),
)

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3_TEXT, PHI3, GEMMA3)
