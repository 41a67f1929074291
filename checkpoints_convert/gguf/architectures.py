"""llama.cpp's architectures as tables: its keys and ours of config.json, and what it does to tensors.

An architecture is a Hugging Face family under other names: a row of the table says which key of the file is
which key of that family's config.json, the `gguf` package's own table which tensor is which
(`get_tensor_name_map`), and the family's loop makes the model. What is special is said once, here: llama.cpp
turns neighbouring elements of a head in its "llama", so rows of q and k are stored in that order; its norms
of Gemma hold 1 + scale; rotations that differ by frequency are tensors (`rope_freqs`, `rope_factors_long`,
`rope_factors_short`), which divide the frequencies as longrope's factors do.
"""

import dataclasses
import math
import re
from typing import Any

import numpy as np

from checkpoints_convert.families import gpt, llama_line
from checkpoints_convert.families.family import Family
from checkpoints_convert.json_fields import (
    ABOVE_ONE,
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SIZE,
    Kind,
    null_or,
    one_of,
)
from jaxllm.models.rope import Rope
from jaxllm.storage.metadata import excerpt

Metadata = dict[str, Any]
FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


@dataclasses.dataclass(frozen=True)
class Key:
    """A key after the architecture's name, its name in config.json, what it must be and is written as."""

    theirs: str
    config: str
    kind: Kind = SIZE
    number: type[int] | type[float] = int


