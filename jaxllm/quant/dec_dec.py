"""What rounding lost, kept in host memory, and fetched for the few inputs that matter to this very token.

Paper: Y. Park et al., "DecDEC: A Systems Approach to Advancing Low-Bit LLM Quantization" (OSDI 2025,
arXiv:2412.20185), sections 4.2 (residual), 4.3 (selection), 4.4 (tuner). With R = W - base and M the k
inputs of greatest |x|, as a calibrated table of thresholds tells them:

    y = x @ base + ((x * M) @ Q) * S        Q: whole codes of R, one row an *input*;  S: one scale an output

Ours differs: any format is the base; any number of tokens, each with its own inputs; selection is
deterministic (the lowest index first where a bucket overflows); the sum is in float32; NaN counts as 0; an
output without residual gets scale 0 (the official search divides by zero); scales are float32 in natural
order and stay on the device, so that fused layers are concatenated layers.

Layout: codes q + 2**(bits - 1) packed along N (4 bits: code j of a word at bit 4 j, as in the paper), so that
what an input needs is one contiguous run; 16 bits are plain float16. They lie in pinned host memory: the
method puts them there, and `jl.load` and `jl.shard` do again (`to_host`). On a CPU that is ordinary memory:
what can be known there is the bytes fetched, not their speed.

Lossy; with k_chunk = 0 the base, bit for bit; with k_chunk = 1024 the base plus the whole coded residual.

    w = DecDec(base=Rtn(bits=3), k_chunk=8).solve(rows, stats, name="layers.0.mlp.up", dtype=jnp.float32)
    y = matmul(x, w.base) + compensation(x, w)                  # what quant.matmul.matmul does

Letters: K inputs, N outputs, k inputs fetched a token, R tokens, *B any leading axes.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import compute_on
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Integer

from jaxllm.pytree import pytree, static
from jaxllm.quant.packing import Packed, pack, unpack
from jaxllm.quant.stats import Method, Stats, need

CHUNK = 1024  # inputs among which one selection is made
STEPS = 32  # scales tried for each output
TOKENS = 32  # tokens whose fetched rows are held at once
BITS = (2, 4, 8, 16)

How = Literal["bucket", "exact", "static", "random"]

# GB/s of memory and of the link to the host (dossier section 4)
GPUS = {
    "RTX 4090": (1008.0, 32.0),
    "RTX 4080S": (736.0, 32.0),
    "RTX 4070S": (504.0, 32.0),
    "RTX 4070M": (256.0, 16.0),
    "RTX 4050M": (192.0, 16.0),
}


@pytree
class HostResidual:
    """A [K, N] weight: any format, and the rest of it by input."""

    base: Any  # any weight format
    codes: Packed | jax.Array  # Packed [K, N], or float16 [K, N] for 16 bits
    scale: jax.Array  # float32 [N]
    hint: jax.Array | None  # what `select` takes: (b0, b15) [2], a score [K], or None
    k_chunk: int = static()  # inputs fetched of each 1024
    select: How = static()
    shape: tuple[int, int] = static()  # (K, N)
    dtype: object = static()  # numpy dtype: what it was quantized from

    def as_rows(self, dtype=jnp.float32) -> jax.Array:
        """The base's rows [N, K]: what is left of the weight depends on the input."""
        return self.base.as_rows(dtype)

    def specs(self, spec: P) -> "HostResidual":
        """Where each leaf goes when the logical [K, N] axes are laid out as `spec`.

        The residual is cut along N only, also where the base is cut along K: then over the same devices.
        """
        K, N = spec
        axis = K if N is None else N
        codes = [P(None, axis, *[None] * (leaf.ndim - 2)) for leaf in jax.tree.leaves(self.codes)]
        hint = [] if self.hint is None else [P(None)]
        leaves = [*jax.tree.leaves(self.base.specs(spec)), *codes, P(axis), *hint]
        return jax.tree.unflatten(jax.tree.structure(self), leaves)


