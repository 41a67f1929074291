"""What rounding lost comes back for the inputs that matter, row by row from the host (arXiv:2412.20185)."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxllm as jl
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.ops.packing import Packed, pack, unpack
from jaxllm.quant.methods.dec_dec import DecDec
from jaxllm.quant.statistics import Stats
from jaxllm.weights import affine, host_residual
from jaxllm.weights.host_residual import HostResidual, bytes_fetched, to_host
from jaxllm.weights.matmul import matmul as multiply

K, N = 1056, 24  # a whole chunk and a short one

select = jax.jit(host_residual.select, static_argnames=("k_chunk", "selector"))
matmul = jax.jit(lambda x, w: multiply(x, w, jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nearest:
    """Round to nearest, as a base."""

    bits: int = 3
    required_stats = frozenset({"mean"})

    def quantize(self, rows, stats, *, name, dtype):
        group_size = min(32, rows.shape[1])
        return affine.quantize(rows.T, bits=self.bits, group_size=group_size)


def inputs(tokens, width=K, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_t(3, (tokens, width)).astype(np.float32))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def weight(rows=None, *, k_chunk=32, bits=4, selector="bucket", x=None) -> HostResidual:
    rows = normal(N, K) if rows is None else rows
    x = inputs(64, rows.shape[1]) if x is None else x
    stats = Stats(hessian_diag=jnp.asarray(np.square(x).sum(0)), thresholds=token_thresholds(x))
    method = DecDec(base=Nearest(), residual_bits=bits, k_chunk=k_chunk, selector=selector)
    return method.quantize(rows, stats, name="a.b", dtype=rows.dtype)


def token_thresholds(x):
    """t[r] = the greatest over tokens of a token's (r+1)-th greatest |x|, of x [T, K]. It serves any k."""
    return jnp.asarray(np.sort(np.abs(np.asarray(x)), axis=1)[:, ::-1].max(axis=0))


def fuse(parts):
    """The residual of layers that share their input, side by side along N (q, k and v; gate and up)."""
    tables, scales = zip(*parts, strict=True)
    if isinstance(tables[0], Packed):
        fused = pack(jnp.concatenate([unpack(t) for t in tables], axis=1), tables[0].bits)
    else:
        fused = jnp.concatenate(tables, axis=1)
    return fused, jnp.concatenate(scales)


@jax.jit
def full_rows(w):
    """The base plus the whole coded residual [N, K]: the most that fetching can give."""
    codes = jax.device_put(w.codes, jax.memory.Space.Device)
    return w.base.dequantize_rows(jnp.float32) + host_residual.decode(codes).T * w.scale[:, None]


@pytest.fixture(scope="module")
def rows():
    return normal(N, K)


@pytest.fixture(scope="module")
def w(rows):
    return weight(rows)


def test_with_no_inputs_fetched_the_product_is_the_base_bit_for_bit_and_the_residual_is_not_read(w):
    x = inputs(3)
    none = dataclasses.replace(w, k_chunk=0)
    assert (matmul(x, none) == multiply(x, w.base, jnp.float32)).all()
    traced = jax.make_jaxpr(multiply)(x, none).jaxpr
    used = {v for eqn in traced.eqns for v in eqn.invars if not hasattr(v, "val")}
    table = [v for v in traced.invars if v.aval.shape == w.codes.words.shape]
    assert len(table) == 1 and table[0] not in used


def test_with_all_inputs_fetched_the_product_is_that_of_the_base_and_the_whole_residual(rows):
    x = inputs(2)
    for bits, want in ((16, rows), (4, None)):
        w = weight(rows, k_chunk=1024, bits=bits)
        want = full_rows(w) if want is None else want
        want = np.asarray(x) @ np.asarray(want).T
        np.testing.assert_allclose(matmul(x, w), want, rtol=2e-3, atol=2e-2 if bits == 16 else 1e-3)


