"""Farthest point sampling in Mosaic GPU, for Hopper: a cloud is spread over a cluster of blocks.

The points of a cloud lie in order over the blocks of a cluster, and there over warpgroups. A step costs a
thread its own points, and all of them one exchange:

    warp        takes its highest minimum and the lowest place that has it: two `redux.sync`
    exchange    it sends both, and the point's coordinates, to shared memory of every block of the cluster,
                and waits until those of all warps have come: one barrier a step, in turn one of two
    everyone    finds the best of the 4 * warpgroups * blocks candidates, by `redux.sync` again
    thread      lowers its own minima, by the coordinates that came along

so that a step waits for nothing but the exchange, and memory outside the cluster is read once. Two slots and
two barriers are enough: who sends for step k + 2 has received what all others sent for step k + 1, after they
had read what was sent for step k.

In a cluster, `st.async` writes and counts the bytes on the receiver's barrier in one: an ordinary store would
need a fence for all memory before and after the barrier (`MEMBAR.ALL.GPU` on Hopper), twice a step.

What lanes do for themselves is beyond Pallas' primitives: some short functions are written in MLIR and PTX,
each with a twin in jnp beside it that the interpreter takes. Nor can a block write to another's shared memory
there: it exchanges candidates through an array in memory, by a barrier of the cluster (from jax 0.11 on).

Checked: numbers and races in the interpreter (jax 0.10.2 one block, 0.12 clusters too), lowering (both),
compiled for sm_90a without spills (0.12). Never run on a GPU; in a cluster, the interpreter checks the order
of exchanges, not the instructions that do them.

Letters: N points, D coordinates, m picks; K blocks a cloud, W warpgroups a block, n points a warpgroup, C
candidates, R words of one.
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector
from jaxtyping import Array, Float, Int32

from pallas_kernels import compat, tiles
from pallas_kernels.distance import runtime_zero, squared_distance

LANES = 128  # threads of a warpgroup
WARPS = 4
NONE = 2**30  # above every index
SHARED_BYTES = 224 * 1024  # of the 227 KiB that a block may have
MAX_POINTS = 16384  # a block: 16 to 32 a thread
MAX_COORDINATES = 8
PROCESSORS = 132
ONE = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)  # a number a thread
SCALAR = plgpu.Layout.WG_SPLAT(())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """blocks: of the cluster that a cloud has, 1, 2, 4 or 8; warpgroups: of a block, 1, 2, 4 or 8;
    in_registers: whether a thread holds its points' coordinates, or reads them from shared memory."""

    blocks: int
    warpgroups: int
    in_registers: bool

    def __post_init__(self):
        if not {self.blocks, self.warpgroups} <= {1, 2, 4, 8}:
            raise ValueError(f"farthest_point_sampling: blocks and warpgroups are 1, 2, 4 or 8, got {self}")