# -- the residual (4.2)


def residual_scale(rest: Float[Array, "N K"], *, bits: int) -> Float[Array, " N"]:
    """For each output the scale of least squared error among max |rest| / P * (1 .. 32) / 32.

    P = 2**(bits - 1) - 1 is the greatest code; 16 bits need no scale (1). Holds two arrays of [N, K].
    """
    if bits == 16:
        return jnp.ones(rest.shape[0], jnp.float32)
    top = jnp.abs(rest).max(axis=1) / (2 ** (bits - 1) - 1)

    def closer(i, best):
        error, scale = best
        trial = top * ((i + 1).astype(jnp.float32) / STEPS)
        here = jnp.square(rest - residual_codes(rest, trial, bits=bits) * trial[:, None]).sum(axis=1)
        return jnp.minimum(error, here), jnp.where(here < error, trial, scale)

    start = jnp.full(top.shape, jnp.inf, jnp.float32), top
    return jax.lax.fori_loop(0, STEPS, closer, start)[1]


def residual_codes(rest: Float[Array, "N K"], scale: Float[Array, " N"], *, bits: int) -> Float[Array, "N K"]:
    """The codes -P .. P nearest to the residual; 0 where the scale is 0."""
    top = 2 ** (bits - 1) - 1
    safe = jnp.where(scale > 0, scale, 1.0)[:, None]
    return jnp.where(scale[:, None] > 0, jnp.clip(jnp.round(rest / safe), -top, top), 0.0)


def encode(rest: Float[Array, "N K"], *, bits: int) -> tuple[Packed | jax.Array, jax.Array]:
    """What is stored of W - base: codes by input, and a scale an output.

    bits: 2, 4, 8 or 16 (float16 values, no scale to speak of).
    """
    if bits not in BITS:
        raise ValueError(f"dec_dec.encode: bits must be 2, 4, 8 or 16, got {bits=}")
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


def fuse(parts: Sequence[tuple[Packed | jax.Array, jax.Array]]) -> tuple[Packed | jax.Array, jax.Array]:
    """The residual of layers that share their input, side by side along N (q, k and v; gate and up)."""
    tables: list[Any] = [codes for codes, _ in parts]
    scale = jnp.concatenate([scale for _, scale in parts])
    if isinstance(tables[0], Packed):
        return pack(jnp.concatenate([unpack(t) for t in tables], axis=1), tables[0].bits), scale
    return jnp.concatenate(tables, axis=1), scale


def full_rows(w: HostResidual) -> Float[Array, "N K"]:
    """The base plus the whole coded residual: the most that fetching can give. Moves all of it."""
    codes = jax.device_put(w.codes, jax.memory.Space.Device)
    return w.base.as_rows(jnp.float32) + decode(codes).T * w.scale[:, None]


# -- which inputs (4.3)


