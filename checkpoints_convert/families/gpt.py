"""GPT-2 and OPT of Hugging Face, as tables for `Gpt`.

GPT-2's matrices are [in, out] and its q, k, v one of them; its files name tensors with
"transformer." in front or, the first ones, without, and hold causal masks (`attn.bias`), which are
no parameters. OPT's files name them with "model.decoder." or "decoder." in front.
"""

from typing import Any

from checkpoints_convert.families.family import Family, activation, row
from checkpoints_convert.json_fields import FLAG, NOT_NEGATIVE, SIZE, TEXT, TOKENS, null_or
from jaxllm.models.gpt import Config, Gpt


def their_activation(name: str) -> str:
    """The name that these families have for an activation of ours."""
    return "gelu_new" if name == "gelu_tanh" else name


def gpt2(raw: dict[str, Any]) -> Config:
    if raw["add_cross_attention"]:
        raise ValueError("huggingface.load: gpt2 must be a decoder, got add_cross_attention=True")
    width = raw["n_embd"]
    return Config(
        layers=raw["n_layer"],
        width=width,
        heads=raw["n_head"],
        ffn=raw["n_inner"] or 4 * width,
        vocab=raw["vocab_size"],
        context=raw["n_positions"],
        tied=bool(raw["tie_word_embeddings"]),
        activation=activation(raw["activation_function"]),
        norm_eps=float(raw["layer_norm_epsilon"]),
        attention_scale=None if raw["scale_attn_weights"] else 1.0,
        scale_by_layer=bool(raw["scale_attn_by_inverse_layer_idx"]),
    )


def gpt2_to(c: Config) -> dict[str, Any]:
    for name in ("norm_first", "final_norm", "bias", "norm_affine"):
        if not getattr(c, name):
            raise ValueError(f"huggingface.save: gpt2 must have {name}=True, got {name}=False")
    if c.embedding_width is not None or c.position_offset or c.attention_scale not in (None, 1.0):
        raise ValueError(
            "huggingface.save: gpt2 has no embedding_width, position_offset, attention_scale, "
            f"got {c.embedding_width=}, {c.position_offset=}, {c.attention_scale=}"
        )
    return {
        "vocab_size": c.vocab,
        "n_positions": c.context,
        "n_ctx": c.context,
        "n_embd": c.width,
        "n_layer": c.layers,
        "n_head": c.heads,
        "n_inner": None if c.ffn == 4 * c.width else c.ffn,
        "activation_function": their_activation(c.activation),
        "layer_norm_epsilon": c.norm_eps,
        "scale_attn_weights": c.attention_scale is None,
        "scale_attn_by_inverse_layer_idx": c.scale_by_layer,
        "tie_word_embeddings": c.tied,
    }


def opt(raw: dict[str, Any]) -> Config:
    width, narrow = raw["hidden_size"], raw["word_embed_proj_dim"]
    first = bool(raw["do_layer_norm_before"])
    return Config(
        layers=raw["num_hidden_layers"],
        width=width,
        heads=raw["num_attention_heads"],
        ffn=raw["ffn_dim"],
        vocab=raw["vocab_size"],
        context=raw["max_position_embeddings"],
        tied=bool(raw["tie_word_embeddings"]),
        embedding_width=None if narrow in (None, width) else narrow,
        position_offset=2,
        activation=activation(raw["activation_function"]),
        norm_first=first,
        final_norm=first and not raw["_remove_final_layer_norm"],
        bias=bool(raw["enable_bias"]),
        norm_affine=bool(raw["layer_norm_elementwise_affine"]),
    )


def opt_to(c: Config) -> dict[str, Any]:
    if c.position_offset != 2 or c.attention_scale is not None or c.scale_by_layer:
        raise ValueError(
            "huggingface.save: opt has position_offset=2 and scores scaled by the head size alone, "
            f"got {c.position_offset=}, {c.attention_scale=}, {c.scale_by_layer=}"
        )
    if c.norm_eps != 1e-5 or (c.final_norm and not c.norm_first):
        raise ValueError(
            "huggingface.save: opt has norm_eps=1e-05 and a final norm only with norms first, "
            f"got {c.norm_eps=}, {c.final_norm=}, {c.norm_first=}"
        )
    return {
        "vocab_size": c.vocab,
        "max_position_embeddings": c.context,
        "hidden_size": c.width,
        "word_embed_proj_dim": c.width if c.embedding_width is None else c.embedding_width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "ffn_dim": c.ffn,
        "activation_function": their_activation(c.activation),
        "do_layer_norm_before": c.norm_first,
        "_remove_final_layer_norm": c.norm_first and not c.final_norm,
        "enable_bias": c.bias,
        "layer_norm_elementwise_affine": c.norm_affine,
        "tie_word_embeddings": c.tied,
    }