@tiles.measured("farthest_point_sampling mosaic_gpu")
def default_tile(B: int, N: int, D: int) -> Tile:
    """Guesses: no GPU has measured them. 4096 points a block as long as there are processors for it."""
    blocks = 1
    while blocks < 8 and N > 4096 * blocks and (B * blocks < PROCESSORS or not _fits(N, D, blocks)):
        blocks *= 2
    own = -(-N // blocks)  # points a block
    warpgroups = next((w for w in (1, 2, 4) if own <= w * (4 * LANES if w < 4 else 32 * LANES)), 8)
    registers = -(-own // (LANES * warpgroups)) * (D + 1)
    return Tile(
        blocks=blocks, warpgroups=warpgroups, in_registers=registers <= (64 if warpgroups < 8 else 32)
    )


def _fits(N: int, D: int, blocks: int) -> bool:
    """Whether a block has room for its part of the points, cut into as many warpgroups as there may be."""
    plan = _plan(N, D, 1, Tile(blocks=blocks, warpgroups=8, in_registers=False), interpret=False)
    return plan.points * 8 <= MAX_POINTS and plan.shared_bytes <= SHARED_BYTES


def why_not(points: Float[Array, "B N D"], minimum: Float[Array, "B N"]) -> str | None:
    _, N, D = points.shape
    if D > MAX_COORDINATES:
        return f"takes at most {MAX_COORDINATES} coordinates, got {D}"
    if not _fits(N, D, 8):
        return f"has no room for {N} points of {D} coordinates in 8 blocks"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """Sizes that a kernel is made for. vector: neighbouring points that a thread takes at once."""

    D: int
    m: int
    blocks: int
    warpgroups: int
    points: int  # a warpgroup
    vector: int
    in_registers: bool
    interpret: bool
    layout = property(lambda self: plgpu.Layout.WG_STRIDED((self.points,), vec_size=self.vector))
    candidates = property(lambda self: self.blocks * self.warpgroups * WARPS)
    words = property(lambda self: -(-(2 + self.D) // 4) * 4)  # R, sent four by four
    slots = property(lambda self: (2, self.candidates, self.words))
    is_simulated = property(lambda self: self.interpret and self.blocks > 1)

    @property
    def shared_bytes(self) -> int:
        return 4 * (self.D * self.points * self.warpgroups + math.prod(self.slots))


def _plan(N: int, D: int, m: int, tile: Tile, interpret: bool) -> _Plan:
    parts = tile.blocks * tile.warpgroups
    own = [LANES * v * -(-N // (LANES * v * parts)) for v in (4, 2, 1)]
    vector = next(v for v, points in zip((4, 2, 1), own, strict=True) if points == own[-1])
    return _Plan(
        D=D,
        m=m,
        blocks=tile.blocks,
        warpgroups=tile.warpgroups,
        points=own[-1],
        vector=vector,
        in_registers=tile.in_registers,
        interpret=interpret,
    )


def sample(
    points: Float[Array, "B N D"],
    minimum: Float[Array, "B N"],
    m: int,
    *,
    tile: Tile | None = None,
    interpret: bool = False,
) -> tuple[Int32[Array, "B m"], Float[Array, "B m"], Float[Array, "B N"]]:
    """As `reference.sample`. In the interpreter of jax 0.10 NotImplementedError for more than one block."""
    B, N, D = points.shape
    plan = _plan(N, D, m, default_tile(B, N, D) if tile is None else tile, interpret)
    if plan.is_simulated and not compat.INTERPRETER_KNOWS_LAYOUTS:
        raise NotImplementedError(f"farthest_point_sampling: jax 0.10 interprets no cluster, got {tile=}")
    P = plan.points * plan.warpgroups * plan.blocks
    rows = jnp.pad(points.transpose(0, 2, 1), ((0, 0), (0, 0), (0, P - N)))  # [B, D, P]
    far = jnp.pad(minimum, ((0, 0), (0, P - N)), constant_values=-1)
    out = [
        compat.output((B, m), jnp.int32, points, minimum),
        compat.output((B, m), jnp.float32, points, minimum),
        compat.output((B, P), jnp.float32, points, minimum),
    ]
    barrier: Any = plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=2)
    if plan.is_simulated:
        out.append(compat.output((B, *plan.slots), jnp.int32, points, minimum))
        barrier = plgpu.ClusterBarrier(
            collective_axes=("block",), num_arrivals=plan.warpgroups, num_barriers=2
        )
    elif plan.blocks > 1:
        barrier = plgpu.SMEM((2, 2), jnp.int32)  # two of 64 bits, of our own
    scratch = {
        "own_ref": plgpu.SMEM((D, plan.points * plan.warpgroups), jnp.float32),
        "slots_ref": plgpu.SMEM(plan.slots, jnp.int32),
        "barrier": barrier,
    }
    in_cluster = plan.blocks > 1
    indices, distances, far, *_ = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=out,
        grid=(B,),
        grid_names=("cloud",),
        num_threads=plan.warpgroups,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name="farthest_point_sampling",
        cluster=(plan.blocks,) if in_cluster else (),
        cluster_names=("block",) if in_cluster else (),
        **compat.mosaic_options(interpret),
    )(rows, far, runtime_zero(points)[None])
    return indices, distances, far[:, :N]


def _kernel(
    x_ref,
    minimum_ref,
    zero_ref,
    indices_ref,
    distances_ref,
    far_ref,
    *rest,
    own_ref,
    slots_ref,
    barrier,
    plan,
):
    cloud, warpgroup = lax.axis_index("cloud"), lax.axis_index("warpgroup")
    block = lax.axis_index("block") if plan.blocks > 1 else jnp.int32(0)
    part = block * plan.warpgroups + warpgroup
    mine = pl.ds(part * plan.points, plan.points)  # of the cloud
    here = pl.ds(warpgroup * plan.points, plan.points)  # of the block
    if plan.is_simulated:
        slots_ref = rest[0].at[cloud]
    load = functools.partial(compat.load, layout=plan.layout, interpret=plan.interpret)
    distance = functools.partial(squared_distance, zero=zero_ref[0])

    x = [load(x_ref, (cloud, d, mine)) for d in range(plan.D)]
    for d in range(plan.D):
        own_ref[d, here] = x[d]
    plgpu.commit_smem()
    far = lax.bitcast_convert_type(load(minimum_ref, (cloud, mine)), jnp.int32)
    if plan.blocks > 1 and not plan.interpret:
        _start_barriers(barrier)

    def pick(k, far):
        slot = lax.rem(k, 2)
        value, place = _best_of_warp(far, plan)
        index = place + part * plan.points
        own, slots = own_ref.at[:, here], slots_ref.at[slot]
        rows = slots.at[pl.ds(part * WARPS, WARPS)]
        if plan.blocks > 1 and not plan.interpret:
            _send(value, place, index, own, rows, barrier.at[slot], plan)
            _receive(barrier.at[slot], lax.rem(lax.div(k, 2), 2))
        else:
            _write(value, place, index, own, rows, plan)
            plgpu.barrier_arrive(barrier.at[slot])
            plgpu.barrier_wait(barrier.at[slot])
        value, index, last = _best_of_all(slots, plan)
        here_k = (cloud, pl.ds(k, 1))

        @pl.when(part == 0)
        def _():
            _record(value, index, distances_ref.at[here_k], indices_ref.at[here_k], plan)

        points = x if plan.in_registers else [load(own_ref, (d, here)) for d in range(plan.D)]
        return jnp.minimum(far, lax.bitcast_convert_type(distance(points, last), jnp.int32))

    far = lax.fori_loop(0, plan.m, pick, far)
    far_ref[cloud, mine] = lax.bitcast_convert_type(far, jnp.float32)


def _best_of_warp(far: Int32[Array, " n"], plan: _Plan) -> tuple[Int32[Array, " 128"], Int32[Array, " 128"]]:
    """For every thread the highest minimum of its warp, and the lowest place in `far` that has it."""
    steps, vector_size = plan.points // (LANES * plan.vector), plan.vector
    if plan.interpret:
        by_warp = far.reshape(steps, WARPS, 32 * vector_size)
        value = by_warp.max((0, 2))
        place = jnp.arange(plan.points, dtype=jnp.int32).reshape(by_warp.shape)
        place = jnp.where(by_warp == value[None, :, None], place, NONE).min((0, 2))
        return jnp.repeat(value, 32), jnp.repeat(place, 32)

    @plgpu.inline_mgpu(arg_types=(plan.layout,), return_type=(_one(jnp.int32), _one(jnp.int32)))
    def best(_, far):
        numbers = [
            (step * LANES * vector_size + i, vector.extract(register, [], [i]))
            for step, register in enumerate(far.registers.flat)
            for i in range(vector_size)
        ]
        top = _fold(arith.maxsi, [number for _, number in numbers])
        top = _of_warp(top, utils.ReductionKind.MAX)
        place = _i32(NONE)
        for at, number in reversed(numbers):
            has_it = arith.cmpi(arith.CmpIPredicate.eq, number, top)
            place = arith.select(has_it, _i32(at), place)
        thread = arith.remui(utils.thread_idx(), _i32(LANES))
        place = arith.addi(place, arith.muli(thread, _i32(vector_size)))
        return _per_thread(top), _per_thread(_of_warp(place, utils.ReductionKind.MIN))

    return best(far)


def _write(value, place, index, own_ref, slots_ref, plan: _Plan) -> None:
    """Writes each warp's candidate to its row of the slot: minimum, index, coordinates."""
    if plan.interpret:
        at = place[::32]
        slots_ref[:, 0] = value[::32]
        slots_ref[:, 1] = index[::32]
        for d in range(plan.D):
            row = own_ref[d, :]
            slots_ref[:, 2 + d] = lax.bitcast_convert_type(row[at], jnp.int32)
        return

    @plgpu.inline_mgpu(arg_types=(ONE, ONE, ONE, plgpu.RefType(), plgpu.RefType()))
    def write(_, value, place, index, own, slots):
        words = _candidate(value, place, index, own, plan)
        is_first = arith.cmpi(arith.CmpIPredicate.eq, _lane(), _i32(0))
        row = _row(slots, plan)
        for i in range(0, plan.words, 4):
            _asm(
                f"@$5 st.shared.v4.b32 [$0 + {4 * i}], {{$1, $2, $3, $4}};",
                [row, *words[i : i + 4], is_first],
                "r,r,r,r,r,b",
            )

    write(value, place, index, own_ref, slots_ref)


def _send(value, place, index, own_ref, slots_ref, barrier_ref, plan: _Plan) -> None:
    """Writes each warp's candidate to its row of the slot in every block: lane l to block l."""

    @plgpu.inline_mgpu(arg_types=(ONE, ONE, ONE, *(plgpu.RefType(),) * 3))
    def send(_, value, place, index, own, slots, barrier):
        lane, barrier = _lane(), _address(barrier)
        first = arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), _i32(0))
        expected = _i32(4 * plan.candidates * plan.words)
        _asm(
            "@$2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", [barrier, expected, first], "r,r,b"
        )
        words = _candidate(value, place, index, own, plan)
        is_block = arith.cmpi(arith.CmpIPredicate.ult, lane, _i32(plan.blocks))
        row = _row(slots, plan)
        for i in range(0, plan.words, 4):
            _asm(
                "{ .reg .b32 row, bar;"
                " mapa.shared::cluster.u32 row, $0, $2; mapa.shared::cluster.u32 bar, $1, $2;"
                " @$7 st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32"
                f" [row + {4 * i}], {{$3, $4, $5, $6}}, [bar]; }}",
                [row, barrier, lane, *words[i : i + 4], is_block],
                "r,r,r,r,r,r,r,b",
            )

    send(value, place, index, own_ref, slots_ref, barrier_ref)


def _start_barriers(barrier_ref) -> None:
    """Each waits for one arrival, that of who knows how many bytes will come. Meets all of the cluster."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def start(_, barrier):
        first = arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), _i32(0))
        text = "@$1 mbarrier.init.shared::cta.b64 [$0], 1; @$1 mbarrier.init.shared::cta.b64 [$0 + 8], 1;"
        _asm(f"{text} @$1 fence.mbarrier_init.release.cluster;", [_address(barrier), first], "r,b")
        _asm("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;", [], "")

    start(barrier_ref)


def _receive(barrier_ref, parity) -> None:
    """Waits until all candidates of the step have come."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR))
    def receive(_, barrier, parity):
        _asm(
            "{ .reg .pred done;"
            " AGAIN: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [$0], $1;"
            " @!done bra.uni AGAIN; }",
            [_address(barrier), parity.registers.item()],
            "r,r",
        )

    receive(barrier_ref, parity)


def _best_of_all(slots_ref, plan: _Plan):
    """Of all candidates the highest minimum (its bits), the lowest index that has it, its coordinates."""
    if plan.interpret:
        values, indices = slots_ref[:, 0], slots_ref[:, 1]
        value = values.max()
        index = jnp.where(values == value, indices, NONE).min()
        row = jnp.argmax((values == value) & (indices == index))
        columns = [slots_ref[:, 2 + d] for d in range(plan.D)]
        return value, index, [lax.bitcast_convert_type(column[row], jnp.float32) for column in columns]

    scalars = [
        plgpu.ShapeDtypeStruct((), t, layout=SCALAR) for t in (jnp.int32,) * 2 + (jnp.float32,) * plan.D
    ]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=tuple(scalars))
    def best(_, slots):
        rows = []
        for first in range(0, plan.candidates, 32):
            row = arith.addi(_lane(), _i32(first))
            # fewer than 32 are a power of two: lanes repeat each other
            rows.append(arith.andi(row, _i32(plan.candidates - 1)) if plan.candidates < 32 else row)
        at = [arith.index_cast(ir.IndexType.get(), row) for row in rows]
        values = [memref.load(slots, [row, _index(0)]) for row in at]
        indices = [memref.load(slots, [row, _index(1)]) for row in at]
        value = _of_warp(_fold(arith.maxsi, values), utils.ReductionKind.MAX)

        def lowest(numbers, has_it):
            chosen = [arith.select(has, n, _i32(NONE)) for has, n in zip(has_it, numbers, strict=True)]
            return _of_warp(_fold(arith.minsi, chosen), utils.ReductionKind.MIN)

        has_value = [arith.cmpi(arith.CmpIPredicate.eq, v, value) for v in values]
        index = lowest(indices, has_value)
        is_it = [
            arith.andi(has, arith.cmpi(arith.CmpIPredicate.eq, i, index))
            for has, i in zip(has_value, indices, strict=True)
        ]
        row = arith.index_cast(ir.IndexType.get(), lowest(rows, is_it))
        words = [memref.load(slots, [row, _index(2 + d)]) for d in range(plan.D)]
        coordinates = [utils.bitcast(word, ir.F32Type.get()) for word in words]
        return (
            mgpu.FragmentedArray.splat(value, (), is_signed=True),
            mgpu.FragmentedArray.splat(index, (), is_signed=True),
            *(mgpu.FragmentedArray.splat(c, ()) for c in coordinates),
        )

    value, index, *last = best(slots_ref)
    return value, index, last


def _record(value, index, distance_ref, index_ref, plan: _Plan) -> None:
    """One thread writes the pick to memory: a store of Pallas waits for the warpgroup before and after."""
    if plan.interpret:
        distance_ref[0] = lax.bitcast_convert_type(value, jnp.float32)
        index_ref[0] = index
        return

    @plgpu.inline_mgpu(arg_types=(SCALAR, SCALAR, plgpu.RefType(), plgpu.RefType()))
    def record(_, value, index, distance, place):
        first = arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), _i32(0))
        with utils.when(first):
            value = utils.bitcast(value.registers.item(), ir.F32Type.get())
            memref.store(value, distance, [_index(0)])
            memref.store(index.registers.item(), place, [_index(0)])

    record(value, index, distance_ref, index_ref)


