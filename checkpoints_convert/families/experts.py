"""The models of experts of Hugging Face as tables for `Decoder`: Mixtral, Qwen 3 MoE, GPT-OSS.

Files of the first two have a tensor for each expert. Those of a model that was written as transformers 5
holds it, all experts of a layer in `experts.gate_up_proj` [X, 2F, D] and `experts.down_proj` [X, D, F], are
read too, as views of each expert's. GPT-OSS has no other: there they are [X, D, 2F], the columns of gate and
up by turns, and [X, F, D], or the same transposed in codes of MXFP4 (`quantized/mxfp4.py`).

Letters: X experts, D width, F inner width of an expert.
"""

import re
from typing import Any

import numpy as np

from checkpoints_convert import json_fields as kinds
from checkpoints_convert.families.family import Entry, Family, Tensors, row
from checkpoints_convert.families.llama_line import (
    ATTENTION,
    COMMON,
    FIELDS,
    HEAD,
    LAYER,
    MLP,
    NORMS,
    QK_NORMS,
    QWEN,
    QWEN_FIELDS,
    decoder,
    mistral_to,
    qwen_to,
    types_every,
    windows,
    written,
)
from checkpoints_convert.families.rope import ropes
from jaxllm.models.decoder import Config, Decoder


def mixtral(raw: dict[str, Any]) -> Config:
    return decoder(
        raw,
        ropes(raw, theta=1_000_000.0),
        windows=windows(raw, None),
        experts=raw["num_local_experts"],
        experts_per_token=raw["num_experts_per_tok"],
        expert_ffn=raw["intermediate_size"],
    )


def mixtral_to(c: Config) -> dict[str, Any]:
    own = {"intermediate_size": c.expert_ffn, "num_local_experts": c.experts}
    return mistral_to(c) | own | {"num_experts_per_tok": c.experts_per_token}


def qwen3_moe(raw: dict[str, Any]) -> Config:
    bias, period, layers = raw["attention_bias"], raw["decoder_sparse_step"], raw["num_hidden_layers"]
    experts = raw["num_local_experts"] or raw["num_experts"] or 128  # transformers 5, or the files on the hub
    dense = set(raw["mlp_only_layers"] or ()) | {i for i in range(layers) if (i + 1) % period}
    return decoder(
        raw,
        ropes(raw),
        windows=windows(raw, None) if raw["use_sliding_window"] else (),
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        experts=experts,
        experts_per_token=raw["num_experts_per_tok"],
        expert_ffn=raw["moe_intermediate_size"],
        dense_layers=tuple(sorted(i for i in dense if i < layers)),
        renormalize=raw["norm_topk_prob"],
    )


def qwen3_moe_to(c: Config) -> dict[str, Any]:
    raw = qwen_to(c)
    del raw["layer_types"]  # here a window is in all layers or in none
    return raw | {
        "moe_intermediate_size": c.expert_ffn,
        "num_experts": c.experts,
        "num_experts_per_tok": c.experts_per_token,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(c.dense_layers),
        "norm_topk_prob": c.renormalize,
    }


def gpt_oss(raw: dict[str, Any]) -> Config:
    if raw["swiglu_alpha"] != QUICK_GELU:
        got = raw["swiglu_alpha"]
        raise ValueError(f"huggingface.load: swiglu_alpha must be {QUICK_GELU}, got {got}")
    raw = raw | {"rope_parameters": raw.get("rope_parameters") or YARN}
    bias = raw["attention_bias"]
    return decoder(
        raw,
        ropes(raw, theta=150_000.0),
        windows=windows(raw, types_every(raw, 2)),
        activation="quick_gelu",
        qkv_bias=bias,
        out_bias=bias,
        experts=raw["num_local_experts"],
        experts_per_token=raw["num_experts_per_tok"],
        expert_ffn=raw["intermediate_size"],
        expert_bias=True,
        glu_limit=float(raw["swiglu_limit"]),
        attention_sinks=True,
    )


