"""Whole models: recipes, calibrated and not, stopped and resumed, and what is refused."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxllm as jl
from jaxllm.models import t5
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.quant import sums
from jaxllm.quant.calibrate import calibrate
from jaxllm.quant.methods.rtn import Rtn
from jaxllm.quant.quantize import quantize
from jaxllm.quant.statistics import Stats, need
from jaxllm.weights.affine import Affine, encode, min_max
from jaxllm.weights.dense import Dense
from jaxllm.weights.matmul import dequantize, num_bytes

ROWS = [list(range(3, 46)), [5, 9, 2, 7], [8] * 16, [1, 2], [30, 60, 90, 120, 3, 3]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spy:
    """Rounds to nearest and remembers what it was given."""

    seen: list = dataclasses.field(default_factory=list, hash=False, compare=False, repr=False)
    stat: str = "hessian"

    @property
    def required_stats(self):
        return frozenset({self.stat})

    def quantize(self, rows, stats: Stats, *, name, dtype, mask=None):
        need(stats, "spy", self.stat)
        self.seen.append((name, np.asarray(getattr(stats, self.stat)), mask))
        scale, zero_point = min_max(rows, bits=4, group_size=16)
        return encode(rows, scale, zero_point, bits=4, group_size=16, dtype=dtype, integer_zero_point=True)


@pytest.fixture(scope="module")
def model():
    return Decoder(TINY, rngs=nnx.Rngs(0))


def test_one_method_takes_every_linear_of_the_blocks_and_leaves_the_rest(model):
    small = quantize(model, Rtn(bits=4, group_size=16), progress=False)
    weights = linear_weights(small)
    assert isinstance(weights.pop("head"), Dense) and isinstance(weights.pop("embedding"), Dense)
    assert len(weights) == 14
    assert all(isinstance(w, Affine) for w in weights.values())
    assert small.embedding.table.get_value().rows is model.embedding.table.get_value().rows
    assert isinstance(model.layers[0].mlp.up.w.get_value(), Dense)  # the given model is as it was
    assert jl.report_bytes(small).weight_bytes < 0.6 * jl.report_bytes(model).weight_bytes
    tokens = jnp.asarray([ROWS[0]])
    a, b = (np.asarray(jax.jit(m)(tokens)[0]) for m in (small, model))
    assert 0 < np.abs(a - b).max() < 1.5


def test_a_recipe_gives_each_linear_its_first_match(model):
    recipe = [
        (r"layers\.0\.", None),
        (r"mlp\.down", Rtn(bits=8, group_size=16)),
        (r"layers", Rtn(bits=2, group_size=8)),
        ("head", Rtn(bits=6, group_size=32)),
    ]
    weights = linear_weights(quantize(model, recipe, progress=False))
    bits = {name: w.codes.bits if isinstance(w, Affine) else None for name, w in weights.items()}
    assert [bits[f"layers.{i}.mlp.down"] for i in range(2)] == [None, 8]
    assert bits["layers.1.attention.v"] == 2 and bits["head"] == 6


@pytest.mark.slow
def test_embedding_and_head_are_quantized_when_their_names_are_spelt(model):
    left = quantize(model, [(".*", Rtn(bits=4, group_size=16))], progress=False)
    assert all(isinstance(linear_weights(left)[name], Dense) for name in ("embedding", "head"))
    rest = (r"\.", None)
    small = quantize(model, [rest, ("embedding|head", Rtn(bits=8, group_size=16))], progress=False)
    rows = {n: dequantize(w).T for n, w in linear_weights(small).items() if isinstance(w, Affine)}
    assert rows.keys() == {"embedding", "head"}
    same = replace_weights(model, {name: Dense(x) for name, x in rows.items()})
    tokens = jnp.asarray([ROWS[0]])
    np.testing.assert_allclose(small(tokens)[0], same(tokens)[0], rtol=1e-5, atol=1e-5)
    tied = Decoder(dataclasses.replace(TINY, tied=True), rngs=nnx.Rngs(0))
    small = quantize(tied, [rest, ("embedding", Rtn(bits=8, group_size=16))], progress=False)
    same = replace_weights(tied, {"embedding": Dense(dequantize(linear_weights(small)["embedding"]).T)})
    np.testing.assert_allclose(small(tokens)[0], same(tokens)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="embedding must be stored in rows that stand alone, got Affine"):
        quantize(tied, [rest, ("embedding", Rtn(bits=2, group_size=16, scale_bits=6))], progress=False)


def test_every_family_can_be_rounded():
    model = t5.T5(t5.TINY, rngs=nnx.Rngs(0))
    weights = linear_weights(quantize(model, Rtn(bits=4, group_size=16), progress=False))
    names = [name for name, w in weights.items() if isinstance(w, Affine)]
    assert any(name.startswith("encoder.") for name in names) and any("cross" in name for name in names)


def test_calibration_on_the_way_equals_calibration_before(model):
    one, two = Spy(), Spy()
    small = quantize(model, one, ROWS, batch=2, progress=False)
    again = quantize(
        model, two, calibrate(model, ROWS, want={"hessian"}, batch=2, progress=False), progress=False
    )
    assert [n for n, *_ in one.seen] == [n for n, *_ in two.seen]
    assert {n for n, *_ in one.seen} == linear_weights(model).keys() - {"head", "embedding"}
    for (_, a, _), (_, b, _) in zip(one.seen, two.seen, strict=True):
        np.testing.assert_array_equal(a, b)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(small), nnx.state(again))


def test_sequential_calibration_sees_what_quantized_blocks_leave(model):
    plain, spy = Spy(), Spy()
    quantize(model, plain, ROWS, progress=False)
    small = quantize(model, spy, ROWS, sequential=True, progress=False)
    first = [np.array_equal(a, b) for (_, a, _), (_, b, _) in zip(plain.seen, spy.seen, strict=True)]
    assert all(first[:7]) and not any(first[7:])
    half = replace_weights(
        model, {n: w for n, w in linear_weights(small).items() if n.startswith("layers.0.")}
    )
    again = calibrate(half, ROWS, want={"hessian"}, progress=False)
    np.testing.assert_allclose(again["layers.1.mlp.up"].hessian, spy.seen[-1][1], rtol=1e-4, atol=1e-4)


def test_bits_can_be_spent_across_layers(model):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Allotting(Spy):
        def gains(self, rows, stats, *, name):
            return float(jnp.trace(stats.hessian)) * rows.shape[0]

        def allocate(self, gains, sizes):
            assert sizes["layers.0.mlp.down"] == (64, 32)
            return {name: i for i, name in enumerate(sorted(gains, key=gains.get))}

    spy = Allotting()
    quantize(model, spy, ROWS, progress=False)
    assert sorted(mask for *_, mask in spy.seen) == list(range(14))


def test_a_stopped_run_goes_on_and_gives_the_same(model, tmp_path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Stops(Spy):
        def quantize(self, rows, stats, *, name, dtype):
            if name == "layers.1.attention.k" and not self.seen:
                raise KeyboardInterrupt
            return super().quantize(rows, stats, name=name, dtype=dtype)

    with pytest.raises(KeyboardInterrupt):
        recipe = [(r"layers\.0", Spy()), (r"layers\.1", Stops(seen=[]))]
        quantize(model, recipe, ROWS, checkpoint=tmp_path / "run", progress=False)
    spy, measured, take = Spy(), [], sums.StatsAccumulator.update

    def watched(self, *rest):
        measured.append(rest[0].name)
        return take(self, *rest)

    recipe = [(r"layers\.0", spy), (r"layers\.1", Stops(seen=[0]))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums.StatsAccumulator, "update", watched)
        small = quantize(model, recipe, ROWS, checkpoint=tmp_path / "run", progress=False)
    assert spy.seen == [] and measured == ["layers.1"]  # block 0 came from the checkpoint, unmeasured
    whole = quantize(model, Spy(), ROWS, progress=False)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(small), nnx.state(whole))
    for method, rows in ((Spy(), ROWS), (recipe, ROWS[:4])):
        with pytest.raises(ValueError, match="checkpoint must hold the same model, method and text"):
            quantize(model, method, rows, checkpoint=tmp_path / "run", progress=False)


@pytest.fixture
def quick_gc():
    """What exists already is not searched for garbage."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
