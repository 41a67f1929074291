"""A format: a base, and what rounding lost, in host memory, fetched for the inputs that matter to a token.

    y = x @ base + ((x * M) @ Q) * S        Q: whole codes of it, one row an *input*;  S: one scale an output

M marks the k inputs of greatest |x|, as a calibrated table of thresholds tells them (arXiv:2412.20185,
sections 4.2 and 4.3). How ours differs: `quant/methods/dec_dec.py`.

Layout: codes q + 2**(bits - 1) packed along N (4 bits: code j of a word at bit 4 j, as in the paper), so that
what an input needs is one contiguous run; 16 bits are plain float16.

Letters: K inputs, N outputs, k inputs fetched a token, R tokens, *B any leading axes.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import compute_on
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Integer

from jaxllm.ops.packing import Packed, pack, unpack
from jaxllm.ops.search import better
from jaxllm.pytree import pytree, static

INPUTS_PER_CHUNK = 1024  # one selection is made among so many
SCALES_TRIED = 32  # for each output
TOKENS_PER_FETCH = 32  # whose rows are in memory at once
RESIDUAL_BITS = (2, 4, 8, 16)

Selector = Literal["bucket", "exact", "static", "random"]


@pytree
class HostResidual:
    """A [K, N] weight: any format, and the rest of it by input.

    holds: shape == base.shape == codes.shape; scale.shape == (N,); 0 <= k_chunk <= 1024
    """

    base: Any  # any weight format
    codes: Packed | jax.Array  # Packed [K, N], or float16 [K, N] for 16 bits
    scale: jax.Array  # float32 [N]
    selector_state: jax.Array | None  # what `select` takes: (b0, b15) [2], a score [K], or None
    k_chunk: int = static()  # inputs fetched of each 1024
    selector: Selector = static()  # how these are selected
    shape: tuple[int, int] = static()  # (K, N)
    dtype: object = static()  # numpy dtype: what it was quantized from

    def dequantize_rows(self, dtype=jnp.float32) -> jax.Array:
        """The base's rows [N, K]: what is left of the weight depends on the input."""
        return self.base.dequantize_rows(dtype)

    def partition_specs(self, spec: P) -> "HostResidual":
        """Where each leaf goes when the logical [K, N] axes are laid out as `spec`.

        The residual is cut along N only, also where the base is cut along K: then over the same devices.
        """
        K, N = spec
        axis = K if N is None else N
        codes = [P(None, axis, *[None] * (leaf.ndim - 2)) for leaf in jax.tree.leaves(self.codes)]
        state = [] if self.selector_state is None else [P(None)]
        leaves = [*jax.tree.leaves(self.base.partition_specs(spec)), *codes, P(axis), *state]
        return jax.tree.unflatten(jax.tree.structure(self), leaves)


def residual_scale(rest: Float[Array, "N K"], *, bits: int) -> Float[Array, " N"]:
    """For each output the scale of least squared error among max |rest| / P * (1 .. 32) / 32.

    P = 2**(bits - 1) - 1 is the greatest code; 16 bits need no scale (1). Holds two arrays of [N, K].
    """
    if bits == 16:
        return jnp.ones(rest.shape[0], jnp.float32)
    top = jnp.abs(rest).max(axis=1) / (2 ** (bits - 1) - 1)

    def closer(i, best):
        trial = top * ((i + 1).astype(jnp.float32) / SCALES_TRIED)
        here = jnp.square(rest - residual_codes(rest, trial, bits=bits) * trial[:, None]).sum(axis=1)
        return better((here, trial), best)

    start = jnp.full(top.shape, jnp.inf, jnp.float32), top
    return jax.lax.fori_loop(0, SCALES_TRIED, closer, start)[1]


def residual_codes(rest: Float[Array, "N K"], scale: Float[Array, " N"], *, bits: int) -> Float[Array, "N K"]:
    """The codes -P .. P nearest to the residual; 0 where the scale is 0."""
    top = 2 ** (bits - 1) - 1
    safe = jnp.where(scale > 0, scale, 1.0)[:, None]
    return jnp.where(scale[:, None] > 0, jnp.clip(jnp.round(rest / safe), -top, top), 0.0)


def encode(rest: Float[Array, "N K"], *, bits: int) -> tuple[Packed | jax.Array, jax.Array]:
    """What is stored of W - base: codes by input, and a scale an output.

    bits: 2, 4, 8 or 16 (float16 values, no scale to speak of).
    """
    if bits not in RESIDUAL_BITS:
        raise ValueError(f"host_residual.encode: bits must be 2, 4, 8 or 16, got {bits=}")
    scale = residual_scale(rest, bits=bits)
    if bits == 16:
        return rest.T.astype(jnp.float16), scale
    codes = residual_codes(rest, scale, bits=bits) + 2 ** (bits - 1)
    return pack(codes.T.astype(jnp.uint8), bits), scale


def decode(codes: Packed | jax.Array) -> jax.Array:
    """The whole codes of R (the values themselves for 16 bits), in float32."""
    if isinstance(codes, Packed):
        return unpack(codes).astype(jnp.float32) - 2 ** (codes.bits - 1)
    return codes.astype(jnp.float32)


