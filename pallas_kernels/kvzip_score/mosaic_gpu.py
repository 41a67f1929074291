"""How much attention keys receive, for Mosaic GPU on Hopper: two kernels, wgmma on tiles that TMA brings.

Both go over tiles of 64 queries by 128 keys, the queries' scores in the rows: a warpgroup copies tiles into
shared memory, some ahead; the others multiply and go on in registers, one while another's product runs.

`_sums` is a block per head and rows of queries: a running softmax over the keys gives each query's greatest
score and the sum of its weights. `_weights` is a block per head and tile of keys, over the queries. With a
query's greatest score and sum in one number L, its weights are 2^(score - L), and the greatest of them needs
no exponential but one for each key at the end:

    max_t share_t 2^(score_t - greatest_t) / total_t  =  2^(max_t (score_t - L_t))
    L_t = greatest_t + log2(total_t / share_t)

What is seen comes as bits, a word for the 32 columns of a tile that a thread has of a row. Queries and keys
are copied once, filled up to whole tiles. Tiles that lie wholly behind the diagonal of the queries' own keys
are left out.

Checked: A with race detection (jax 0.10.2, 0.12.0.1), B (both), C (0.12.0.1: h100). Never run on a GPU. The
interpreter knows no code by register, and jax 0.10's no transposed operand of wgmma: there, bits are taken in
jnp, and the operand is staged in shared memory.

Letters: B requests, T queries, H query heads, K key heads, G = H / K, J = B K, S keys, E head size.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Bool, Float, UInt32

from pallas_kernels import compat, tiles, wgmma
from pallas_kernels.decode_attention.partial_softmax import HIDDEN, LOG2E, MASK_VALUE, soft_cap
from pallas_kernels.wgmma import ROWS, WORDS

KEYS = 128  # of a tile of scores: 32 columns for each of four lanes
WGMMA = plgpu.Layout.WGMMA
BY_ROW = WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """warpgroups: that multiply, 64 queries each. stages: tiles under way."""

    warpgroups: int
    stages: int


@tiles.measured("kvzip_score mosaic_gpu")
def default_tile(E: int) -> Tile:
    """A guess: no GPU measured it."""
    return Tile(warpgroups=2, stages=3 if E == 128 else 4)


def why_not(q: Float[Array, "B T H E"], k: Float[Array, "J S E"], *rest: Any) -> str | None:
    """Why the kernels do not take these."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.dtype != k.dtype:
        return f"takes queries and keys of one type of 16 bits, got {q.dtype} and {k.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"takes heads of 64 or 128 numbers, got E={q.shape[-1]}"
    return None


def _bits(seen: Bool[Array, "B T S"]) -> UInt32[Array, "B tiles T 4"]:
    """Of each tile of keys and query four words, a lane's: bit 2 j + e of word t is key 8 j + 2 t + e."""
    B, T, S = seen.shape
    fields = seen.reshape(B, T, S // KEYS, KEYS // 8, 4, 2).transpose(0, 2, 1, 4, 3, 5).astype(jnp.uint32)
    fields = (
        fields.reshape(B, S // KEYS, T, 4, 32) << jnp.arange(32, dtype=jnp.uint32)[None, None, None, None]
    )
    return fields.sum(-1, dtype=jnp.uint32)


def _where_seen(scores: jax.Array, words: jax.Array, interpret: bool) -> jax.Array:
    """Scores [64, 128], HIDDEN where bits [64, 4] say so."""
    if interpret:
        key = lax.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1)
        word = jnp.repeat(jnp.tile(words, (1, KEYS // 8)), 2, axis=1)  # [64, 128]
        bit = (2 * lax.div(key, 8) + lax.rem(key, 2)).astype(jnp.uint32)
        return jnp.where((word >> bit) & 1 != 0, scores, HIDDEN)

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, WORDS),
        return_type=plgpu.ShapeDtypeStruct((ROWS, KEYS), jnp.float32, layout=WGMMA),
    )
    def choose(_, x, words):
        i32 = ir.IntegerType.get_signless(32)
        halves = [mgpu.utils.bitcast(word, i32) for word in words.registers.flat]  # of rows 8 apart
        hidden = mgpu.utils.c(HIDDEN, ir.F32Type.get())

        def one(at, e, score):
            bit = np.int32(np.uint32(1 << (2 * at[1] + e)).view(np.int32))
            here = arith.andi(halves[at[4]], mgpu.utils.c(int(bit), i32))
            return arith.select(arith.cmpi(arith.CmpIPredicate.ne, here, mgpu.utils.c(0, i32)), score, hidden)

        return wgmma.each(one, x)

    return choose(scores, words)


def _fma(x: jax.Array, y: jax.Array | float, z: jax.Array, interpret: bool) -> jax.Array:
    """x y + z [64, 128] in one instruction."""
    if interpret:
        return x * y + z
    arrays = (x, z) if isinstance(y, float) else (x, z, y)

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,) * len(arrays),
        return_type=plgpu.ShapeDtypeStruct((ROWS, KEYS), jnp.float32, layout=WGMMA),
    )
    def fma(_, x, z, *more):
        f32 = ir.F32Type.get()

        def one(_at, _e, a, c, *b):
            b = b[0] if b else mgpu.utils.c(y, f32)
            return llvm.inline_asm(f32, [a, b, c], "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f")

        return wgmma.each(one, x, z, *more)

    return fma(*arrays)