COMMON = (
    Key("context_length", "max_position_embeddings"),
    Key("embedding_length", "hidden_size"),
    Key("block_count", "num_hidden_layers"),
    Key("feed_forward_length", "intermediate_size"),
    Key("attention.head_count", "num_attention_heads"),
    Key("attention.head_count_kv", "num_key_value_heads", null_or(SIZE)),
    Key("attention.key_length", "head_dim", null_or(SIZE)),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", NOT_NEGATIVE, float),
    Key("rope.freq_base", "rope_theta", null_or(ABOVE_ONE), float),
)
WINDOW = Key("attention.sliding_window", "sliding_window", null_or(COUNT))
CAPS = (
    Key("attn_logit_softcapping", "attn_logit_softcapping", null_or(POSITIVE), float),
    Key("final_logit_softcapping", "final_logit_softcapping", null_or(POSITIVE), float),
)
LOCAL = Key("rope.freq_base_swa", "rope_local_base_freq", null_or(ABOVE_ONE), float)
GPT2 = (
    Key("context_length", "n_positions"),
    Key("embedding_length", "n_embd"),
    Key("block_count", "n_layer"),
    Key("feed_forward_length", "n_inner"),
    Key("attention.head_count", "n_head"),
    Key("attention.layer_norm_epsilon", "layer_norm_epsilon", NOT_NEGATIVE, float),
)
SCALING = {  # after "rope.scaling."
    "type": null_or(one_of("none", "linear", "yarn", "longrope")),
    "factor": null_or(POSITIVE),
    "original_context_length": null_or(SIZE),
    "attn_factor": null_or(POSITIVE),
    "yarn_beta_fast": null_or(POSITIVE),
    "yarn_beta_slow": null_or(POSITIVE),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    pairs: rows of q and k stand in the order of neighbouring elements. norm_offset: what the scales of norms
    hold more than ours. partial: less than a head may be turned. wide_layers: a model of so many layers has
    queries scaled by width / heads (Gemma 27B). window: where the file says none.
    """

    name: str
    families: tuple[Family, ...]  # the first is what it is read as
    keys: tuple[Key, ...] = COMMON
    pairs: bool = False
    norm_offset: float = 0.0
    partial: bool = False
    wide_layers: int | None = None
    window: int | None = None

    @property
    def family(self) -> Family:
        return self.families[0]


ARCHITECTURES = (
    Architecture("llama", (llama_line.LLAMA, llama_line.MISTRAL), pairs=True),
    Architecture("qwen2", (llama_line.QWEN2,)),
    Architecture("qwen3", (llama_line.QWEN3,)),
    Architecture(
        "gemma2", (llama_line.GEMMA2,), (*COMMON, WINDOW, *CAPS), norm_offset=1.0, wide_layers=46, window=4096
    ),
    Architecture(
        "gemma3",
        (llama_line.GEMMA3_TEXT, llama_line.GEMMA3),
        (*COMMON, WINDOW, LOCAL, CAPS[1]),
        norm_offset=1.0,
        wide_layers=62,
    ),
    Architecture("phi3", (llama_line.PHI3,), (*COMMON, WINDOW), partial=True),
    Architecture("gpt2", (gpt.GPT2,), GPT2),
)


def architecture_of(metadata: Metadata) -> Architecture:
    """What `general.architecture` names."""
    name = metadata.get("general.architecture")
    found = next((one for one in ARCHITECTURES if isinstance(name, str) and one.name == name), None)
    if found is None:
        known = ", ".join(one.name for one in ARCHITECTURES)
        raise ValueError(f"gguf.load: general.architecture must be one of {known}, got {excerpt(name)}")
    return found


def names_of(arch: Architecture, layers: int):
    """A function from the names of Hugging Face to the files'."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH[arch.name.upper()], layers)

    def name_of(theirs: str) -> str:
        # the table has no head for Gemma 2, which is always tied
        return names.get_name(theirs, try_suffixes=(".weight", ".bias")) or HEAD

    return name_of


def config_of(
    arch: Architecture, metadata: Metadata, shapes: dict[str, tuple[int, ...]], factors: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The config.json that keys and tensors amount to.

    shapes: of all tensors by name. factors: those among them that are about rotations.
    """
    if EMBEDDING not in shapes:
        raise ValueError(f"gguf.load: a model must have {EMBEDDING}, got none")
    raw: dict[str, Any] = {}
    for key in arch.keys:
        value = _value(metadata, f"{arch.name}.{key.theirs}", key.kind)
        if value is not None:
            raw[key.config] = value
    raw["vocab_size"] = shapes[EMBEDDING][0]
    raw["tie_word_embeddings"] = HEAD not in shapes
    raw["attention_bias"] = "blk.0.attn_q.bias" in shapes
    raw["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    raw["sliding_window"] = raw.get("sliding_window", arch.window) or None  # 0 is none
    if arch.family is gpt.GPT2:
        return raw
    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    # what a file leaves out means what it means to llama.cpp, not to transformers
    raw = {"num_key_value_heads": heads, "head_dim": width // heads, "rope_theta": 10_000.0} | raw
    if arch.wide_layers is not None:
        wide = raw["num_hidden_layers"] == arch.wide_layers
        raw["query_pre_attn_scalar"] = width // heads if wide else raw["head_dim"]
    raw["rope_scaling"] = _scaling(arch, metadata, raw, factors)
    raw["original_max_position_embeddings"] = raw["rope_scaling"].get("original_max_position_embeddings")
    return raw


def _value(metadata: Metadata, key: str, kind: Kind):
    """What a key says, if it is of its kind."""
    value = metadata.get(key)
    value = _shortest(np.float32(value)) if isinstance(value, float) else value
    if kind.holds(value):
        return value
    told = "" if key not in metadata else f", got {excerpt(value)}"
    raise ValueError(f"gguf.load: {key} must be {kind.must}{told or ', got none'}")


def _shortest(value: np.floating) -> float:
    """The shortest number that a float32 is the nearest to: 1e-06, and not 9.999999974752427e-07."""
    return float(str(value))


def _scaling(
    arch: Architecture, metadata: Metadata, raw: dict[str, Any], factors: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The rope dictionary of config.json."""
    p = {name: _value(metadata, f"{arch.name}.rope.scaling.{name}", kind) for name, kind in SCALING.items()}
    kind, head_dim = p["type"] or "none", raw["head_dim"]
    turned = _value(metadata, f"{arch.name}.rope.dimension_count", null_or(SIZE)) or head_dim
    if turned > head_dim or (turned < head_dim and not arch.partial):
        raise ValueError(
            f"gguf.load: {arch.name}.rope.dimension_count must be the head size {head_dim}, got {turned}"
        )
    common: dict[str, Any] = {"partial_rotary_factor": turned / head_dim}
    length = p["original_context_length"] or raw["max_position_embeddings"]
    if factors:
        given = {name: [_shortest(x) for x in value.flat] for name, value in factors.items()}
        if set(given) not in ({FREQS}, {LONG, SHORT}) or kind not in ("none", "longrope"):
            raise ValueError(
                f"gguf.load: factors must be {FREQS}, or {LONG} and {SHORT}, of a rotation not scaled "
                f"otherwise, got {', '.join(sorted(given))} and {kind}"
            )
        return common | {
            "rope_type": "longrope",
            "short_factor": given.get(FREQS, given.get(SHORT)),
            "long_factor": given.get(FREQS, given.get(LONG)),
            "attention_factor": p["attn_factor"] or 1.0,
            "original_max_position_embeddings": length,
        }
    factor = p["factor"] or 1.0
    if kind == "none" or factor == 1.0:
        return common | {"rope_type": "default"}
    if kind == "linear":
        return common | {"rope_type": "linear", "factor": factor}
    if kind == "longrope":
        raise ValueError(f"gguf.load: longrope must have {LONG} and {SHORT}, got neither")
    return common | {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": length,
        "attention_factor": (p["attn_factor"] or 1.0) * yarn_attention(factor),
        "beta_fast": p["yarn_beta_fast"] or 32.0,
        "beta_slow": p["yarn_beta_slow"] or 1.0,
    }


def yarn_attention(factor: float) -> float:
    """What llama.cpp multiplies cos and sin by of itself, whatever `yarn_attn_factor` says."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def metadata_of(
    arch: Architecture, config: Any, raw: dict[str, Any]
) -> tuple[Metadata, dict[str, np.ndarray]]:
    """The keys that say a config, and the tensors about rotations. raw: it as config.json."""
    raw = dict(raw)
    raw.setdefault("n_inner", None)
    raw["n_inner"] = raw["n_inner"] or config.ffn
    rope, local = getattr(config, "rope", None), getattr(config, "local_rope", None)
    if rope is not None:
        raw |= {
            "rope_theta": rope.theta,
            "rope_local_base_freq": (local or rope).theta,
            "head_dim": config.head_dim,
        }
    metadata: Metadata = {}
    for key in arch.keys:
        value = raw.get(key.config)
        if value is not None:
            metadata[f"{arch.name}.{key.theirs}"] = key.number(value)
    metadata[f"{arch.name}.vocab_size"] = config.vocab
    if rope is None:
        return metadata, {}
    metadata[f"{arch.name}.attention.value_length"] = config.head_dim
    metadata[f"{arch.name}.rope.dimension_count"] = rope.rotary(config.head_dim)
    scaling, factors = _scaling_of(rope, config.head_dim)
    return metadata | {f"{arch.name}.rope.scaling.{name}": value for name, value in scaling.items()}, factors


def _scaling_of(rope: Rope, head_dim: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The keys and tensors of a rotation."""
    match rope.kind:
        case "linear":
            return {"type": "linear", "factor": rope.factor}, {}
        case "llama3":
            plain = dataclasses.replace(rope, kind="default")
            return {}, {FREQS: plain.frequencies(head_dim) / rope.frequencies(head_dim)}
        case "yarn":
            scaling = {
                "type": "yarn",
                "factor": rope.factor,
                "original_context_length": rope.original_context,
            }
            scaling |= {"yarn_beta_fast": rope.beta_fast, "yarn_beta_slow": rope.beta_slow}
            more = rope.attention_factor / yarn_attention(rope.factor)
            return scaling | ({} if abs(more - 1) < 1e-6 else {"attn_factor": more}), {}
        case "longrope":
            scaling = {"original_context_length": rope.original_context, "attn_factor": rope.attention_factor}
            if rope.short_factors == rope.long_factors and rope.attention_factor == 1.0:
                return {}, {FREQS: np.asarray(rope.long_factors)}
            return scaling, {LONG: np.asarray(rope.long_factors), SHORT: np.asarray(rope.short_factors)}
    return {}, {}


def rows_in_order(
    arch: Architecture, config: Any, name: str, rows: np.ndarray, *, to_file: bool = False
) -> np.ndarray:
    """Rows of the leaf `name` in our order, or in the file's: q and k differ in some architectures."""
    turned = re.search(r"\.attention\.([qk])\.(w|bias)$", name) if arch.pairs else None
    if turned is None:
        return rows
    heads = config.heads if turned[1] == "q" else config.kv_heads
    half = len(rows) // heads // 2
    sizes = (
        (heads, 2, half) if to_file else (heads, half, 2)
    )  # halves (0, 2, ..., 1, 3, ...), or pairs (0, 1, ...)
    return rows.reshape(*sizes, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