@pytest.mark.parametrize(
    "width, selector",
    [(1000, "static"), (1536, "bucket"), (1536, "exact"), (17920, "bucket"), (1000, "random")],
)
def test_the_product_is_that_of_the_residual_masked_by_the_selection(width, selector):
    rows = normal(8, width, seed=3)
    w = weight(rows, k_chunk=16, selector=selector, x=inputs(4, width))
    x = inputs(2, width, seed=5)
    chosen = select(x, w.selector_state, 16, selector)
    base, x = np.asarray(w.base.dequantize_rows()), np.asarray(x)
    rest = np.asarray(full_rows(w)) - base
    mask = np.zeros((2, width), bool)
    np.put_along_axis(mask, np.asarray(chosen), True, axis=1)
    want = x @ base.T + (x * mask) @ rest.T
    np.testing.assert_allclose(matmul(x, w), want, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize(
    "width, k_chunk", [(1, 8), (64, 33), (1000, 8), (1024, 0), (1536, 1024), (17920, 33)]
)
def test_every_chunk_gives_its_share_of_distinct_inputs(width, k_chunk):
    x = inputs(3, width)
    chosen = np.asarray(select(x, jnp.array([5.0, 1.0]), k_chunk))
    assert chosen.shape == (3, k_chunk * width // 1024)
    for line in chosen:
        assert len(set(line.tolist())) == line.size
        for at, m, k in host_residual.spans(width, k_chunk):
            assert ((line >= at) & (line < at + m)).sum() == k


def test_no_input_left_out_lies_in_a_higher_bucket_than_one_taken():
    x, edges = inputs(20, 1536), jnp.array([12.0, 2.5])
    floors = np.asarray(host_residual.bucket_floors(edges))
    assert (np.diff(floors) <= 0).all() and floors[0] == 12 and floors[15] == 2.5 and floors[31] == 0
    bucket = (np.abs(np.asarray(x))[..., None] < floors).sum(-1)
    for line, places in zip(bucket, np.asarray(select(x, edges, 20)), strict=True):
        taken = np.zeros(1536, bool)
        taken[places] = True
        for at, m, _ in host_residual.spans(1536, 20):
            part, mine = line[at : at + m], taken[at : at + m]
            worst = part[mine].max()
            assert part[~mine].min() >= worst
            same = np.flatnonzero(part == worst)  # the lowest indices of the bucket that overflows
            assert mine[same].sum() == 0 or mine[same][: mine[same].sum()].all()


@pytest.mark.slow
def test_with_one_input_a_bucket_the_selection_is_the_exact_one_of_each_chunk():
    floors = np.asarray(host_residual.bucket_floors(jnp.array([32.0, 16.0])))
    middle = np.append(40.0, (floors[:-1] + floors[1:]) / 2).astype(np.float32)
    x = jnp.asarray(np.random.default_rng(0).permutation(middle))
    for k_chunk in (32, 320, 992):
        got = select(x, jnp.array([32.0, 16.0]), k_chunk)
        assert set(np.asarray(got).tolist()) == set(
            np.argsort(-np.asarray(x))[: k_chunk * 32 // 1024].tolist()
        )


def test_the_selection_is_deterministic_even_and_free_of_scale():
    x, edges = inputs(5), jnp.array([9.0, 3.0])
    once = select(x, edges, 32)
    assert (select(x, edges, 32) == once).all()
    assert (host_residual.select(x, edges, 32) == once).all()  # not compiled as one
    assert (select(-x, edges, 32) == once).all()
    for power in (-3, 5):
        assert (select(x * 2.0**power, edges * 2.0**power, 32) == once).all()
    assert (select(x[2:3], edges, 32) == once[2:3]).all()


def test_not_a_number_counts_as_zero_and_zero_edges_are_fine():
    x = jnp.zeros((1, 1024)).at[0, 7].set(jnp.nan).at[0, 1000].set(1.0)
    assert np.asarray(select(x, jnp.array([2.0, 0.5]), 1)).tolist() == [[1000]]
    assert np.asarray(select(x, jnp.array([2.0, 0.0]), 2)).tolist() == [[1000, 0]]
    assert np.asarray(select(jnp.zeros((1, 64)), jnp.zeros(2), 48)).tolist() == [[0, 1, 2]]


def test_thresholds_fall_bound_every_token_and_join_by_maximum():
    a, b = inputs(9, 300), inputs(7, 300, seed=2)
    t = np.asarray(token_thresholds(a))
    assert (np.diff(t) <= 0).all()
    assert (t >= -np.sort(-np.abs(np.asarray(a)), axis=1)).all()
    both = token_thresholds(np.concatenate([a, b]))
    assert (np.asarray(both) == np.maximum(t, token_thresholds(b))).all()
    assert np.asarray(host_residual.edges(jnp.arange(1024.0, 0, -1), 8)).tolist() == [1024.0, 1017.0]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_symmetric_and_words_hold_them_in_order(bits):
    rest = normal(40, 50, seed=1)
    codes, scale = host_residual.encode(rest, bits=bits)
    top = 2 ** (bits - 1) - 1
    q = np.asarray(host_residual.decode(codes))
    assert np.abs(q).max() <= top and q.shape == (50, 40)
    assert (np.asarray(unpack(codes)) >= 1).all()  # code 0 does not occur
    steps = np.asarray(rest) / np.asarray(scale)[:, None]  # the nearest code, or the last one
    assert (np.abs(q.T - np.clip(steps, -top, top)) <= 0.5 + 1e-4).all()
    if bits == 4:  # the paper's words: code j of word c is output 8 c + j
        words = np.asarray(codes.words).reshape(50, -1)
        for n in (0, 7, 8, 33):
            assert ((words[:, n // 8] >> (4 * (n % 8)) & 15).astype(int) - 8 == q[:, n]).all()


def test_each_scale_is_the_best_of_thirty_two_and_none_where_nothing_is_left():
    rest = np.random.default_rng(0).normal(size=(6, 80)).astype(np.float32)
    rest[2] = 0
    rest[3] *= 1e-7
    scale = np.asarray(host_residual.residual_scale(jnp.asarray(rest), bits=4))
    top = np.abs(rest).max(1) / np.float32(7)
    assert scale[2] == 0 and not host_residual.encode(jnp.asarray(rest), bits=4)[1][2]

    def error(n, s):
        return np.square(rest[n] - np.clip(np.round(rest[n] / s), -7, 7) * s).mean()

    for n in (0, 1, 3, 4, 5):
        tried = [error(n, top[n] * np.float32(i / 32)) for i in range(1, 33)]
        assert error(n, scale[n]) <= min(tried) * 1.0001 <= tried[-1] * 1.0001


@pytest.mark.slow
def test_fused_layers_are_layers_fused():
    parts = [jax.random.normal(jax.random.key(i), (n, 70)) for i, n in enumerate((24, 40, 13))]
    for bits in (4, 16):
        codes, scale = fuse([host_residual.encode(p, bits=bits) for p in parts])
        want, want_scale = host_residual.encode(jnp.concatenate(parts), bits=bits)
        assert (scale == want_scale).all()
        assert all((a == b).all() for a, b in zip(jax.tree.leaves(codes), jax.tree.leaves(want), strict=True))


@pytest.mark.slow
def test_the_error_left_falls_by_the_share_of_energy_taken_and_on_average_with_every_more(rows):
    x, plain = normal(400, K, seed=9), np.asarray(rows)
    lost = []
    for k_chunk in (0, 16, 64, 256):
        w = weight(rows, k_chunk=k_chunk, bits=16, selector="exact")
        got = (
            multiply(x, w.base, jnp.float32) + host_residual.compensation(x, w)
            if k_chunk
            else np.asarray(x) @ np.asarray(w.base.dequantize_rows()).T
        )
        lost.append(float(np.square(np.asarray(got) - np.asarray(x) @ plain.T).mean()))
        if k_chunk:
            taken = np.take_along_axis(np.asarray(x), np.asarray(select(x, None, k_chunk, "exact")), axis=1)
            share = float(np.square(taken).sum() / np.square(x).sum())
            np.testing.assert_allclose(lost[-1] / lost[0], 1 - share, rtol=0.05)
    assert lost == sorted(lost, reverse=True)


def test_bytes_fetched_follow_from_shapes_alone(w):
    wide = to_host(weight(jnp.ones((64, 2048)), k_chunk=8, x=inputs(2, 2048)))
    assert bytes_fetched(wide, 1) == 16 * 64 // 2  # k N / 2; the scales stay on the device
    assert bytes_fetched(wide, 5) == 5 * bytes_fetched(wide, 1)
    assert bytes_fetched(w, 1) == (1056 * 32 // 1024) * 32 // 2  # 24 outputs fill up to 32
    assert bytes_fetched(dataclasses.replace(w, k_chunk=0), 9) == 0


def sizes_in(line):
    """Bytes of every array named in a line of a compiled program."""
    width = {
        "pred": 1,
        "u8": 1,
        "s8": 1,
        "f16": 2,
        "u16": 2,
        "f32": 4,
        "u32": 4,
        "s32": 4,
        "s64": 8,
        "f64": 8,
    }
    found = re.findall(r"\b(\w+)\[([\d,]*)\]", line)
    return [width.get(t, 4) * math.prod(map(int, filter(None, d.split(",")))) for t, d in found]


def test_only_rows_move_from_the_host_also_inside_a_loop(usual_compiler):
    w = to_host(weight(normal(264, K), k_chunk=8))
    assert w.codes.words.sharding.memory_kind == "pinned_host"
    whole = w.codes.words.nbytes

    def loop(w, x):
        def step(c):
            return c[0] + 1, c[1] + 1e-3 * jnp.tile(matmul(c[1], w), (1, K // 264))

        return jax.lax.while_loop(lambda c: c[0] < 3, step, (0, x))[1]

    x = inputs(2)
    program = jax.jit(loop).lower(w, x).compile(compiler_options=usual_compiler)
    text = program.as_text()
    moves = [line for line in text.splitlines() if re.search(r"= .*\b(copy|copy-start|custom-call)\(", line)]
    table = f"u32[{','.join(map(str, w.codes.words.shape))}]"
    assert table in text  # the table is there, as an argument
    for line in moves:
        assert table not in line.split("(")[0], line
    none = jax.jit(loop).lower(dataclasses.replace(w, k_chunk=0), x).compile(compiler_options=usual_compiler)
    temporary = [p.memory_analysis().temp_size_in_bytes for p in (program, none)]
    assert temporary[0] - temporary[1] < whole
    device = dataclasses.replace(w, codes=jax.device_put(w.codes, jax.memory.Space.Device))
    same = jax.jit(loop).lower(device, x).compile(compiler_options=usual_compiler)
    assert (program(w, x) == same(device, x)).all()


@pytest.mark.slow
def test_a_models_residuals_lie_in_host_memory_also_when_loaded_and_on_a_mesh(tmp_path):
    config = dataclasses.replace(TINY, width=128, heads=4, kv_heads=4, head_dim=32, ffn=256)
    model = Decoder(config, rngs=nnx.Rngs(0))
    small = jl.quantize(model, DecDec(base=jl.Rtn(bits=3), k_chunk=64), [[1, 2, 3, 4]], progress=False)
    jl.save(small, tmp_path / "out")
    mesh = jl.make_mesh(model=4, devices=jax.devices()[:4])
    for made in (small, jl.load(tmp_path / "out")[0], jl.shard(small, mesh)):
        w = made.layers[1].mlp.down.w.get_value()
        assert w.codes.words.sharding.memory_kind == "pinned_host"
        assert w.base.codes.words.sharding.memory_kind != "pinned_host"


def test_rows_are_fetched_for_any_number_of_tokens_and_under_vmap(rows):
    w = to_host(weight(rows, k_chunk=8))
    x = inputs(70)  # more than are held at once
    want = jnp.concatenate([matmul(x[at : at + 14], w) for at in range(0, 70, 14)])
    np.testing.assert_allclose(matmul(x, w), want, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(matmul(x.reshape(7, 10, K), w).reshape(70, N), want, rtol=1e-5, atol=1e-4)
    one = jax.jit(jax.vmap(matmul, in_axes=(0, None)))(x[:14], w)
    np.testing.assert_allclose(one, want[:14], rtol=1e-5, atol=1e-4)


def test_sixteen_bit_inputs_give_float32_and_one_token_has_no_leading_axis(w):
    x = inputs(1).astype(jnp.bfloat16)
    got = matmul(x[0], w)
    assert got.shape == (N,) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, matmul(x, w)[0], rtol=1e-5)


def test_a_weight_cut_over_devices_gives_the_same_product():
    w = weight(normal(128, 256), k_chunk=64)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    x = inputs(2, 256)
    for spec in (P(None, "model"), P("model", None)):
        specs = w.partition_specs(spec)
        assert specs.codes.words == P(None, "model", None)
        placed = jax.tree.map(lambda leaf, s: jax.device_put(leaf, NamedSharding(mesh, s)), w, specs)
        got = matmul(x, placed)
        np.testing.assert_allclose(got, matmul(x, w), rtol=1e-4, atol=1e-4)


def test_the_method_asks_for_what_its_selection_needs_and_refuses_nonsense(rows):
    base = Nearest()
    assert DecDec(base=base).required_stats == {"mean", "thresholds"}
    assert DecDec(base=base, selector="static").required_stats == {"mean", "hessian_diag"}
    assert DecDec(base=base, selector="exact").required_stats == {"mean"}
    for option, message in (
        ({"residual_bits": 3}, "residual_bits must be 2, 4, 8 or 16"),
        ({"k_chunk": 1025}, "k_chunk must be 0 to 1024"),
        ({"selector": "best"}, "selector must be bucket"),
    ):
        wrong = object.__new__(DecDec)  # beneath the tests' type check
        for field in dataclasses.fields(DecDec):
            object.__setattr__(wrong, field.name, option.get(field.name, field.default))
        with pytest.raises(ValueError, match=message):
            wrong.__post_init__()
    with pytest.raises(ValueError, match="DecDec: calibration must give thresholds"):
        DecDec(base=base).quantize(rows, Stats(), name="a", dtype=rows.dtype)
    with pytest.raises(ValueError, match=r"DecDec: thresholds must be \[K\]"):
        DecDec(base=base).quantize(rows, Stats(thresholds=jnp.ones(7)), name="a", dtype=rows.dtype)
    with pytest.raises(ValueError, match="bits must be 2, 4, 8 or 16, got bits=5"):
        host_residual.encode(rows, bits=5)


def test_random_channels_depend_on_the_name_and_the_seed_only(rows):
    def drawn(name, seed):
        method = DecDec(base=Nearest(), selector="random", seed=seed)
        return method.quantize(rows, Stats(), name=name, dtype=rows.dtype).selector_state

    assert (drawn("a", 0) == drawn("a", 0)).all()
    assert (drawn("a", 0) != drawn("b", 0)).any() and (drawn("a", 0) != drawn("a", 1)).any()


@pytest.mark.parametrize(
    "width, want",
    [(4096, (0.873, 0.929, 0.950)), pytest.param(14336, (0.860, 0.928, 0.945), marks=pytest.mark.slow)],
)
def test_selection_recalls_the_exact_greatest_inputs_as_measured(width, want):
    calibration, x = inputs(256, width, seed=1), inputs(50, width, seed=2)
    thresholds = token_thresholds(calibration)
    for k_chunk, expected in zip((8, 32, 64), want, strict=True):
        got = np.asarray(select(x, host_residual.edges(thresholds, k_chunk), k_chunk))
        exact = np.asarray(select(x, None, k_chunk, "exact"))
        recall = np.mean([np.isin(a, b).mean() for a, b in zip(got, exact, strict=True)])
        assert abs(recall - expected) < 0.02, (k_chunk, recall)


def test_the_weight_survives_tree_maps_and_keeps_its_type(w):
    again = jax.tree.map(lambda leaf: leaf, w)
    assert type(again) is HostResidual and isinstance(again.codes, Packed)
    assert again.shape == (K, N) and again.k_chunk == 32
    assert (again.dequantize_rows() == w.base.dequantize_rows()).all()