def norm(theirs: str, ours: str):
    """The two rows of a layer norm."""
    return row(f"{theirs}.weight", f"{ours}.scale"), row(f"{theirs}.bias", f"{ours}.bias")


def linear(theirs: str, *ours: str, transposed: bool = False):
    """The two rows of a linear, or of several stacked in one."""
    return (
        row(f"{theirs}.weight", *(f"{name}.w" for name in ours), transposed=transposed),
        row(f"{theirs}.bias", *(f"{name}.bias" for name in ours)),
    )


H, X = "transformer.h.{i}.", "layers.{i}."
GPT2_ROWS = (
    row("transformer.wte.weight", "embedding.table"),
    row("transformer.wpe.weight", "positions.table"),
    *norm(H + "ln_1", X + "attention_norm"),
    *linear(H + "attn.c_attn", *(X + f"attention.{name}" for name in "qkv"), transposed=True),
    *linear(H + "attn.c_proj", X + "attention.o", transposed=True),
    *norm(H + "ln_2", X + "mlp_norm"),
    *linear(H + "mlp.c_fc", X + "mlp.up", transposed=True),
    *linear(H + "mlp.c_proj", X + "mlp.down", transposed=True),
    *norm("transformer.ln_f", "norm"),
    row("lm_head.weight", "head.w"),
)

D = "model.decoder."
L = D + "layers.{i}."
OPT_ROWS = (
    row(D + "embed_tokens.weight", "embedding.table"),
    row(D + "embed_positions.weight", "positions.table"),
    row(D + "project_in.weight", "project_in.w"),
    row(D + "project_out.weight", "project_out.w"),
    *norm(D + "final_layer_norm", "norm"),
    *norm(L + "self_attn_layer_norm", X + "attention_norm"),
    *linear(L + "self_attn.q_proj", X + "attention.q"),
    *linear(L + "self_attn.k_proj", X + "attention.k"),
    *linear(L + "self_attn.v_proj", X + "attention.v"),
    *linear(L + "self_attn.out_proj", X + "attention.o"),
    *norm(L + "final_layer_norm", X + "mlp_norm"),
    *linear(L + "fc1", X + "mlp.up"),
    *linear(L + "fc2", X + "mlp.down"),
    row("lm_head.weight", "head.w"),
)

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    model=Gpt,
    config=gpt2,
    to_hf_config=gpt2_to,
    rows=GPT2_ROWS,
    defaults={
        "vocab_size": 50_257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "bos_token_id": 50_256,
        "eos_token_id": 50_256,
    },
    fields={
        "vocab_size": SIZE,
        "n_positions": SIZE,
        "n_embd": SIZE,
        "n_layer": SIZE,
        "n_head": SIZE,
        "n_inner": null_or(SIZE),
        "activation_function": TEXT,
        "layer_norm_epsilon": NOT_NEGATIVE,
        "scale_attn_weights": FLAG,
        "scale_attn_by_inverse_layer_idx": FLAG,
        "add_cross_attention": FLAG,
        "tie_word_embeddings": FLAG,
        "eos_token_id": TOKENS,
    },
    layers=("n_layer",),
    ignored=(r"\.attn\.(bias|masked_bias)$",),
    prefixes=("transformer.",),
)
OPT = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    model=Gpt,
    config=opt,
    to_hf_config=opt_to,
    rows=OPT_ROWS,
    defaults={
        "vocab_size": 50_272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": None,
        "num_attention_heads": 12,
        "activation_function": "relu",
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
    },
    fields={
        "vocab_size": SIZE,
        "hidden_size": SIZE,
        "num_hidden_layers": SIZE,
        "ffn_dim": SIZE,
        "max_position_embeddings": SIZE,
        "do_layer_norm_before": FLAG,
        "_remove_final_layer_norm": FLAG,
        "word_embed_proj_dim": null_or(SIZE),
        "num_attention_heads": SIZE,
        "activation_function": TEXT,
        "enable_bias": FLAG,
        "layer_norm_elementwise_affine": FLAG,
        "tie_word_embeddings": FLAG,
        "eos_token_id": TOKENS,
    },
    ignored=(),
    prefixes=("model.decoder.", "decoder."),
)

FAMILIES = (GPT2, OPT)
