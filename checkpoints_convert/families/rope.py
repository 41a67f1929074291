"""Rotary positions in a Hugging Face config, read and written."""

import math
from typing import Any

from jaxllm.models.rope import Rope

SCALED = ("llama3", "yarn", "longrope")  # rope kinds that know the trained length


def rope(p: dict[str, Any], raw: dict[str, Any], theta: float, *, fraction: float = 1.0) -> Rope:
    """The rotation that one rope dictionary `p` of a config describes."""
    kind = p.get("rope_type") or p.get("type") or "default"
    kind = "longrope" if kind == "su" else kind
    fields: dict[str, Any] = {"kind": kind, "theta": float(p.get("rope_theta") or theta)}
    part = p.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    fields["fraction"] = fraction if kind == "default" or part is None else float(part)
    if kind in SCALED:
        length = raw.get("original_max_position_embeddings")  # has precedence, as in transformers
        length = length or p.get("original_max_position_embeddings")
        fields["original_context"] = int(length or raw["max_position_embeddings"])
    if kind in ("linear", "llama3"):
        fields["factor"] = float(_need(p, "factor"))
    match kind:
        case "default" | "linear":
            pass
        case "llama3":
            fields["low_freq_factor"] = float(_need(p, "low_freq_factor"))
            fields["high_freq_factor"] = float(_need(p, "high_freq_factor"))
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
        case _:
            raise ValueError(
                "huggingface.load: rope_type must be one of default, linear, llama3, yarn, "
                f"longrope, got rope_type={kind!r}"
            )
    return Rope(**fields)


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
    nested = "full_attention" in p or "sliding_attention" in p
    outer = (p.get("full_attention") or {}) if nested else p
    inner = (p.get("sliding_attention") or {}) if nested else {}
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
