"""What every model is made of: linear, embedding, two norms."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.models.taps import Tap, probe
from jaxllm.weights.dense import Dense
from jaxllm.weights.matmul import gather_rows, matmul
from jaxllm.weights.planes.adaptive_planes import AdaptivePlanes

Activation = Literal[
    "silu", "gelu", "gelu_tanh", "quick_gelu", "gelu_10", "relu", "relu2", "relu6", "leaky_relu",
    "hardswish", "laplace", "linear", "mish", "sigmoid", "sqrtsoftplus", "tanh",
]  # fmt: skip


def quick_gelu(x: jax.Array) -> jax.Array:
    """The first approximation of GELU (arXiv:1606.08415, section 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu_10(x: jax.Array) -> jax.Array:
    """GELU between -10 and 10 (arXiv:2004.09602, section 4)."""
    return jnp.clip(jax.nn.gelu(x, approximate=False), -10.0, 10.0)


def relu2(x: jax.Array) -> jax.Array:
    """ReLU squared (arXiv:2109.08668)."""
    return jnp.square(jax.nn.relu(x))


def laplace(x: jax.Array) -> jax.Array:
    """The Laplace function of Mega (arXiv:2209.10655, equation 16)."""
    return 0.5 * (1.0 + jax.lax.erf((x - 0.707107) / (0.282095 * 2.0**0.5)))


def linear(x: jax.Array) -> jax.Array:
    """What it is given."""
    return x


def sqrtsoftplus(x: jax.Array) -> jax.Array:
    """The root of softplus."""
    return jnp.sqrt(jax.nn.softplus(x))


ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
    "gelu_10": gelu_10,
    "relu": jax.nn.relu,
    "relu2": relu2,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "hardswish": jax.nn.hard_swish,
    "laplace": laplace,
    "linear": linear,
    "mish": jax.nn.mish,
    "sigmoid": jax.nn.sigmoid,
    "sqrtsoftplus": sqrtsoftplus,
    "tanh": jnp.tanh,
}


def default_positions(
    shape: tuple[int, ...],
    cache: Any,
    positions: Int[Array, "B T"] | None,
    lengths: Int[Array, " B"] | None,
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Where the tokens of a chunk stand and how many are real, with what was left out filled in."""
    B, T = shape
    if lengths is None:
        lengths = jnp.full((B,), T, jnp.int32)
    if positions is None:
        start = jnp.zeros((B,), jnp.int32) if cache is None else cache.lengths
        positions = start[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    return positions, lengths


def last_token(x: Float[Array, "B T D"], lengths: Int[Array, " B"]) -> Float[Array, "B D"]:
    """The row of each request's last real token."""
    return jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]


def broadcast_last(v: Float[Array, " N"], like: jax.Array) -> jax.Array:
    """`v` with axes of size 1 in front, ready to meet the last axis of `like`."""
    return jnp.expand_dims(v, range(like.ndim - 1))


def normal(rngs: nnx.Rngs | None, shape: tuple[int, ...], std: float, dtype):
    """Numbers to begin with, drawn in float32; without `rngs` their shape."""
    if rngs is None:  # `nnx.eval_shape` of a constructor finds the same, more slowly
        return jax.ShapeDtypeStruct(shape, dtype)
    return (std * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)


def weight(rngs: nnx.Rngs | None, shape: tuple[int, ...], std: float, dtype) -> Dense:
    """A weight of such rows."""
    rows = normal(rngs, shape, std, dtype)
    return jax.eval_shape(Dense, rows) if rngs is None else Dense(rows)


def constant(rngs: nnx.Rngs | None, N: int, value: float, dtype):
    """A vector of one number; without `rngs` its shape."""
    return jax.ShapeDtypeStruct((N,), dtype) if rngs is None else jnp.full((N,), value, dtype)


class Linear(nnx.Module):
    """`y = x @ w + bias`; `w` is a weight of any format (`jaxllm/weights/matmul.py`)."""

    def __init__(self, K: int, N: int, *, bias: bool = False, std: float, rngs: nnx.Rngs | None, dtype):
        self.w = nnx.Param(weight(rngs, (N, K), std, dtype))
        self.bias = nnx.Param(constant(rngs, N, 0.0, dtype)) if bias else None

    def __call__(
        self,
        x: Float[Array, "*B K"],
        tap: Tap | None = None,
        out_dtype=None,
        early: Float[Array, "*B K"] | None = None,
    ):
        """The product in `out_dtype` (that of `x` if None).

        early: what `x` was before the last part of a block was added; where it is given, a weight that
          chooses its width looks at it instead (`weights/planes/adaptive_planes.py`).
        """
        out_dtype = x.dtype if out_dtype is None else out_dtype
        x, w = probe(tap, "in", x), self.w.get_value()
        if isinstance(w, AdaptivePlanes) and w.chooses(x):
            seen = probe(tap, "seen", x if early is None else early)
            w = w.read(probe(tap, "high", w.is_high(seen)))
        if self.bias is None:
            y = matmul(x, w, out_dtype)
        else:
            y = matmul(x, w, jnp.float32)
            bias = self.bias.get_value().astype(jnp.float32)
            y = (y + broadcast_last(bias, y)).astype(out_dtype)
        return probe(tap, "out", y)


def early_input(
    norm: Callable[[jax.Array], jax.Array], early: jax.Array | None, *linears: Linear
) -> jax.Array | None:
    """What `Linear` takes as `early`: the norm of a residual stream, None where no linear looks at it."""
    weights = [linear.w.get_value() for linear in linears]
    looks = any(isinstance(w, AdaptivePlanes) and w.early for w in weights)
    return norm(early) if looks and early is not None else None


class Embedding(nnx.Module):
    """A table read by token, and, when the head is tied, multiplied by as well.

    It is stored as the weight [D, V] of that head, whose rows [V, D] are the tokens'.
    """

    def __init__(self, V: int, D: int, *, std: float, rngs: nnx.Rngs | None, dtype):
        self.table = nnx.Param(weight(rngs, (V, D), std, dtype))

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        return gather_rows(self.table.get_value(), tokens)

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The tied head: float32 logits."""
        return matmul(x, self.table.get_value(), jnp.float32)


class RmsNorm(nnx.Module):
    """`x / rms(x) * (offset + scale)` in float32, returned in `x`'s type (arXiv:1910.07467)."""

    def __init__(self, D: int, *, eps: float, offset: float = 0.0, rngs: nnx.Rngs | None, dtype):
        self.scale = nnx.Param(constant(rngs, D, 1.0 - offset, dtype))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        scale = self.scale.get_value().astype(jnp.float32) + self.offset
        return (y * broadcast_last(scale, y)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`(x - mean) / std * scale + bias` in float32, returned in `x`'s type (arXiv:1607.06450).

    affine: False leaves `scale` and `bias` out.
    """

    def __init__(self, D: int, *, eps: float, affine: bool = True, rngs: nnx.Rngs | None, dtype):
        self.scale = nnx.Param(constant(rngs, D, 1.0, dtype)) if affine else None
        self.bias = nnx.Param(constant(rngs, D, 0.0, dtype)) if affine else None
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        if self.scale is None or self.bias is None:
            return y.astype(x.dtype)
        scale = self.scale.get_value().astype(jnp.float32)
        bias = self.bias.get_value().astype(jnp.float32)
        return (y * broadcast_last(scale, y) + broadcast_last(bias, y)).astype(x.dtype)