def test_no_more_than_one_blocks_statistics_are_held(quick_gc, model):
    held: list = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Watch(Spy):
        def quantize(self, rows, stats, *, name, dtype):
            gc.collect()
            block = name.rpartition(".")[0].rpartition(".")[0]
            assert {other for other, ref in held if ref() is not None} <= {block}
            held.append((block, weakref.ref(stats)))
            scale, zero_point = min_max(rows, bits=4, group_size=16)
            return encode(
                rows, scale, zero_point, bits=4, group_size=16, dtype=dtype, integer_zero_point=True
            )

    alive: list = []
    take = sums.StatsAccumulator.update

    def watched(self, *rest):
        gc.collect()
        assert not any(ref() is not None for ref in alive)  # the last block's are gone before this one's come
        alive.append(weakref.ref(self))
        assert not any(ref() is not None for _, ref in held)
        return take(self, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums.StatsAccumulator, "update", watched)
        quantize(model, Watch(), ROWS, progress=False)
    assert len(alive) == 2 and len(held) == 14


@pytest.mark.parametrize("consume, sequential", [(False, False), (True, True)])
def test_memory_is_what_was_given_what_is_finished_and_one_block(quick_gc, consume, sequential):
    # consumed, each old weight goes when its new one comes, so that the sum falls block by block (DESIGN)
    config = dataclasses.replace(TINY, layers=4)
    model = Decoder(config, rngs=nnx.Rngs(0))

    def size(arrays):
        return sum(x.nbytes for x in arrays)

    given = size(jax.tree.leaves(model))
    before = {id(x) for x in jax.live_arrays()} - {id(x) for x in jax.tree.leaves(model)}
    held = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Watch(Spy):
        def quantize(self, rows, stats, *, name, dtype):
            gc.collect()
            held.append(size(x for x in jax.live_arrays() if id(x) not in before))
            scale, zero_point = min_max(rows, bits=4, group_size=16)
            return encode(
                rows, scale, zero_point, bits=4, group_size=16, dtype=dtype, integer_zero_point=True
            )

    small = quantize(model, Watch(), ROWS, consume=consume, sequential=sequential, progress=False)
    assert (small is model) == consume
    done = sum(num_bytes(w) for n, w in linear_weights(small).items() if "." in n)
    states = 2 * 4 * 5 * 43 * 32  # what a block reads and gives, of 5 sequences
    statistics = 4 * (3 * 32 * 32 + 64 * 64) + states + 4096  # of q k v, o, gate up, down; and small things
    if consume:
        blocks = [max(held[i : i + 7]) for i in range(0, 28, 7)]
        assert blocks == sorted(blocks, reverse=True) and held[-1] < 0.6 * given + statistics
        assert max(held) <= given + done // 4 + statistics
    else:
        assert max(held) <= given + done + statistics