def _wide(x: jax.Array, interpret: bool) -> jax.Array:
    """A number for each row, along it."""
    return compat.lay(lax.broadcast_in_dim(x, (ROWS, KEYS), (0,)), WGMMA, interpret=interpret)


def _shared(shape: tuple[int, ...], dtype: Any) -> Any:
    return plgpu.SMEM(shape, dtype, transforms=wgmma.tiling(dtype, shape[-1]))


def _scores(q_smem, k_smem, staged, factor: float, softcap: float | None, interpret: bool):
    """Scores [64, 128], and what they must be multiplied by to be in powers of 2."""

    def product(acc_ref):
        if interpret and not compat.INTERPRETER_KNOWS_LAYOUTS:
            staged[...] = k_smem[...].T
            plgpu.wgmma(acc_ref, q_smem, staged)
        else:
            plgpu.wgmma(acc_ref, q_smem, compat.transposed(k_smem))
        return acc_ref[...]

    scores = pl.run_scoped(product, plgpu.ACC((ROWS, KEYS), jnp.float32))
    if softcap is not None:
        return soft_cap(scores * factor, softcap), LOG2E
    if factor <= 0:  # the greatest must be the greatest
        return scores * factor, LOG2E
    return scores, factor * LOG2E


def _kernel(
    q_ref,  # [B H, T, E], filled up, as all are
    k_ref,  # [J, S, E]
    words_ref,  # [B, tiles, T, 4]
    *refs,  # of `_weights` less [B H, T] and share [B H, T]; outputs; shared memory
    tile: Tile,
    new: int,
    keys: int,
    scale: float,
    softcap: float | None,
    reduce: str | None,
    interpret: bool,
):
    """`_sums` if reduce is None, else `_weights`. new: T queries; keys: S, before both were filled up."""
    if reduce is None:
        greatest_ref, total_ref, *smem = refs
    else:
        less_ref, share_ref, out_ref, *smem = refs
    (heads, T, _), J, B = q_ref.shape, k_ref.shape[0], words_ref.shape[0]
    rows = ROWS * tile.warpgroups
    exp2, fma, wide = (functools.partial(f, interpret=interpret) for f in (wgmma.exp2, _fma, _wide))
    block, head = lax.axis_index("block"), lax.axis_index("head")
    group = lax.axis_index("warpgroup")
    request = lax.div(head, heads // B)
    j = request * (J // B) + lax.div(lax.rem(head, heads // B), heads // J)
    if reduce is None:  # q stays, keys come
        end = lax.div(jnp.minimum(keys - new + (block + 1) * rows, keys) + KEYS - 1, KEYS)
        begin: Any = 0
    else:  # from the first query that may see the first key
        begin = lax.div(jnp.maximum(block * KEYS - (keys - new), 0), rows)
        end = T // rows
    steps = end - begin
    staged, *smem = smem if interpret else (None, *smem)

    def copy_queries(i, q_smem, barrier):
        for g in range(tile.warpgroups):
            of = pl.ds(i * rows + g * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(q_ref.at[head, of], q_smem.at[g], barrier)

    def copy_keys(i, k_smem, barrier):
        plgpu.copy_gmem_to_smem(k_ref.at[j, pl.ds(i * KEYS, KEYS)], k_smem, barrier)

    stays, comes = (copy_queries, copy_keys) if reduce is None else (copy_keys, copy_queries)

    def fill(still, ring, here, full, empty):
        plgpu.set_max_registers(40, action="decrease")
        stays(block, still, here)

        def step(i, _):
            slot = lax.rem(i, tile.stages)
            pl.when(i >= tile.stages)(functools.partial(plgpu.barrier_wait, empty.at[slot]))
            comes(begin + i, ring.at[slot], full.at[slot])

        lax.fori_loop(0, steps, step, None)
        for ago in range(tile.stages, 0, -1):  # no barrier is left half way
            pl.when(steps >= ago)(
                lambda ago=ago: plgpu.barrier_wait(empty.at[lax.rem(steps - ago, tile.stages)])
            )

    def scores_of(i, still, ring, full, empty):
        """Scores of a step, what makes them powers of 2, the step's first query, and what is seen."""
        slot = lax.rem(i, tile.stages)
        t, s = (block, begin + i) if reduce is None else (begin + i, block)
        row = t * rows + group * ROWS
        index = (request, s, pl.ds(row, ROWS), pl.ds(0, 4))
        words = compat.load(words_ref, index, WORDS, interpret=interpret, optimized=False)
        plgpu.barrier_wait(full.at[slot])
        q_smem, k_smem = (still, ring.at[slot]) if reduce is None else (ring.at[slot], still)
        mine = None if staged is None else staged.at[group]
        scores, factor = _scores(q_smem.at[group], k_smem, mine, scale, softcap, interpret)
        plgpu.barrier_arrive(empty.at[slot])
        return scores, factor, row, words

    def multiply(still, ring, here, full, empty):
        plgpu.set_max_registers(232, action="increase")
        plgpu.barrier_wait(here)
        of_step = functools.partial(scores_of, still=still, ring=ring, full=full, empty=empty)
        zero = jnp.zeros((ROWS,), jnp.float32)
        if reduce is None:

            def step(i, carry):
                greatest, total = carry  # in units of scores
                scores, factor, _, words = of_step(i)
                scores = _where_seen(scores, words, interpret)
                top = jnp.maximum(greatest, scores.max(axis=1))
                weights = exp2(fma(scores, factor, wide(top * -factor)))
                return top, total * jnp.exp2((greatest - top) * factor) + weights.sum(axis=1)

            none = (compat.lay(x, BY_ROW, interpret=interpret) for x in (zero + MASK_VALUE, zero))
            found = lax.fori_loop(0, steps, step, tuple(none))
            of = pl.ds(block * rows + group * ROWS, ROWS)
            for x, staging, ref in zip(found, smem, (greatest_ref, total_ref), strict=True):
                staging[group] = x
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staging.at[group], ref.at[head, of])
            plgpu.wait_smem_to_gmem(0)
            return

        def by_row(ref, row):
            index = (head, pl.ds(row, ROWS))
            return compat.load(ref, index, BY_ROW, interpret=interpret, optimized=False)

        def step(i, found):
            scores, factor, row, words = of_step(i)
            scores = fma(scores, factor, wide(-by_row(less_ref, row)))
            scores = _where_seen(scores, words, interpret)
            if reduce == "max":
                return jnp.maximum(found, scores)
            return fma(exp2(scores), wide(by_row(share_ref, row)), found)

        none = jnp.full((ROWS, KEYS), HIDDEN if reduce == "max" else 0.0, jnp.float32)
        none = compat.lay(none, WGMMA, interpret=interpret)
        found = lax.fori_loop(0, steps, step, none)
        smem[0][group] = found.max(axis=0) if reduce == "max" else found.sum(axis=0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem[0].at[group], out_ref.at[head, group, pl.ds(block * KEYS, KEYS)])
        plgpu.wait_smem_to_gmem(0)

    def whole(*shared):
        lax.cond(
            group == tile.warpgroups,
            functools.partial(fill, *shared),
            functools.partial(multiply, *shared),
        )

    dtype, E = q_ref.dtype, q_ref.shape[-1]
    queries, tile_of_keys = (tile.warpgroups, ROWS, E), (KEYS, E)
    still, ring = (queries, tile_of_keys) if reduce is None else (tile_of_keys, queries)
    copies_still, copies = (tile.warpgroups, 1) if reduce is None else (1, tile.warpgroups)
    pl.run_scoped(
        whole,
        _shared(still, dtype),
        _shared((tile.stages, *ring), dtype),
        plgpu.Barrier(num_arrivals=copies_still),
        plgpu.Barrier(num_arrivals=copies, num_barriers=tile.stages),
        plgpu.Barrier(num_arrivals=tile.warpgroups, num_barriers=tile.stages),
        collective_axes="warpgroup",
    )


def attention_per_key(
    q: Float[Array, "B T H E"],
    k: Float[Array, "J S E"],
    seen: Bool[Array, "B T S"],
    sinks: Float[Array, " H"] | None,
    share: Float[Array, "B T"] | None,
    *,
    scale: float,
    softcap: float | None,
    reduce: Literal["max", "sum"],
    tile: Tile | None = None,
    interpret: bool = False,
) -> Float[Array, "B K G S"]:
    """The greatest weight, or the sum of weights, of each key."""
    (B, T, H, E), (J, S, _) = q.shape, k.shape
    tile = default_tile(E) if tile is None else tile
    more, behind = -T % (ROWS * tile.warpgroups), -S % KEYS
    q = jnp.pad(q.transpose(0, 2, 1, 3).reshape(B * H, T, E), ((0, 0), (0, more), (0, 0)))
    k = jnp.pad(k, ((0, 0), (0, behind), (0, 0)))
    words = _bits(jnp.pad(seen, ((0, 0), (0, more), (0, behind))))
    rule: dict[str, Any] = {"tile": tile, "new": T, "keys": S, "scale": scale, "softcap": softcap}
    options: dict[str, Any] = {
        "grid_names": ("block", "head"),
        "num_threads": tile.warpgroups + 1,
        "thread_name": "warpgroup",
        **compat.mosaic_options(interpret),
    }
    staged = [plgpu.SMEM((tile.warpgroups, E, KEYS), q.dtype)] if interpret else []
    sums = compat.output((B * H, T + more), jnp.float32, q, k, words)
    greatest, total = plgpu.kernel(
        functools.partial(_kernel, **rule, reduce=None, interpret=interpret),
        out_type=[sums, sums],
        grid=((T + more) // (ROWS * tile.warpgroups), B * H),
        scratch_types=[*staged, *[plgpu.SMEM((tile.warpgroups, ROWS), jnp.float32)] * 2],
        kernel_name="kvzip_score_sums",
        **options,
    )(q, k, words)
    factor = scale * LOG2E if softcap is None and scale > 0 else LOG2E
    blind = total == 0  # sees no key
    greatest = greatest * factor
    if sinks is not None:
        sink = jnp.tile(sinks.astype(jnp.float32) * LOG2E, B)[:, None]
        top = jnp.maximum(greatest, sink)
        total = total * jnp.exp2(greatest - top) + jnp.exp2(sink - top)
        greatest = top
    shares = jnp.ones((B, T), jnp.float32) if share is None else share.astype(jnp.float32)
    shares = jnp.repeat(jnp.pad(shares, ((0, 0), (0, more))), H, axis=0)
    shares = jnp.where(blind, 0.0, shares)
    less = greatest + jnp.log2(jnp.where(blind, 1.0, total))
    if reduce == "max":  # a weight below 0 is never the greatest
        less = less - jnp.log2(jnp.maximum(shares, 0.0))
    out = plgpu.kernel(
        functools.partial(_kernel, **rule, reduce=reduce, interpret=interpret),
        out_type=compat.output((B * H, tile.warpgroups, S + behind), jnp.float32, q, k, words),
        grid=((S + behind) // KEYS, B * H),
        scratch_types=[*staged, plgpu.SMEM((tile.warpgroups, KEYS), jnp.float32)],
        kernel_name="kvzip_score_weights",
        **options,
    )(q, k, words, less, shares)
    out = jnp.exp2(out.max(1)) if reduce == "max" else out.sum(1)
    return out[:, :S].reshape(B, J // B, H * B // J, S)
