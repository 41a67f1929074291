"""What holds for every format: products, trees, files, meshes, and the memory of a decoding loop."""

import copy
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxllm as jl
from jaxllm.decoding import loop, sampling
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.ops.packing import pack
from jaxllm.quant.methods.mixed_two_bit import MixedTwoBit
from jaxllm.quant.quantize import quantize
from jaxllm.quant.statistics import Stats
from jaxllm.weights import affine, codebook, sparse
from jaxllm.weights.block_affine import BlockAffine
from jaxllm.weights.dense import Dense
from jaxllm.weights.experts import Experts
from jaxllm.weights.matmul import (
    FORMATS,
    bits_per_weight,
    can_gather_rows,
    dequantize,
    gather_rows,
    matmul,
    num_bytes,
)
from jaxllm.weights.permuted import Permuted
from jaxllm.weights.planes.adaptive_planes import always

# The heads, and the inputs of `o` and `down`, are split over four devices: whole blocks of 32 codes.
CONFIG = dataclasses.replace(TINY, width=128, heads=4, kv_heads=4, head_dim=32, ffn=256, context=64)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A method that is only a format: no calibration, any numbers."""

    make: object
    required_stats = frozenset()

    def quantize(self, rows, stats, *, name, dtype):
        return self.make(rows)


def ones(rows):
    K = rows.shape[1]
    return Stats(hessian_diag=jnp.ones(K), thresholds=jnp.linspace(3.0, 0.01, K), tokens=64)


def table(rows, bits):
    return jnp.linspace(-0.3, 0.3, 2**bits)[None] * jnp.ones((rows.shape[0], 1))


def offsets(rows):
    """Whole zero points said as offsets."""
    w = affine.quantize(rows.T, bits=4, group_size=32)
    offset = (-affine.zero_points(w) * affine.scales(w)).astype(jnp.float16)
    return BlockAffine(w.codes, w.scale, None, offset, None, 32, 1, w.shape, w.dtype)


def coded_blocks(rows):
    """Blocks of four groups whose scales and offsets are codes."""
    (N, K), steps = rows.shape, jnp.arange(rows.size // 32).reshape(rows.shape[0], -1) % 16
    codes = pack(3 * (rows > 0).astype(jnp.uint8), 2)
    block = jnp.full((K // 128, N), 0.01, jnp.float16)
    return BlockAffine(codes, block, pack(steps, 4), -block, pack(15 - steps, 4), 32, 4, (K, N), rows.dtype)


def adaptive(planes, projection=False):
    """Planes whose tokens all choose the widest."""
    w = always(planes, (4.0, 5.0))
    if not projection:
        return w
    rows = jnp.ones((len(w.slope), 4, planes.shape[0]), jnp.float16)
    return dataclasses.replace(w, estimator="projection", projection=rows)


def with_exceptions(rows):
    """Nested bytes with two outputs of 16 bits: each of these weights forbids a shift."""
    rows = rows.at[:, 0].set(2.0**-24).at[5, 1].set(3.0).at[7, 1].set(-500.0)
    return jl.NestedFp().quantize(rows, Stats(), name="w", dtype=jnp.float32)


FORMS = {
    "affine4": lambda rows: affine.quantize(rows.T, bits=4, group_size=32),
    "affine3": lambda rows: affine.quantize(rows.T, bits=3, group_size=32, integer_zero_point=False),
    "affine8": lambda rows: affine.quantize(rows.T, bits=8, group_size=rows.shape[1], symmetric=True),
    "affine2, coded scales": lambda rows: jl.Rtn(bits=2, group_size=32, scale_bits=6).quantize(
        rows, Stats(), name="w", dtype=jnp.float32
    ),
    "offsets": offsets,
    "coded blocks": coded_blocks,
    "awq": lambda rows: jl.Awq(bits=4, group_size=32).quantize(
        rows, Stats(mean=jnp.ones(rows.shape[1]), sample=jnp.eye(rows.shape[1])), name="w", dtype=jnp.float32
    ),
    "codebook3": lambda rows: codebook.encode(rows, table(rows, 3), bits=3),
    "dense_and_sparse": lambda rows: sparse.encode(
        codebook.encode(rows, table(rows, 3), bits=3), rows, sparse.highest(jnp.abs(rows), 12), 12
    ),
    "any_precision": lambda rows: jl.AnyPrecision(parent_bits=5, seed_bits=3).quantize(
        rows, Stats(fisher=jnp.ones(rows.shape), tokens=64), name="w", dtype=jnp.float32
    ),
    "adaptive": lambda rows: adaptive(FORMS["any_precision"](rows)),
    "adaptive, projection": lambda rows: adaptive(FORMS["any_precision"](rows), projection=True),
    "nested_fp": lambda rows: jl.NestedFp().quantize(rows, Stats(), name="w", dtype=jnp.float32),
    "nested_fp8": lambda rows: jl.NestedFp(mode="fp8").quantize(rows, Stats(), name="w", dtype=jnp.float32),
    "nested_fp, exceptions": with_exceptions,
    "mixed_two_bit": lambda rows: MixedTwoBit().quantize(rows, ones(rows), name="w", dtype=jnp.float32),
    "dec_dec": lambda rows: jl.DecDec(base=jl.Rtn(bits=3, group_size=32)).quantize(
        rows, ones(rows), name="w", dtype=jnp.float32
    ),
}
FORMS["rotated"] = lambda rows: jl.Rotate(base=Fixed(FORMS["affine4"]), activation_bits=8).quantize(
    rows, Stats(), name="w", dtype=jnp.float32
)
FORMS["rotated, whole"] = lambda rows: jl.Rotate(base=Fixed(FORMS["affine8"]), activation_bits=4).quantize(
    rows, Stats(), name="w", dtype=jnp.float32
)
FORMS["permuted"] = lambda rows: Permuted(FORMS["affine3"](rows[:, ::-1]), jnp.arange(rows.shape[1])[::-1])
# a model of these takes seconds; of each kind one is quick
SLOW_TO_MAKE = {
    "affine2, coded scales",
    "nested_fp",
    "nested_fp, exceptions",
    "permuted",
    "rotated, whole",
    "mixed_two_bit",
    "any_precision",
    "adaptive",
    "adaptive, projection",
    "dense_and_sparse",
    "awq",
    "affine3",
    "affine8",
    "codebook3",
    "offsets",
}
# what these multiply by depends on x: their own tests say how
OWN_PRODUCT = {"nested_fp8", "dec_dec", "rotated", "rotated, whole"}
# an embedding can be stored so
WITH_ROWS = {
    "affine4", "affine3", "affine8", "offsets", "coded blocks", "codebook3", "any_precision", "nested_fp",
    "nested_fp8", "nested_fp, exceptions",
}  # fmt: skip


@pytest.fixture(scope="module")
def weights():
    """One weight in every format, [K, N] = [128, 64]."""
    rows = 0.1 * jax.random.normal(jax.random.key(0), (64, 128))
    return rows, {name: make(rows) for name, make in FORMS.items()}


def inputs(*shape):
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def test_every_format_is_tried_here(weights):
    assert {type(w) for w in weights[1].values()} | {Dense, Experts} == set(FORMATS)


@pytest.mark.parametrize("name", FORMS)
def test_a_product_is_that_of_the_dequantized_weight(weights, name):
    w = weights[1][name]
    assert w.shape == (128, 64) and dequantize(w).shape == (128, 64) and w.dtype == jnp.float32
    plain = np.asarray(weights[0].T if name in OWN_PRODUCT else dequantize(w))
    for batch in ((1,), (2, 3), (9,)):
        x = inputs(*batch, 128)
        got = jax.jit(matmul)(x, w)
        assert got.shape == (*batch, 64) and got.dtype == jnp.float32
        if name not in OWN_PRODUCT:
            np.testing.assert_allclose(got, x @ plain, rtol=1e-4, atol=1e-4)
        else:
            np.testing.assert_allclose(got, x @ plain, atol=1.0)
    half = jax.jit(matmul)(jnp.ones((3, 128), jnp.bfloat16), w)
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", FORMS)
def test_single_rows_are_those_of_the_whole(weights, name):
    w = weights[1][name]
    index = jnp.asarray([[5, 0, 63], [7, 7, 31]])
    assert can_gather_rows(w) == (name in WITH_ROWS)
    if not can_gather_rows(w):
        with pytest.raises(TypeError, match=f"rows of {type(w).__name__} cannot be read alone"):
            gather_rows(w, index)
        return
    got = jax.jit(gather_rows)(w, index)
    assert got.dtype == w.dtype
    np.testing.assert_array_equal(got, w.dequantize_rows(jnp.float32)[index])


@pytest.mark.parametrize("name", FORMS)
def test_bits_are_those_of_all_arrays_held(weights, name):
    w = weights[1][name]
    assert num_bytes(w) == sum(x.nbytes for x in jax.tree.leaves(w))
    assert bits_per_weight(w) == 8 * num_bytes(w) / math.prod(w.shape)


@pytest.mark.parametrize("name", FORMS)
def test_a_weight_prints_as_one_line_that_says_format_shape_and_bits(weights, name):
    w = weights[1][name]
    told = repr(w)
    assert told.startswith(f"{type(w).__name__}([128, 64] float32 in {bits_per_weight(w):.2f} bits")
    assert "\n" not in told and len(told) < 160 and "Array" not in told
    shapes = jax.eval_shape(lambda w: w, w)
    assert repr(shapes) == told
    traced = []
    jax.jit(lambda w: traced.append(repr(w)))(w)
    assert traced == [told]
    assert "\n" not in repr(jax.tree.map(lambda _: None, w))  # rebuilt around anything
    assert repr(w.partition_specs(P(None, "model")))


def test_what_a_weight_is_made_of_prints_its_fields_without_numbers(weights):
    w = weights[1]["affine4"]
    assert repr(w) == "Affine([128, 64] float32 in 4.62 bits, group_size=32)"
    assert repr(w.codes) == "Packed(words=uint32[64, 4, 4], bits=4, size=128)"


@pytest.mark.parametrize("name", FORMS)
def test_a_weight_survives_trees_vmap_and_donation(weights, name):
    w = weights[1][name]
    same = jax.tree.map(lambda x: x, w)
    assert jax.tree.structure(same) == jax.tree.structure(w)
    assert jax.tree.map(lambda _: None, w) is not None  # rebuilt around anything
    if name != "dec_dec":  # its rows may lie in host memory, which vmap would have to move
        stacked = jax.tree.map(lambda x: jnp.asarray(np.stack([x, x])), w)
        x = inputs(2, 3, 128)
        got = jax.jit(jax.vmap(matmul))(x, stacked)
        np.testing.assert_allclose(got[1], jax.jit(matmul)(x[1], w), rtol=1e-5, atol=1e-5)
    copy = jax.tree.map(jnp.copy, w)
    out = jax.jit(lambda w: w, donate_argnums=0)(copy)
    jax.tree.map(np.testing.assert_array_equal, out, w)


def everything(method, name):
    """All linears of the blocks by a method, and the embedding where the format can be read row by row."""
    return [(r"\.|^embedding$" if name in WITH_ROWS else r"\.", method)]


@pytest.fixture(scope="module")
def models():
    """A model in every format."""
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    cache = {}

    def make(name):
        if name not in cache:
            cache[name] = quantize(model, everything(Fixed(FORMS[name]), name), progress=False)
        return cache[name]

    return make


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW_TO_MAKE else []) for n in FORMS],
)
def test_a_quantized_model_comes_back_from_disk_bit_for_bit(models, tmp_path, name):
    model = models(name)
    jl.save(model, tmp_path / "out")
    again, _ = jl.load(tmp_path / "out")
    assert jax.tree.structure(nnx.state(again)) == jax.tree.structure(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


def test_a_directory_with_a_missing_leaf_is_refused_in_one_line(models, tmp_path):
    jl.save(models("affine4"), tmp_path / "out")
    file = tmp_path / "out" / "manifest.json"
    whole = json.loads(file.read_text())
    for damage, message in (
        (lambda w: w["fields"].pop("zero_point"), "layers.0.mlp.up.w must have the fields of Affine"),
        (
            lambda w: w["fields"].update(zero_point=None),
            "weights and manifest.json must name the same arrays",
        ),
        (
            lambda w: w["fields"]["scale"].update(shape=[1, 1]),
            r"layers\.0\.mlp\.up\.w must have parts that fit, got dequant_gemm: scale must have shape",
        ),
        (lambda w: w.update(type="Affinity"), "layers.0.mlp.up.w must be of a format of"),
    ):
        broken = copy.deepcopy(whole)
        damage(broken["weights"]["layers.0.mlp.up.w"])
        file.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message) as caught:
            jl.load(tmp_path / "out", verify=False)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "affine4",
        "coded blocks",
        "nested_fp",
        "nested_fp, exceptions",
        "any_precision",
        "mixed_two_bit",
        "dec_dec",
        "dense_and_sparse",
        "codebook3",
        "rotated",
        "rotated, whole",
    ],
)
def test_tensor_parallel_generation_gives_the_tokens_of_one_device(models, name):
    model = models(name)
    prompts = [[1, 2, 3, 4, 5], [9, 8, 7], [3] * 9, [100]]
    want = jl.generate(model, None, prompts, max_new_tokens=8)
    split = jl.shard(model, jl.make_mesh(data=2, model=4))
    got = jl.generate(split, None, prompts, max_new_tokens=8)
    assert [o.token_ids for o in got] == [o.token_ids for o in want]


def test_what_a_mesh_cannot_split_is_one_line():
    w = affine.quantize(jnp.ones((96, 64)), bits=4, group_size=48)
    assert w.partition_specs(P("model", None)).scale == P("model", None)
    model = quantize(
        Decoder(dataclasses.replace(CONFIG, ffn=96), rngs=nnx.Rngs(0)),
        Fixed(FORMS["affine4"]),
        progress=False,
    )
    with pytest.raises(ValueError, match=r"the mesh must divide layers\.0\.mlp\.down\.w"):
        jl.shard(model, jl.make_mesh(model=4))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "affine4" else pytest.mark.slow) for name in FORMS]
)
def test_a_decoding_loop_never_holds_the_model_unpacked(name, usual_compiler):
    """XLA:CPU would take dequantization out of the loop and hold every layer in float32."""
    blocks = []
    shapes = ((256, 256), (256, 512), (512, 256))
    one = {(K, N): FORMS[name](jnp.full((N, K), 0.01)) for K, N in shapes}
    for layers in (1, 2):
        config = dataclasses.replace(
            TINY, layers=layers, width=256, heads=8, kv_heads=8, head_dim=32, ffn=512, vocab=256
        )
        model = Decoder(config, rngs=nnx.Rngs(0))
        method = Fixed(lambda rows: one[rows.shape[::-1]])
        model = quantize(model, everything(method, name), progress=False)
        request, state = jax.eval_shape(_started, model)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        memory = (
            loop.decode_until.lower(model, request, state, step)
            .compile(compiler_options=usual_compiler)
            .memory_analysis()
        )
        block = 4 * (4 * 256 * 256 + 3 * 256 * 512)  # float32 bytes of one block's linears
        blocks.append(memory.temp_size_in_bytes / block)
    assert blocks[1] - blocks[0] < 0.1  # what one more block takes
    assert blocks[0] < 1.5


def _started(model):
    """A run of one request about to enter the loop."""
    request = loop.Requests(
        limits=jnp.ones((1,), jnp.int32),
        keys=sampling.request_keys(0, 1),
        stop_tokens=jnp.zeros((1,), jnp.int32),
        sampling=jl.Sampler().params(),
    )
    tokens, lengths = jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32)
    logits, cache = model(tokens, model.make_cache(1, 16), lengths=lengths, logits="last")
    return request, loop.first_tokens(model, request, tokens, lengths, logits, cache, N=8, logprobs=False)
