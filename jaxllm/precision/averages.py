"""DP-LLM's second phase: how many bits each linear reads on average, for a target of the whole (section 2.4).

One number p a linear and target is trained, nothing else: y = (1 - f) x W_l + f x W_(l + 1) with l = floor(p)
and f = p - l. The authors add alpha (average - target)^2 to the loss, which the loss outweighs on steep
models, and decay p towards the middle. Here the target holds at every step: steps go along it, and what
leaves it is put back.

    minimise loss(p)   where   sum_i m_i p_i = target,   least_i <= p_i <= most_i       m_i: share of weights

`along` leaves of a gradient what compares linears: the loss a bit of memory would save here, less what it
saves on average where p may move. So Adam, which forgets how large gradients are, still sees who is owed.

Letters: L linears, S targets, B sequences, T tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32

from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.quant.text import Text
from jaxllm.training.trainer import train
from jaxllm.weights.planes.bit_planes import BitPlanes
from jaxllm.weights.planes.dense_widths import BlendedWidths, all_widths

HALVINGS = 40  # of the interval in which the shift is found: float32 has no more
TURNS = 8  # in which it is found who may move
AVERAGES = "['averages']"  # where the trainer finds them


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What averages must keep: sum_i share_i p_i == target, least <= p <= most."""

    share: Float32[Array, " L"]  # of the weights of all linears, fixed ones included
    least: Float32[Array, " L"]
    most: Float32[Array, " L"]
    target: Float32[Array, " S"]  # what these linears are to add up to

    def nearest(self, p: Float[Array, "L S"]) -> Float[Array, "L S"]:
        """The averages moved by one number a target and cut off at their bounds: the target holds."""
        low, high = (x[:, None] for x in (self.least, self.most))

        def halve(_, found):
            below, above = found
            middle = (below + above) / 2
            small = (self.share @ jnp.clip(p + middle[None], low, high)) < self.target
            return jnp.where(small, middle, below), jnp.where(small, above, middle)

        first = (low - p).min(axis=0), (high - p).max(axis=0)
        below, above = jax.lax.fori_loop(0, HALVINGS, halve, first)
        return jnp.clip(p + ((below + above) / 2)[None], low, high)

    def along(self, g: Float[Array, "L S"], p: Float[Array, "L S"]) -> Float[Array, "L S"]:
        """The gradient a share of memory, less its mean over the linears that may move against it."""
        share = self.share[:, None]
        owed = g / share
        at_least, at_most = p <= self.least[:, None], p >= self.most[:, None]
        free = jnp.ones(p.shape, bool)
        mean = jnp.zeros(p.shape[1])
        for _ in range(TURNS):
            weight = jnp.where(free, share, 0.0)
            mean = (weight * owed).sum(axis=0) / jnp.maximum(weight.sum(axis=0), 1e-30)
            stuck = (at_most & (owed <= mean[None])) | (at_least & (owed >= mean[None]))
            free = ~stuck
        return jnp.where(free, owed - mean[None], 0.0)


def projected_adam(bounds: Bounds, names: Sequence[str], *, learning_rate) -> optax.GradientTransformation:
    """Adam on what compares linears, kept at the target. names: linears as `bounds` has them."""
    adam, paths = optax.adam(learning_rate), [f"{AVERAGES}['{name}']" for name in names]

    def pack(tree: Mapping[str, jax.Array]) -> jax.Array:
        return jnp.stack([tree[path] for path in paths])

    def unpack(matrix: jax.Array) -> dict[str, jax.Array]:
        return {path: matrix[i] for i, path in enumerate(paths)}

    def init(params):
        return adam.init(pack(params))

    def update(grads, state, params=None):
        p = pack(params)
        moved, state = adam.update(bounds.along(pack(grads), p), state)
        return unpack(bounds.nearest(p + moved) - p), state

    return optax.GradientTransformation(init, update)


def fit_averages(
    model,
    weights: Mapping[str, BitPlanes],
    text: Text,
    bounds: Bounds,
    start: Float[np.ndarray, "L S"],
    *,
    steps: int,
    learning_rate: float,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """Each linear's average bits [S], from `start` on, moved to the nearest that hold the target.

    model: the model whose linears `weights` are, in the order of `bounds`. text: its sequences are read in
    turn, a batch a step. steps: 0 leaves the start. Memory: 2 bytes a weight and width.
    """
    first = bounds.nearest(jnp.asarray(start, jnp.float32))
    if not steps:
        return dict(zip(weights, np.asarray(first), strict=True))
    seed = jnp.stack([jnp.float32(w.seed_bits) for w in weights.values()])[:, None]
    blended = {name: BlendedWidths(all_widths(w), jnp.float32(0)) for name, w in weights.items()}
    # where the weights are: what lies elsewhere first would have the step compiled twice
    beside = jax.device_put(first - seed, everywhere(next(iter(weights.values())).planes.sharding))
    averages = {name: beside[i] for i, name in enumerate(weights)}
    beyond = dataclasses.replace(
        bounds,
        least=bounds.least - seed[:, 0],
        most=bounds.most - seed[:, 0],
        target=bounds.target - (bounds.share @ seed[:, 0])[None],
    )
    rate = optax.linear_schedule(learning_rate, 0.0, steps)

    read = [{"tokens": b.tokens["target"], "part": b.part["target"]} for b in text.batches()]

    trained = train(
        loss_by_target,
        {"averages": averages, "model": replace_weights(model, blended)},
        lambda step: read[step % len(read)],
        optimizer=projected_adam(beyond, list(averages), learning_rate=rate),
        steps=steps,
        progress=progress,
        trainable=is_average,
    )
    found = jnp.stack([trained.params["averages"][name] for name in weights]) + seed
    return dict(zip(weights, np.asarray(bounds.nearest(found)), strict=True))


def everywhere(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Whole arrays on all devices of a sharding."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding


def is_average(path: str, leaf: Any) -> bool:
    """Whether a leaf of {"averages", "model"} is trained."""
    return path.startswith(AVERAGES)


def loss_by_target(params: Mapping[str, Any], batch: Mapping[str, Array]) -> Array:
    """The sum over targets of the mean negative log-likelihood of tokens [B, T], in nats.

    batch: "tokens", and "part", 0 where a token only fills up.

    params: "model" has `BlendedWidths`, "averages" the numbers [S] that stand in them by the linear's name.
    """
    tokens, weights = batch["tokens"], linear_weights(params["model"])
    real = batch["part"][:, 1:] != 0

    @jax.checkpoint  # one target's activations at a time
    def of_target(averages: Mapping[str, Array]) -> Array:
        new = {name: dataclasses.replace(weights[name], average=p) for name, p in averages.items()}
        logits, _ = replace_weights(params["model"], new)(tokens[:, :-1])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.where(real, nll, 0.0).sum() / real.sum().astype(jnp.float32)

    return jax.lax.map(of_target, params["averages"]).sum()