def spans(K: int, k_chunk: int) -> list[tuple[int, int, int]]:
    """(first input, inputs, inputs to select) of each chunk."""
    cuts = [(at, min(CHUNK, K - at)) for at in range(0, K, CHUNK)]
    return [(at, m, k_chunk * m // CHUNK) for at, m in cuts]


def selected(K: int, k_chunk: int) -> int:
    """How many inputs a token fetches: floor(k_chunk K / 1024)."""
    return sum(k for _, _, k in spans(K, k_chunk))


def bucket_floors(edges: Float[Array, "2"]) -> Float[Array, "32"]:
    """Lower edges of the buckets from (b0, b15): one above b0, 15 down to b15, 16 down to 0."""
    b0, b15 = edges[0], edges[1]
    t = jnp.arange(16, dtype=edges.dtype)
    return jnp.concatenate([b0 + (b15 - b0) * (t / 15), b15 * ((15 - t) / 16)])


def select(x: Float[Array, "*B K"], hint: Any, k_chunk: int, how: How = "bucket") -> Int[Array, "*B k"]:
    """The inputs to fetch for each token, with no index twice.

    how:
      "bucket"  of each chunk those in the highest buckets, lowest index first within one; `hint` is (b0, b15)
      "exact"   the greatest |x| of all, lowest index first; `hint` is not read
      "static"  the greatest of a score [K], the same for every token; `hint` is that score
      "random"  as "static" (the score is what `DecDec` drew)
    """
    K, k = x.shape[-1], selected(x.shape[-1], k_chunk)
    size = jnp.abs(x.astype(jnp.float32))
    size = jnp.where(jnp.isnan(size), 0.0, size)
    match how:
        case "exact":
            return jax.lax.top_k(size, k)[1]
        case "static" | "random":
            return jnp.broadcast_to(jax.lax.top_k(hint, k)[1], (*x.shape[:-1], k))
        case _:
            floors = bucket_floors(hint.astype(jnp.float32))
            bucket = sum((size < floor).astype(jnp.int32) for floor in floors)  # one pass over x
            return _fill(bucket, spans(K, k_chunk))


def _fill(bucket: Integer[Array, "*B K"], cuts: list[tuple[int, int, int]]) -> Integer[Array, "*B k"]:
    """Of each chunk, the inputs in the lowest buckets, and of equals the lowest index."""
    taken = []
    full = [cut for cut in cuts if cut[1] == CHUNK]  # equal chunks in one go
    for group in (full, cuts[len(full) :]):
        if group and group[0][2]:
            at, m, k = group[0]
            part = bucket[..., at : at + m * len(group)].reshape(*bucket.shape[:-1], len(group), m)
            index = jax.lax.broadcasted_iota(jnp.int32, part.shape, part.ndim - 1)
            best = jax.lax.top_k(-(part * CHUNK + index), k)[1]
            best += at + m * jax.lax.broadcasted_iota(jnp.int32, best.shape, best.ndim - 2)
            taken.append(best.reshape(*bucket.shape[:-1], -1))
    return jnp.concatenate(taken, axis=-1) if taken else jnp.zeros((*bucket.shape[:-1], 0), jnp.int32)


# -- the product


def compensation(x: Float[Array, "*B K"], w: HostResidual) -> Float[Array, "*B N"]:
    """What the residual adds to the base's product: only selected rows leave the memory where it lies."""
    K, N = w.shape
    tokens = x.reshape(-1, K)
    if tokens.shape[0] <= TOKENS:
        y = _some(tokens, w)
    else:
        y = jax.lax.map(lambda token: _some(token[None], w)[0], tokens, batch_size=TOKENS)
    return y.reshape(*x.shape[:-1], N)


def _some(x: Float[Array, "R K"], w: HostResidual) -> Float[Array, "R N"]:
    chosen = select(x, w.hint, w.k_chunk, w.select)  # [R, k]
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
    residual = lambda w: isinstance(w, HostResidual)  # noqa: E731
    move = lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))  # noqa: E731
    put = lambda w: dataclasses.replace(w, codes=jax.tree.map(move, w.codes)) if residual(w) else w  # noqa: E731
    return jax.tree.map(put, tree, is_leaf=residual)


