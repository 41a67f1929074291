"""Rotary positions in a Hugging Face config, read and written."""

import math
from typing import Any

from checkpoints_convert.json_fields import (
    ABOVE_ONE,
    FLAG,
    FRACTION,
    LARGEST,
    NOT_NEGATIVE,
    OBJECT,
    POSITIVE,
    SIZE,
    TEXT,
    check_fields,
    list_of,
    null_or,
)
from jaxllm.models.rope import Rope
from jaxllm.storage.metadata import excerpt

SCALED = ("llama3", "yarn", "longrope")  # rope kinds that know the trained length
LAYER_TYPES = ("full_attention", "sliding_attention")

FIELDS = {  # of a rope dictionary
    "rope_type": null_or(TEXT),
    "type": null_or(TEXT),
    "rope_theta": null_or(ABOVE_ONE),
    "partial_rotary_factor": null_or(FRACTION),
    "original_max_position_embeddings": null_or(SIZE),
    "factor": null_or(POSITIVE),
    "low_freq_factor": null_or(POSITIVE),
    "high_freq_factor": null_or(POSITIVE),
    "beta_fast": null_or(POSITIVE),
    "beta_slow": null_or(POSITIVE),
    "attention_factor": null_or(POSITIVE),
    "mscale": null_or(NOT_NEGATIVE),
    "mscale_all_dim": null_or(NOT_NEGATIVE),
    "truncate": null_or(FLAG),
    "short_factor": null_or(list_of(POSITIVE)),
    "long_factor": null_or(list_of(POSITIVE)),
}
CONFIG_FIELDS = {  # of a config.json, about rotations
    "rope_theta": null_or(ABOVE_ONE),
    "rope_scaling": null_or(OBJECT),
    "rope_parameters": null_or(OBJECT),
    "rope_local_base_freq": null_or(ABOVE_ONE),
    "partial_rotary_factor": null_or(FRACTION),
    "original_max_position_embeddings": null_or(SIZE),
}


def rope(p: dict[str, Any], raw: dict[str, Any], theta: float, *, fraction=1.0) -> Rope:
    """The rotation that one rope dictionary `p` of a config describes."""
    check_fields("rope parameters", p, FIELDS)
    kind = p.get("rope_type") or p.get("type") or "default"
    kind = "longrope" if kind == "su" else kind
    fields: dict[str, Any] = {"kind": kind, "theta": float(p.get("rope_theta") or theta)}
    part = p.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    fields["fraction"] = float(fraction) if kind == "default" or part is None else float(part)
    if kind in SCALED:
        length = raw.get("original_max_position_embeddings")  # has precedence, as in transformers
        length = length or p.get("original_max_position_embeddings")
        fields["original_context"] = length = length or raw["max_position_embeddings"]
        if length < 2:  # its logarithm is divided by
            raise ValueError(f"huggingface.load: {kind} must know a trained length above 1, got {length}")
    if kind in ("linear", "llama3"):
        fields["factor"] = float(_need(p, "factor"))
    match kind:
        case "default" | "linear":
            pass
        case "llama3":
            fields["low_freq_factor"] = float(_need(p, "low_freq_factor"))
            fields["high_freq_factor"] = float(_need(p, "high_freq_factor"))
            if fields["low_freq_factor"] >= fields["high_freq_factor"]:
                raise ValueError(
                    "huggingface.load: low_freq_factor must be below high_freq_factor, "
                    f"got {p['low_freq_factor']}, {p['high_freq_factor']}"
                )
        case "yarn":
            stretch = raw["max_position_embeddings"] / fields["original_context"]
            fields["factor"] = float(p.get("factor") or stretch)
            fields["beta_fast"] = float(p.get("beta_fast") or 32)
            fields["beta_slow"] = float(p.get("beta_slow") or 1)
            fields["truncate"] = bool(p.get("truncate", True))
            fields["attention_factor"] = _yarn_attention(p, fields["factor"])
        case "longrope":
            fields["short_factors"] = tuple(float(x) for x in _need(p, "short_factor"))
            fields["long_factors"] = tuple(float(x) for x in _need(p, "long_factor"))
            length = fields["original_context"]
            factor = p.get("factor") or raw["max_position_embeddings"] / length
            scale = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
            fields["attention_factor"] = float(_or(p.get("attention_factor"), scale))
        case "dynamic":
            raise ValueError(
                "huggingface.load: rotations must be the same for a text however long it grows: "
                "what is cached could not be turned again, got rope_type='dynamic'"
            )
        case _:
            raise ValueError(
                "huggingface.load: rope_type must be one of default, linear, llama3, yarn, "
                f"longrope, got rope_type={excerpt(kind)}"
            )
    return Rope(**fields)