def gpt_oss_to(c: Config) -> dict[str, Any]:
    types = ["full_attention" if c.window(i) is None else "sliding_attention" for i in range(c.layers)]
    limit = {} if c.glu_limit is None else {"swiglu_limit": c.glu_limit}  # without, no GPT-OSS
    return (
        written(c, "head_dim", "sliding_window", "attention_bias")
        | limit
        | {
            "hidden_act": "silu",
            "intermediate_size": c.expert_ffn,
            "num_local_experts": c.experts,
            "num_experts_per_tok": c.experts_per_token,
            "swiglu_alpha": QUICK_GELU,
            "layer_types": types,
        }
    )


QUICK_GELU = 1.702
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def one_by_one(found: Tensors, gate: str, up: str, down: str) -> Tensors:
    """The tensors with those of all experts of a layer cut into each expert's, as views."""
    cut: Tensors = {}
    for name, value in found.items():
        match = re.fullmatch(r"(.*\bmlp\.experts)\.(gate_up|down)_proj(\.weight)?", name)
        if match is None or value.ndim != 3:
            cut[name] = value
            continue
        for e, rows in enumerate(value):
            if match[2] == "down":
                cut[f"{match[1]}.{e}.{down}.weight"] = rows
            else:
                cut[f"{match[1]}.{e}.{gate}.weight"], cut[f"{match[1]}.{e}.{up}.weight"] = _halves(rows)
    return cut


def _halves(rows):
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def mixtral_usual(found: Tensors) -> Tensors:
    """The tensors in Mixtral's own names."""
    found = one_by_one(found, "w1", "w3", "w2")
    router = {name: name.replace(".mlp.", ".block_sparse_moe.") for name in found}
    return {router[name]: value for name, value in found.items()}


def qwen3_moe_usual(found: Tensors) -> Tensors:
    """The tensors of Qwen, one for each expert."""
    return one_by_one(found, "gate_proj", "up_proj", "down_proj")


def gpt_oss_usual(found: Tensors) -> Tensors:
    """The tensors of GPT-OSS, one for each expert, gate, up and down, as the other families have them."""
    cut: Tensors = {}
    for name, value in found.items():
        match = re.fullmatch(r"(.*\bmlp\.experts)\.(gate_up|down)_proj(_blocks|_scales|_bias)?", name)
        if match is None:
            cut[name] = value
            continue
        block, both, last = match[1], match[2] == "gate_up", (match[3] or "_weight")[1:]
        rows = value.swapaxes(1, 2) if last == "weight" and value.ndim == 3 else value  # [X, N, ...]
        ours = {"gate_proj": rows[:, 0::2], "up_proj": rows[:, 1::2]} if both else {"down_proj": rows}
        for linear, of_all in ours.items():
            if last == "bias":
                cut[f"{block}.{linear}.biases"] = of_all
            else:
                cut |= {f"{block}.{e}.{linear}.{last}": one for e, one in enumerate(of_all)}
    return cut