def bytes_fetched(w: HostResidual, rows: int) -> int:
    """Bytes that cross from host to device for `rows` tokens: from shapes and k alone.

    k N bits / 8 a token, N rounded up to 32; the official kernel reads another 2 N bytes of scales each time.
    """
    K = w.shape[0]
    row = sum(x.size // K * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(w.codes))
    return rows * selected(K, w.k_chunk) * row


# -- the method


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecDec:
    """Another method's weight, and its residual by input in host memory.

    k_chunk: inputs fetched of each 1024; fewer than 1024 / K of them is none. select: "bucket" is the
    paper's; "exact", "static" (by the diagonal) and "random" are what it is compared with.
    """

    base: Method
    residual_bits: int = 4
    k_chunk: int = 8
    select: How = "bucket"
    seed: int = 0

    def __post_init__(self):
        if self.residual_bits not in BITS:
            raise ValueError(f"DecDec: residual_bits must be 2, 4, 8 or 16, got {self.residual_bits=}")
        if not 0 <= self.k_chunk <= CHUNK:
            raise ValueError(f"DecDec: k_chunk must be 0 to {CHUNK}, got {self.k_chunk=}")
        if self.select not in ("bucket", "exact", "static", "random"):
            raise ValueError(f"DecDec: select must be bucket, exact, static or random, got {self.select=}")

    @property
    def wants(self) -> frozenset[str]:
        own = {"bucket": {"thresholds"}, "static": {"hessian_diag"}}.get(self.select, set())
        return self.base.wants | own

    @property
    def groups(self) -> int:
        """Of outputs, in the guided Hessians that the base wants."""
        return getattr(self.base, "groups", 1)

    def solve(self, rows: Float[Array, "N K"], stats: Stats, *, name: str, dtype) -> HostResidual:
        """The base's weight, and 4-bit codes of what it lacks. Holds three arrays of [N, K]."""
        N, K = rows.shape
        base: Any = self.base.solve(rows, stats, name=name, dtype=dtype)
        codes, scale = jax.jit(encode, static_argnames="bits")(
            rows.astype(jnp.float32) - base.as_rows(jnp.float32), bits=self.residual_bits
        )
        hint = self._hint(stats, name, K)
        made = HostResidual(base, codes, scale, hint, self.k_chunk, self.select, (K, N), jnp.dtype(dtype))
        return to_host(made)

    def _hint(self, stats: Stats, name: str, K: int) -> jax.Array | None:
        match self.select:
            case "bucket":
                need(stats, "DecDec", "thresholds")
                assert stats.thresholds is not None
                if stats.thresholds.shape != (K,):
                    raise ValueError(f"DecDec: thresholds must be [K], got {stats.thresholds.shape=}, {K=}")
                return edges(stats.thresholds, self.k_chunk)
            case "static":
                need(stats, "DecDec", "hessian_diag")
                return stats.hessian_diag
            case "random":
                key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(name.encode()))
                return jax.random.uniform(key, (K,))
            case _:
                return None


def edges(thresholds: Float[Array, " K"], k_chunk: int) -> Float[Array, "2"]:
    """(b0, b15) for a number of inputs: of all calibration tokens the greatest |x|, and the greatest k-th."""
    k = max(selected(thresholds.shape[0], k_chunk), 1)
    return thresholds[jnp.array([0, k - 1])].astype(jnp.float32)


def token_thresholds(x: Float[Array, "T K"]) -> Float[Array, " K"]:
    """t[r] = the greatest over tokens of a token's (r+1)-th greatest |x|. It serves any k."""
    return jnp.sort(jnp.abs(x.astype(jnp.float32)), axis=1, descending=True).max(axis=0)


# -- the tuner (4.4)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What `tune` found: for each module how many inputs of each 1024, and how many thread blocks."""

    k_chunk: dict[str, int]
    blocks: dict[str, int]
    uniform: int  # what the first phase gave to every module in it
    most_blocks: int
    time: float  # of all modules together


ROUNDING = 1e-12  # sums of the same times in another order differ by less, and so meet the same target