@pytest.mark.slow
def test_a_checkpoint_is_quantized_without_ever_being_in_memory(tmp_path, quick_gc):
    config = dataclasses.replace(TINY, layers=12)
    whole = Decoder(config, rngs=nnx.Rngs(0))
    jl.save(whole, tmp_path / "given", to="huggingface")
    want = quantize(whole, Rtn(bits=4, group_size=16, clip=True), ROWS, batch=2, progress=False)
    before = {id(x) for x in jax.live_arrays()}

    def size(arrays):
        return sum(x.nbytes for x in arrays)

    held = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Watch(Rtn):
        def quantize(self, rows, stats, *, name, dtype):
            gc.collect()
            held.append(size(x for x in jax.live_arrays() if id(x) not in before))
            return super().quantize(rows, stats, name=name, dtype=dtype)

    got = quantize(tmp_path / "given", Watch(bits=4, group_size=16, clip=True), ROWS, batch=2, progress=False)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(nnx.state(got)))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(got), nnx.state(want))
    done = sum(num_bytes(w) for n, w in linear_weights(got).items() if "." in n)
    block = size(jax.tree.leaves(nnx.state(whole.layers[0])))
    statistics = 4 * (3 * 32 * 32 + 64 * 64) + 2 * 4 * 5 * 43 * 32 + 16384
    given = size(jax.tree.leaves(nnx.state(whole)))
    assert max(held) <= done + block + 4 * 64 * 32 + statistics < given / 2
    mapped, _ = jl.load(tmp_path / "given", mapped=True)
    assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(nnx.state(mapped)))
    forward = jax.jit(lambda model, tokens: model(tokens)[0])
    tokens = jnp.asarray([ROWS[1]])
    np.testing.assert_array_equal(forward(mapped, tokens), forward(whole, tokens))
    with pytest.raises(ValueError, match="give one of mapped and mesh"):
        jl.load(tmp_path / "given", mapped=True, mesh=jl.make_mesh(model=2))