def context(raw: dict[str, Any], r: Rope) -> int:
    """How many tokens a text may have, as vLLM reads a config (`_get_and_verify_max_len`).

    A linear rotation reaches `factor` times `max_position_embeddings` and yarn `factor` times the trained
    length; llama3 and longrope say there what they reach.
    """
    match r.kind:
        case "linear":
            reach = raw["max_position_embeddings"] * r.factor
        case "yarn":
            reach = r.original_context * r.factor
        case _:
            return raw["max_position_embeddings"]
    return int(min(max(reach, 1), LARGEST))


def _need(p: dict[str, Any], key: str):
    if p.get(key) is None:
        raise ValueError(f"huggingface.load: rope parameters must have {key}, got {sorted(p)}")
    return p[key]


def _or(value, default):
    return default if value is None else value


def _yarn_attention(p: dict[str, Any], factor: float) -> float:
    """What multiplies cos and sin (arXiv:2309.00071, equation 15, with DeepSeek's two `mscale`)."""

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return scale(p["mscale"]) / scale(p["mscale_all_dim"])
    return scale(1.0)


def ropes(raw: dict[str, Any], *, theta=10_000.0, local_theta=None, fraction=1.0) -> dict[str, Any]:
    """The fields `rope` and `local_rope` of our config, from either spelling.

    local_theta: the base of layers with a window where the family gives them their own (Gemma 3).
    """
    p = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    theta = float(raw.get("rope_theta") or theta)
    nested = any(kind in p for kind in LAYER_TYPES)
    outer = (p.get("full_attention") or {}) if nested else p
    inner = (p.get("sliding_attention") or {}) if nested else {}
    if nested:
        check_fields("rope parameters", p, dict.fromkeys(LAYER_TYPES, null_or(OBJECT)))
    fields: dict[str, Any] = {"rope": rope(outer, raw, theta, fraction=fraction)}
    if nested or local_theta is not None:
        base = float(raw.get("rope_local_base_freq") or local_theta or theta)
        local = rope(inner, raw, base, fraction=fraction)
        fields["local_rope"] = None if local == fields["rope"] else local
    return fields


def rope_to_hf(r: Rope) -> dict[str, Any]:
    """The rope dictionary of a rotation, as transformers 5 spells it."""
    p: dict[str, Any] = {"rope_type": r.kind, "rope_theta": r.theta}
    if r.fraction != 1.0:
        p["partial_rotary_factor"] = r.fraction
    if r.kind in SCALED:
        p["original_max_position_embeddings"] = r.original_context
    if r.kind in ("linear", "llama3", "yarn"):
        p["factor"] = r.factor
    match r.kind:
        case "llama3":
            p |= {"low_freq_factor": r.low_freq_factor, "high_freq_factor": r.high_freq_factor}
        case "yarn":
            p |= {"beta_fast": r.beta_fast, "beta_slow": r.beta_slow, "truncate": r.truncate}
            p["attention_factor"] = r.attention_factor
        case "longrope":
            p |= {"short_factor": list(r.short_factors), "long_factor": list(r.long_factors)}
            p["attention_factor"] = r.attention_factor
    return p