def _candidate(value, place, index, own, plan: _Plan) -> list[ir.Value]:
    """The words that stand for a warp's best point."""
    value, place, index = (vector.extract(a.registers.flat[0], [], [0]) for a in (value, place, index))
    place = arith.index_cast(ir.IndexType.get(), place)
    coordinates = [memref.load(own, [_index(d), place]) for d in range(plan.D)]
    words = [value, index, *(utils.bitcast(c, ir.IntegerType.get_signless(32)) for c in coordinates)]
    return words + [_i32(0)] * (plan.words - len(words))


def _lane() -> ir.Value:
    return arith.remui(utils.thread_idx(), _i32(32))


def _row(slots: ir.Value, plan: _Plan) -> ir.Value:
    """Where the row of the thread's warp begins, of four rows."""
    warp = arith.divui(arith.remui(utils.thread_idx(), _i32(LANES)), _i32(32))
    return arith.addi(_address(slots), arith.muli(warp, _i32(4 * plan.words)))


def _address(shared: ir.Value) -> ir.Value:
    """In shared memory, 32 bits."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(shared))


def _one(dtype):
    return plgpu.ShapeDtypeStruct((LANES,), dtype, layout=ONE)


def _i32(number: int) -> ir.Value:
    return utils.c(number, ir.IntegerType.get_signless(32))


def _index(number: int) -> ir.Value:
    return utils.c(number, ir.IndexType.get())


def _fold(operation, numbers: list[ir.Value]) -> ir.Value:
    """Pairs, pairs of pairs, and so on."""
    while len(numbers) > 1:
        pairs = [operation(a, b) for a, b in zip(numbers[::2], numbers[1::2], strict=False)]
        numbers = pairs + numbers[len(pairs) * 2 :]
    return numbers[0]


def _of_warp(number: ir.Value, kind) -> ir.Value:
    return utils.redux(number, _i32(-1), kind)


def _per_thread(number: ir.Value) -> mgpu.FragmentedArray:
    """int32 [128], a number a thread."""
    register = vector.broadcast(ir.VectorType.get((1,), number.type), number)
    return mgpu.FragmentedArray(
        _registers=np.array([register], dtype=object), _layout=ONE.to_mgpu(), _is_signed=True
    )


def _asm(text: str, operands: list[ir.Value], constraints: str) -> None:
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, operands, text, constraints, has_side_effects=True)