def test_a_consumed_model_that_fails_is_quantized_in_part_and_whole(model):
    given = nan(Decoder(TINY, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up"):
        quantize(given, Rtn(bits=4, group_size=16), consume=True, progress=False)
    kinds = {name: type(w) for name, w in linear_weights(given).items()}
    assert kinds["layers.0.mlp.up"] is Affine and kinds["layers.1.mlp.up"] is Dense
    jax.jit(given)(jnp.asarray([ROWS[0]]))  # still a model
    whole = Decoder(TINY, rngs=nnx.Rngs(0))
    quantize(whole, Rtn(bits=4, group_size=16), consume=True, progress=False)
    want = quantize(model, Rtn(bits=4, group_size=16), progress=False)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(whole), nnx.state(want))


def nan(model):
    w = model.layers[1].mlp.up.w.get_value()
    return replace_weights(model, {"layers.1.mlp.up": Dense(w.rows.at[0, 0].set(jnp.nan))})


@pytest.mark.parametrize(
    "recipe, sequences, message",
    [
        ([("nothing", Rtn()), (".*", Rtn())], None, "every pattern must match a linear, got 'nothing'"),
        ([("mlp", Rtn())], None, r"the recipe must match every linear, got none for layers\.0\.attention\.k"),
        (
            Rtn(group_size=48),
            None,
            r"group_size must be at most K of layers\.0\.attention\.k, got group_size=48, K=32",
        ),
        (Spy(), None, "hessian need calibration text, got none"),
        (Spy(), [], "sequences must have 2 to 64 tokens, got none"),
        ([("head", Spy()), (".*", None)], ROWS, "only linears of blocks are calibrated, got head"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_runs(model, recipe, sequences, message):
    with pytest.raises(ValueError, match=message):
        quantize(model, recipe, sequences, progress=False)


def test_a_second_quantization_bad_weights_and_foreign_statistics_are_refused(model):
    small = quantize(model, Rtn(bits=4, group_size=16), progress=False)
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.k must be dense, got Affine"):
        quantize(small, Rtn(bits=2, group_size=16), progress=False)
    with pytest.raises(
        ValueError, match=r"weights must be finite, got NaN or infinity in layers\.1\.mlp\.up"
    ):
        quantize(nan(model), Rtn(bits=4, group_size=16), progress=False)
    stats = calibrate(model, ROWS, want={"hessian_diag"}, progress=False)
    with pytest.raises(ValueError, match="the calibration must hold hessian"):
        quantize(model, Spy(), stats, progress=False)
    other = Decoder(TINY, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="the calibration must be of this model, got another's"):
        quantize(other, Spy(stat="hessian_diag"), stats, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [jl.Rtn(bits=3), jl.Gptq(bits=3, act_order=False), jl.SqueezeLlm(bits=2), jl.Lnq(bits=2)],
    ids=lambda method: type(method).__name__,
)
def test_a_method_may_be_part_of_a_program(method):
    rng = np.random.default_rng(0)
    rows, x = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((20, 64), (256, 64)))
    stats = {"hessian": x.T @ x, "fisher": rows**2}

    def solved(rows, stats):
        return method.quantize(rows, Stats(**stats), name="w", dtype=jnp.float32).dequantize_rows()

    np.testing.assert_array_equal(jax.jit(solved)(rows, stats), solved(rows, stats))


def one_layer(N, K=32):
    """Rows of a linear and all that calibration may know of it."""
    rng = np.random.default_rng(N)
    x = rng.standard_normal((64, K), np.float32)
    hessian = jnp.asarray(x.T @ x)
    fisher = jnp.asarray(rng.chisquare(1, (N, K)), jnp.float32)
    stats = Stats(
        hessian=hessian, hessian_diag=jnp.diag(hessian), fisher=fisher, guided_hessian=hessian[None]
    )
    return jnp.asarray(rng.standard_normal((N, K), np.float32)), stats


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "solvers"),
    [
        (jl.Gptq(bits=3), {"fit_round"}),
        (jl.DashQ(bits=2), {"_fit_rows"}),
        (jl.SqueezeLlm(bits=2), {"solve_rows"}),
        (jl.Lnq(bits=2), {"solve_rows", "refit", "descend"}),
        (jl.AnyPrecision(seed_bits=2, parent_bits=3), {"solve_rows", "_grow"}),
        (jl.AnyPrecision(seed_bits=2, parent_bits=3, seeder="lnq"), {"_grow", "refit", "choose_halves"}),
    ],
)
def test_layers_of_any_number_of_outputs_share_their_solvers(compiled, method, solvers):
    found = []
    for rows, stats in (one_layer(24), one_layer(40)):
        compiled.clear()
        method.quantize(rows, stats, name="a", dtype=jnp.float32)
        found.append(set(compiled))
    assert solvers <= found[0] and not solvers & found[1]