def spans(K: int, k_chunk: int) -> list[tuple[int, int, int]]:
    """(first input, inputs, inputs to select) of each chunk."""
    cuts = [(at, min(INPUTS_PER_CHUNK, K - at)) for at in range(0, K, INPUTS_PER_CHUNK)]
    return [(at, m, k_chunk * m // INPUTS_PER_CHUNK) for at, m in cuts]


def selected(K: int, k_chunk: int) -> int:
    """How many inputs a token fetches: floor(k_chunk K / 1024)."""
    return sum(k for _, _, k in spans(K, k_chunk))


def bucket_floors(edges: Float[Array, "2"]) -> Float[Array, "32"]:
    """Lower edges of the buckets from (b0, b15): one above b0, 15 down to b15, 16 down to 0."""
    b0, b15 = edges[0], edges[1]
    t = jnp.arange(16, dtype=edges.dtype)
    return jnp.concatenate([b0 + (b15 - b0) * (t / 15), b15 * ((15 - t) / 16)])


def select(
    x: Float[Array, "*B K"], state: Any, k_chunk: int, selector: Selector = "bucket"
) -> Int[Array, "*B k"]:
    """The inputs to fetch for each token, with no index twice.

    selector:
      "bucket"  of each chunk those in the highest buckets, lowest index first within one; state: (b0, b15)
      "exact"   the greatest |x| of all, lowest index first; state: not read
      "static"  the greatest of a score [K], the same for every token; state: that score
      "random"  as "static" (the score is what `DecDec` drew)
    """
    K, k = x.shape[-1], selected(x.shape[-1], k_chunk)
    size = jnp.abs(x.astype(jnp.float32))
    size = jnp.where(jnp.isnan(size), 0.0, size)
    match selector:
        case "exact":
            return jax.lax.top_k(size, k)[1]
        case "static" | "random":
            return jnp.broadcast_to(jax.lax.top_k(state, k)[1], (*x.shape[:-1], k))
        case _:
            floors = bucket_floors(state.astype(jnp.float32))
            bucket = sum((size < floor).astype(jnp.int32) for floor in floors)  # one pass over x
            return _fill(bucket, spans(K, k_chunk))


def _fill(bucket: Integer[Array, "*B K"], cuts: list[tuple[int, int, int]]) -> Integer[Array, "*B k"]:
    """Of each chunk, the inputs in the lowest buckets, and of equals the lowest index."""
    taken = []
    full = [cut for cut in cuts if cut[1] == INPUTS_PER_CHUNK]  # equal chunks in one go
    for group in (full, cuts[len(full) :]):
        if group and group[0][2]:
            at, m, k = group[0]
            part = bucket[..., at : at + m * len(group)].reshape(*bucket.shape[:-1], len(group), m)
            index = jax.lax.broadcasted_iota(jnp.int32, part.shape, part.ndim - 1)
            best = jax.lax.top_k(-(part * INPUTS_PER_CHUNK + index), k)[1]
            best += at + m * jax.lax.broadcasted_iota(jnp.int32, best.shape, best.ndim - 2)
            taken.append(best.reshape(*bucket.shape[:-1], -1))
    return jnp.concatenate(taken, axis=-1) if taken else jnp.zeros((*bucket.shape[:-1], 0), jnp.int32)


def compensation(x: Float[Array, "*B K"], w: HostResidual) -> Float[Array, "*B N"]:
    """What the residual adds to the base's product: only selected rows leave the memory where it lies."""
    K, N = w.shape
    tokens = x.reshape(-1, K)
    if tokens.shape[0] <= TOKENS_PER_FETCH:
        y = _some(tokens, w)
    else:
        y = jax.lax.map(lambda token: _some(token[None], w)[0], tokens, batch_size=TOKENS_PER_FETCH)
    return y.reshape(*x.shape[:-1], N)


def _some(x: Float[Array, "R K"], w: HostResidual) -> Float[Array, "R N"]:
    chosen = select(x, w.selector_state, w.k_chunk, w.selector)  # [R, k]
    rows = decode(jax.tree.map(lambda table: fetch(table, chosen), w.codes))  # [R, k, N]
    values = jnp.take_along_axis(x, chosen, axis=1).astype(jnp.float32)
    return jnp.einsum("rk,rkn->rn", values, rows, precision=jax.lax.Precision.HIGHEST) * w.scale[None]


# the name that jax 0.10.2 has for what newer versions call compute_on
_compute_on: Any = getattr(compute_on, "compute_on2", compute_on.compute_on)


def fetch(table: Array, index: Integer[Array, "*B k"]) -> Array:
    """Rows of a table in host or device memory, on the device.

    subtle: a gather does not take operands of two memories, so the indices go to the table and the rows come
      back; moving the table to the indices would move all of it.
    """
    host, device = jax.memory.Space.Host, jax.memory.Space.Device
    if jax.typeof(table).memory_space != host:
        return table[index]
    take = _compute_on(lambda t, i: t[i], compute_type="device_host", out_memory_spaces=host)
    return jax.device_put(take(table, jax.device_put(index, host)), device)


def to_host(tree):
    """The weight, model or other tree with all residuals in pinned host memory, shards where they were."""

    def move(x):
        return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))

    def put(w):
        return dataclasses.replace(w, codes=jax.tree.map(move, w.codes)) if _is_residual(w) else w

    return jax.tree.map(put, tree, is_leaf=_is_residual)


def _is_residual(w) -> bool:
    return isinstance(w, HostResidual)


def bytes_fetched(tree, tokens: int) -> int:
    """Bytes that cross from host to device for `tokens`, of a weight, model or other tree, from shapes alone.

    k N bits / 8 a token, N rounded up to 32; the official kernel reads another 2 N bytes of scales each time.
    """
    total = 0
    for w in filter(_is_residual, jax.tree.leaves(tree, is_leaf=_is_residual)):
        K = w.shape[0]
        row = sum(x.size // K * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(w.codes))
        total += tokens * selected(K, w.k_chunk) * row
    return total


def edges(thresholds: Float[Array, " K"], k_chunk: int) -> Float[Array, "2"]:
    """(b0, b15) for a number of inputs: of all calibration tokens the greatest |x|, and the greatest k-th."""
    k = max(selected(thresholds.shape[0], k_chunk), 1)
    return thresholds[jnp.array([0, k - 1])].astype(jnp.float32)
