"""T5 v1.0 and v1.1 of Hugging Face, as a table for `T5`.

The embedding is `shared`, of which older files hold copies under the encoder and the decoder.
transformers before 5 tells the versions apart by `tie_word_embeddings`; transformers 5 writes that
as true for both, and `scale_decoder_outputs` says which it is. Both are read, and written.
"""

from typing import Any

from checkpoints_convert.families.family import Family, activation, row
from checkpoints_convert.families.gpt import their_activation
from checkpoints_convert.json_fields import COUNT, FLAG, NOT_NEGATIVE, SIZE, TEXT, TOKENS, null_or
from jaxllm.models.t5 import T5, Config


def t5(raw: dict[str, Any]) -> Config:
    scaled = raw.get("scale_decoder_outputs")
    scaled = bool(raw["tie_word_embeddings"] if scaled is None else scaled)
    gated, _, act = raw["feed_forward_proj"].rpartition("-")
    if gated not in ("", "gated"):
        raise ValueError(
            "huggingface.load: feed_forward_proj must be an activation or gated-<activation>, "
            f"got {raw['feed_forward_proj']!r}"
        )
    # subtle: what the first files call gated-gelu is the tanh form
    act = "gelu_new" if (gated, act) == ("gated", "gelu") else act
    start = raw.get("decoder_start_token_id")
    start = raw["pad_token_id"] if start is None else start
    if start is None:
        raise ValueError("huggingface.load: t5 must have decoder_start_token_id or pad_token_id, got neither")
    if start >= raw["vocab_size"]:
        raise ValueError(
            "huggingface.load: decoder_start_token_id must be below vocab_size, "
            f"got {start}, vocab_size={raw['vocab_size']}"
        )
    return Config(
        encoder_layers=raw["num_layers"],
        layers=raw["num_decoder_layers"] or raw["num_layers"],
        width=raw["d_model"],
        heads=raw["num_heads"],
        head_dim=raw["d_kv"],
        ffn=raw["d_ff"],
        vocab=raw["vocab_size"],
        tied=bool(raw["tie_word_embeddings"]) and scaled,
        head_scale=raw["d_model"] ** -0.5 if scaled else 1.0,
        gated=gated == "gated",
        activation=activation(act),
        buckets=raw["relative_attention_num_buckets"],
        max_distance=raw["relative_attention_max_distance"],
        norm_eps=float(raw["layer_norm_epsilon"]),
        decoder_start=start,
    )


def t5_to(c: Config) -> dict[str, Any]:
    if c.head_scale not in (1.0, c.width**-0.5) or c.tied != (c.head_scale != 1.0):
        raise ValueError(
            "huggingface.save: t5 scales what a tied head reads by 1 / sqrt(width), and no other, "
            f"got {c.tied=}, {c.head_scale=}"
        )
    act = their_activation(c.activation)
    # subtle: gated-gelu is the tanh form
    act = f"gated-{'gelu' if act == 'gelu_new' else act}" if c.gated else act
    return {
        "vocab_size": c.vocab,
        "d_model": c.width,
        "d_kv": c.head_dim,
        "d_ff": c.ffn,
        "num_layers": c.encoder_layers,
        "num_decoder_layers": c.layers,
        "num_heads": c.heads,
        "relative_attention_num_buckets": c.buckets,
        "relative_attention_max_distance": c.max_distance,
        "layer_norm_epsilon": c.norm_eps,
        "feed_forward_proj": act,
        "is_encoder_decoder": True,
        "decoder_start_token_id": c.decoder_start,
        "pad_token_id": c.decoder_start,
        "tie_word_embeddings": c.tied,
        "scale_decoder_outputs": c.head_scale != 1.0,
    }


def layer(theirs: str, ours: str, parts: tuple[str, ...]):
    """The rows of one layer, whose parts stand in this order."""
    rows = []
    for number, part in enumerate(parts):
        inner = f"{theirs}.layer.{number}"
        rows.append(row(f"{inner}.layer_norm.weight", f"{ours}.{part}_norm.scale"))
        if part == "mlp":
            inner = f"{inner}.DenseReluDense"
            gate = f"{ours}.mlp.gate.w"
            rows.append(row(f"{inner}.wi.weight", f"{ours}.mlp.up.w", unless=gate))
            rows.append(row(f"{inner}.wi_0.weight", gate))
            rows.append(row(f"{inner}.wi_1.weight", f"{ours}.mlp.up.w", when=gate))
            rows.append(row(f"{inner}.wo.weight", f"{ours}.mlp.down.w"))
        else:
            inner = f"{inner}.{'SelfAttention' if part == 'attention' else 'EncDecAttention'}"
            rows += [row(f"{inner}.{name}.weight", f"{ours}.{part}.{name}.w") for name in "qkvo"]
    return rows


RELATIVE = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
FAMILY = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    model=T5,
    config=t5,
    to_hf_config=t5_to,
    rows=(
        row("shared.weight", "embedding.table"),
        row(f"encoder.{RELATIVE}", "encoder.relative.table"),
        row(f"decoder.{RELATIVE}", "relative.table"),
        *layer("encoder.block.{i}", "encoder.layers.{i}", ("attention", "mlp")),
        *layer("decoder.block.{i}", "layers.{i}", ("attention", "cross", "mlp")),
        row("encoder.final_layer_norm.weight", "encoder.norm.scale"),
        row("decoder.final_layer_norm.weight", "norm.scale"),
        row("lm_head.weight", "head.w"),
    ),
    defaults={
        "vocab_size": 32_128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_decoder_layers": None,
        "num_heads": 8,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "pad_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    },
    fields={
        "vocab_size": SIZE,
        "d_model": SIZE,
        "d_kv": SIZE,
        "d_ff": SIZE,
        "num_layers": SIZE,
        "num_decoder_layers": null_or(SIZE),
        "num_heads": SIZE,
        "relative_attention_num_buckets": SIZE,
        "relative_attention_max_distance": SIZE,
        "layer_norm_epsilon": NOT_NEGATIVE,
        "feed_forward_proj": TEXT,
        "decoder_start_token_id": null_or(COUNT),
        "pad_token_id": null_or(COUNT),
        "eos_token_id": TOKENS,
        "tie_word_embeddings": FLAG,
        "scale_decoder_outputs": null_or(FLAG),
    },
    layers=("num_layers", "num_decoder_layers"),
    ignored=(
        r"^(en|de)coder\.embed_tokens\.weight$",
        # written by early versions, never read
        r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
    ),
    # converters that keep one of equal tensors do not all keep this one
    aliases=(
        ("shared.weight", "encoder.embed_tokens.weight"),
        ("shared.weight", "decoder.embed_tokens.weight"),
    ),
    prefixes=("",),
)

FAMILIES = (FAMILY,)
