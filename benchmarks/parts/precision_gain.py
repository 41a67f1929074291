"""What there is to gain from choosing bits by token: how errors are spread over tokens; outliers put in."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from jaxllm.models.decoder import Decoder
from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.models.taps import linear_io
from jaxllm.precision.estimators import (
    bits_of_projection,
    bits_saved,
    errors,
    fit_line,
    fit_projection,
    random_projection,
)
from jaxllm.weights.dense import Dense
from jaxllm.weights.planes.adaptive_planes import norm
from jaxllm.weights.planes.bit_planes import BitPlanes

ROWS = (8, 16, 64)


def with_outliers(model: Decoder, strength: float, channels: int, seed: int) -> Decoder:
    """The same function with some channels of what q, k, v, gate and up read made larger, as large models do.

    A power of two: not a bit of what it computes changes before it is quantized.
    """
    graph, state = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(jnp.array, state))
    rng, weights = np.random.default_rng(seed), linear_weights(model)
    new: dict[str, Dense] = {}
    for i, layer in enumerate(model.layers):
        readers = (("attention", layer.attention_norm, "qkv"), ("mlp", layer.mlp_norm, ("gate", "up")))
        for part, its_norm, names in readers:
            at = rng.choice(model.config.width, channels, replace=False)
            scale = its_norm.scale.get_value()
            its_norm.scale.set_value(scale.at[at].multiply(jnp.asarray(strength, scale.dtype)))
            for name in names:
                full = f"layers.{i}.{part}.{name}"
                rows = weights[full].rows
                new[full] = Dense(rows.at[:, at].multiply(jnp.asarray(1 / strength, rows.dtype)))
    return replace_weights(model, new)


def gains(nested, seen: np.ndarray, unseen: np.ndarray) -> list[dict[str, Any]]:
    """Of each linear, from its narrowest width to the next, half of the tokens choosing, on unseen text.

    variation: standard deviation of errors over their mean. exact, line, projections: bits saved, none taken
    off. reads: bits that a row of a projection reads.
    """

    @jax.jit
    def inputs_of(tokens):
        inputs: dict[str, jax.Array] = {}
        nested(tokens, tap=linear_io(inputs), logits="none")
        return inputs

    fit_on, look_at = (inputs_of(jnp.asarray(rows)) for rows in (seen, unseen))
    found = []
    for name, w in tqdm(linear_weights(nested).items(), "gains"):
        if not isinstance(w, BitPlanes):
            continue
        x, y = (side[name].astype(jnp.float32).reshape(-1, w.shape[0]) for side in (fit_on, look_at))
        low = w.seed_bits
        step = w.at(low + 1).dequantize_rows(jnp.float32) - w.at(low).dequantize_rows(jnp.float32)
        e, f = errors(x, step), errors(y, step)
        slope = fit_line(norm(x), e).slope
        one = {
            "linear": name,
            "variation": float(f.std() / f.mean()),
            "exact": bits_saved(f, f, [0.5]),
            "line": bits_saved(slope * norm(y), f, [0.5]),
            "reads": bits_of_projection(1, w.shape[1]),
        }
        for k in ROWS:
            G = fit_projection(random_projection(jax.random.key(len(found)), step, k), x, e)
            one[f"{k} rows"] = bits_saved(norm(y @ G.T), f, [0.5])
        found.append(one)
    return found


def by_kind(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The means over layers of `gains`, for each kind of linear."""
    rows = []
    for kind in dict.fromkeys(one["linear"].split(".")[-1] for one in found):
        own = [one for one in found if one["linear"].endswith("." + kind)]
        numbers = {k: float(np.mean([one[k] for one in own])) for k in own[0] if k != "linear"}
        rows.append({"linear": kind, **numbers})
    return rows