def tune(
    times: Mapping[str, Mapping[int, Sequence[float]]],
    base_times: Mapping[str, float],
    target: float,
    *,
    sizes: Mapping[str, tuple[int, int]],
) -> Tuning:
    """The most inputs that keep all modules together within (1 + target) times their time without.

    times: module -> thread blocks -> time for k_chunk = 0, 1, 2 ..; sizes: module -> (d_in, d_out).
    First one k_chunk for all (leaving out the smallest modules if none fits), then one more at a time where
    that costs least. A target that cannot be met gives zeros. Raises ValueError if the tables end too early.
    """
    if target < 0 or set(times) != set(base_times) or set(times) != set(sizes):
        raise ValueError(f"tune: tables must have the same modules, target >= 0, got {target=}, {set(times)}")
    limit = sum(base_times.values()) * (1 + target) * (1 + ROUNDING)
    included = sorted(times, key=lambda m: math.prod(sizes[m]), reverse=True)
    while included:
        found = _uniform(times, base_times, limit, included)
        if found is not None:
            break
        included.pop()
    else:
        zero = dict.fromkeys(times, 0)
        return Tuning(zero, dict(zero), 0, 0, sum(base_times.values()))
    k, most, _ = found
    blocks = {m: _blocks(times[m], most) if m in included else 0 for m in times}
    k_chunk = {m: k if m in included else 0 for m in times}
    spent = {m: times[m][blocks[m]][k] if m in included else base_times[m] for m in times}

    def step(m):
        table = times[m][blocks[m]] if m in included else ()
        return table[k_chunk[m] + 1] - table[k_chunk[m]] if k_chunk[m] + 1 < len(table) else math.inf

    changed = True
    while changed:
        changed = False
        costs = {m: step(m) for m in times}
        for m in sorted(costs, key=lambda m: costs[m]):
            if sum(spent.values()) + costs[m] <= limit:
                k_chunk[m] += 1
                spent[m] += costs[m]
                changed = True
    return Tuning(k_chunk, blocks, k, most, sum(spent.values()))


def _uniform(times, base_times, limit, included) -> tuple[int, int, float] | None:
    """The greatest k_chunk for all included modules, with its thread blocks and time; None if that is 0."""
    rest = sum(time for m, time in base_times.items() if m not in included)
    least = max(min(times[m]) for m in included)
    best: tuple[int, int, float] | None = None
    for most in sorted({n for m in included for n in times[m] if n >= least}):
        tables = [times[m][_blocks(times[m], most)] for m in included]
        totals = [rest + sum(column) for column in zip(*tables, strict=False)]
        over = next((k for k, total in enumerate(totals) if total > limit), None)
        if over is None:
            raise ValueError(f"tune: tables must go on until the target is exceeded, got {len(totals)=}")
        if over > 1 and (best is None or (over - 1, -totals[over - 1]) > (best[0], -best[2])):
            best = over - 1, most, totals[over - 1]
    return best


def _blocks(table: Mapping[int, Sequence[float]], most: int) -> int:
    return max(n for n in table if n <= most)


def thread_blocks(d_in: int, d_out: int) -> list[int]:
    """Numbers of thread blocks worth measuring: one a chunk of inputs, or even shares of 256 outputs."""
    parts = -(-d_out // 256)
    even = {n for n in range(1, parts + 1) if -(-parts // -(-parts // n)) == n}
    return sorted(even | set(range(1, d_in // CHUNK + 1)))


def knee(bits: int | float, gpu: str) -> float:
    """The k_chunk up to which fetching hides behind reading the base: 1024 / R_bw * bits / 4."""
    memory, link = GPUS[gpu]
    return CHUNK * link / memory * bits / 4


def modelled_times(
    sizes: Mapping[str, tuple[int, int]], *, bits: int | float, gpu: str, k_max: int
) -> tuple[dict[str, dict[int, list[float]]], dict[str, float]]:
    """Tables for `tune` in microseconds: the slower of reading the base and fetching 4-bit rows. A model."""
    memory, link = GPUS[gpu]
    base = {m: d_in * d_out * bits / 8 / memory / 1e3 for m, (d_in, d_out) in sizes.items()}
    times = {
        m: {1: [max(base[m], selected(d_in, k) * d_out / 2 / link / 1e3) for k in range(k_max + 1)]}
        for m, (d_in, d_out) in sizes.items()
    }
    return times, base
