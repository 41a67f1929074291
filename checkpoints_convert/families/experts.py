"""The models of experts of Hugging Face as tables for `Decoder`: Mixtral, Qwen 3 MoE.

Files have a tensor for each expert. Those of a model that was written as transformers 5 holds it, all
experts of a layer in `experts.gate_up_proj` [X, 2F, D] and `experts.down_proj` [X, D, F], are read too, as
views of each expert's.
"""

import re
from typing import Any

from checkpoints_convert import json_fields as kinds
from checkpoints_convert.families.family import Family, Tensors, row
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
    windows,
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

FAMILIES = (MIXTRAL, QWEN3_MOE)