def gpt_oss_flat(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json with the number of experts a token by one name: the first files have both."""
    per_token = raw.get("num_experts_per_tok", raw.get("experts_per_token"))
    return raw if per_token is None else raw | {"num_experts_per_tok": per_token}


def gpt_oss_written(entries: list[Entry]) -> list[Entry]:
    """What is written of GPT-OSS: the tensors of all experts of a layer together, as its files have them."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        match = re.fullmatch(r"(.*\.experts\.)(?:\d+\.)?(gate|up|down)_proj\.(weight|biases)", entry[0])
        if match is None:
            groups[entry[0]] = [entry]
        else:
            linear, last = (
                "down" if match[2] == "down" else "gate_up",
                "" if match[3] == "weight" else "_bias",
            )
            groups.setdefault(f"{match[1]}{linear}_proj{last}", []).append(entry)
    return [_together(name, group) if ".experts." in name else group[0] for name, group in groups.items()]


def _together(name: str, entries: list[Entry]) -> Entry:
    """One tensor of all experts, [X, K, N] of their [N, K]; of gate and up the outputs take turns."""
    bias, parts = name.endswith("_bias"), 2 if "gate_up" in name else 1
    _, one, dtype, _ = entries[0]
    each = len(entries) // parts
    shape = (one[0], parts * one[1]) if bias else (each, one[1], parts * one[0])

    def read() -> np.ndarray:
        arrays = [entry[3]() for entry in entries]
        if not bias:
            arrays = [np.stack(arrays[i : i + each]).swapaxes(1, 2) for i in range(0, len(arrays), each)]
        return np.stack(arrays, axis=-1).reshape(shape)

    return name, shape, dtype, read


def expert_rows(block: str, gate: str, up: str, down: str):
    """A layer's router, and each expert's three matrices."""
    names = {"gate": gate, "up": up, "down": down}
    return (
        row(LAYER + f"{block}.gate.weight", "layers.{i}.mlp.router.weight"),
        *(
            row(LAYER + f"{block}.experts.{{e}}.{theirs}.weight", f"layers.{{i}}.mlp.{ours}.{{e}}.w")
            for ours, theirs in names.items()
        ),
    )


LAYERS = ("num_hidden_layers", "num_local_experts")
EXPERTS = {"num_local_experts": kinds.SIZE, "num_experts_per_tok": kinds.SIZE}
MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    model=Decoder,
    config=mixtral,
    to_hf_config=mixtral_to,
    rows=(*HEAD, *NORMS, *ATTENTION, *expert_rows("block_sparse_moe", "w1", "w3", "w2")),
    fields=FIELDS | EXPERTS,
    layers=LAYERS,
    usual=mixtral_usual,
    defaults=COMMON
    | {
        "max_position_embeddings": 4096 * 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "eos_token_id": 2,
    },
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    model=Decoder,
    config=qwen3_moe,
    to_hf_config=qwen3_moe_to,
    rows=(
        *HEAD,
        *NORMS,
        *ATTENTION,
        *QK_NORMS,
        *MLP,
        *expert_rows("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
    fields=QWEN_FIELDS
    | EXPERTS
    | {
        "num_local_experts": kinds.null_or(kinds.SIZE),
        "num_experts": kinds.null_or(kinds.SIZE),
        "moe_intermediate_size": kinds.SIZE,
        "decoder_sparse_step": kinds.SIZE,
        "mlp_only_layers": kinds.null_or(kinds.list_of(kinds.COUNT)),
        "norm_topk_prob": kinds.FLAG,
    },
    layers=(*LAYERS, "num_experts"),
    usual=qwen3_moe_usual,
    defaults=QWEN
    | {
        "num_key_value_heads": 4,
        "num_local_experts": None,
        "num_experts": None,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "norm_topk_prob": False,
    },
)

OF_EXPERTS = LAYER + "mlp.experts."
GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    model=Decoder,
    config=gpt_oss,
    to_hf_config=gpt_oss_to,
    rows=(
        *HEAD,
        *NORMS,
        *ATTENTION,
        row(LAYER + "self_attn.sinks", "layers.{i}.attention.sinks"),
        row(LAYER + "mlp.router.weight", "layers.{i}.mlp.router.weight"),
        row(LAYER + "mlp.router.bias", "layers.{i}.mlp.router.bias"),
        *(
            one
            for name in ("gate", "up", "down")
            for one in (
                row(f"{OF_EXPERTS}{{e}}.{name}_proj.weight", f"layers.{{i}}.mlp.{name}.{{e}}.w"),
                row(f"{OF_EXPERTS}{name}_proj.biases", f"layers.{{i}}.mlp.{name}.biases"),
            )
        ),
    ),
    fields=FIELDS | EXPERTS | {"swiglu_alpha": kinds.POSITIVE, "swiglu_limit": kinds.POSITIVE},
    layers=LAYERS,
    flat=gpt_oss_flat,
    usual=gpt_oss_usual,
    as_written=gpt_oss_written,
    coded_experts=False,  # of MXFP4, all of a layer in one tensor
    defaults=COMMON
    | {
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "sliding_window": 128,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": QUICK_GELU,
        "swiglu_limit": 7.0,
    },
)

FAMILIES = (MIXTRAL, QWEN3_MOE, GPT_OSS)
