"""Models of experts: who reads what, and calibration, quantization, eviction and files as for the others."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import jaxllm as jl
from checkpoints_convert import huggingface, tensor_files
from checkpoints_convert.quantized.export import requantize
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.ops import packing
from jaxllm.quant.calibrate import calibrate
from jaxllm.quant.method_options import make_method
from jaxllm.quant.methods import METHODS
from jaxllm.sharding import make_mesh, shard
from jaxllm.storage.manifest import arrays_of, build, describe
from jaxllm.weights import affine, host_residual
from jaxllm.weights.affine import Affine
from jaxllm.weights.dense import Dense
from jaxllm.weights.experts import Experts, MappedStack, parts, stack
from jaxllm.weights.host_residual import HostResidual
from jaxllm.weights.rotated import Rotated

CONFIG = dataclasses.replace(
    TINY, layers=1, vocab=64, heads=8, kv_heads=8, head_dim=4, experts=3, experts_per_token=2, expert_ffn=16
)
RNG = np.random.default_rng(0)
TEXT = RNG.integers(0, 64, (4, 12)).tolist()
TOKENS = RNG.integers(0, 64, (2, 10)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def logits():
    return jax.jit(lambda model, tokens, lengths: model(tokens, lengths=lengths)[0])


def test_what_a_token_gets_depends_neither_on_other_requests_nor_on_padding(model, logits):
    lengths = np.array([10, 4], np.int32)
    want = np.asarray(logits(model, TOKENS, lengths))
    other = np.stack([TOKENS[1], np.where(np.arange(10) < 4, TOKENS[1], 63)])
    got = np.asarray(logits(model, np.stack([TOKENS[0], other[1]]), lengths))
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1, :4], want[1, :4], atol=1e-5)
    np.testing.assert_allclose(np.asarray(logits(model, other, lengths))[1, :4], want[1, :4], atol=1e-5)


@pytest.fixture(scope="module")
def seen(model):
    """What each linear of the layer reads, of all the text, and the expert of each row."""

    @jax.jit
    def look(model, tokens):
        inputs = {}

        def tap(name, x):
            if name.endswith((".in", ".assigned")):
                inputs[name] = x
            return x

        model(tokens, tap=tap)
        return inputs

    return {name: np.asarray(x) for name, x in look(model, np.asarray(TEXT, np.int32)).items()}


@pytest.fixture(scope="module")
def measured(model):
    """And the warnings."""
    want = {"hessian", "mean", "sample"}
    with pytest.warns(UserWarning, match="each expert should see") as warned:
        stats = calibrate(model, TEXT, want=want, batch=2, sample=7, progress=False)
    return stats, [str(one.message) for one in warned]


@pytest.mark.parametrize("linear", ["gate", "down"])
def test_statistics_of_an_expert_are_those_of_its_own_tokens(seen, measured, linear):
    x, assigned = (seen[f"layers.0.mlp.{linear}.{end}"] for end in ("in", "assigned"))
    for e in range(CONFIG.experts):
        own, stats = x[assigned[..., e]].astype(np.float32), measured[0][f"layers.0.mlp.{linear}.{e}"]
        assert stats.tokens == len(own) > 0
        np.testing.assert_allclose(stats.hessian, own.T @ own, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stats.mean, np.abs(own).mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(stats.sample, own[:7], rtol=1e-5, atol=1e-6)
    assert sum(measured[0][f"layers.0.mlp.{linear}.{e}"].tokens for e in range(3)) == 2 * 4 * 12


@pytest.mark.slow
def test_gradients_of_an_expert_are_those_of_its_own_weights(model, seen):
    """The squares, over sequences, of the gradient of each sequence's mean loss, and all else."""
    want = {"fisher", "guided_hessian", "thresholds", "held_out", "hessian_diag"}
    with pytest.warns(UserWarning, match="each expert should see"):
        measured = calibrate(model, TEXT, want=want, batch=2, progress=False)
    x, assigned = (seen[f"layers.0.mlp.up.{end}"] for end in ("in", "assigned"))
    for e in range(CONFIG.experts):
        own, stats = x[assigned[..., e]], measured[f"layers.0.mlp.up.{e}"]
        most = np.sort(np.abs(own), axis=1)[:, ::-1].max(0)
        assert ((stats.thresholds >= most) & (stats.thresholds <= most * (1 + 1 / 64) + 1e-6)).all()
        np.testing.assert_allclose(stats.hessian_diag, (own**2).sum(0), rtol=1e-4, atol=1e-5)
        held_out = x[3][assigned[3, ..., e]]
        np.testing.assert_allclose(stats.held_out, held_out.T @ held_out, rtol=1e-4, atol=1e-5)
        assert (
            stats.guided_hessian.shape == (1, 32, 32)
            and np.linalg.eigvalsh(stats.guided_hessian[0]).max() > 0
        )

    @jax.jit
    @jax.grad
    def gradient(rows, tokens):
        changed = replace_weights(model, {"layers.0.mlp.up": Experts(Dense(rows))})
        logp = jax.nn.log_softmax(changed(tokens[None])[0][0, :-1])
        return 1e3 * jnp.mean(jnp.take_along_axis(logp, tokens[1:, None], axis=1))

    rows = model.layers[0].mlp.up.w.get_value().stack.rows
    squares = sum(np.asarray(gradient(rows, jnp.asarray(row, jnp.int32))) ** 2 for row in TEXT)
    for e in range(CONFIG.experts):
        got = np.asarray(measured[f"layers.0.mlp.up.{e}"].fisher)
        np.testing.assert_allclose(got, squares[e], rtol=2e-3, atol=1e-3 * squares.max())


def test_a_warning_names_experts_that_saw_fewer_tokens_than_a_hessian_has_columns(seen, measured):
    counts = seen["layers.0.mlp.gate.assigned"].sum((0, 1, 2))
    few = {f"layers.0.mlp.gate.{e} ({n} of 32)" for e, n in enumerate(counts) if n < 32}
    few |= {f"layers.0.mlp.down.{e} ({n} of 16)" for e, n in enumerate(counts) if n < 16}
    assert few and set(re.findall(r"layers\S+ \(\d+ of \d+\)", measured[1][-1])) == few


def test_an_expert_that_no_token_went_to_has_the_statistics_of_all_together(model):
    idle = nnx.clone(model)
    idle.layers[0].mlp.router.weight.set_value(jnp.zeros((3, 32)))  # of equal shares the first are taken
    with pytest.warns(UserWarning, match=r"layers\.0\.mlp\.gate\.2 \(0 of 1\)"):
        stats = calibrate(idle, TEXT, want={"hessian_diag", "mean"}, progress=False)
    of = [stats[f"layers.0.mlp.up.{e}"] for e in range(3)]
    np.testing.assert_allclose(of[2].hessian_diag, of[0].hessian_diag + of[1].hessian_diag, rtol=1e-5)
    np.testing.assert_allclose(of[2].mean, (of[0].mean + of[1].mean) / 2, rtol=1e-5)
    assert of[2].tokens == of[0].tokens + of[1].tokens == 2 * 4 * 12


@dataclasses.dataclass(frozen=True)
class Spy:
    """Rounds to nearest and remembers what it was given."""

    seen: list = dataclasses.field(default_factory=list, hash=False, compare=False, repr=False)
    required_stats = frozenset({"hessian", "sample"})

    def quantize(self, rows, stats, *, name, dtype):
        self.seen.append((name, np.asarray(stats.hessian), stats.tokens))
        return affine.quantize(rows.T, bits=4, group_size=16)


def test_every_expert_is_quantized_by_what_its_tokens_said_and_the_router_stays(model, measured):
    spy, names = Spy(), [f"layers.0.mlp.{x}" for x in ("down", "gate", "up")]
    small = jl.quantize(model, [(r"mlp\.", spy), (r".", None)], measured[0], progress=False)
    assert [name for name, *_ in spy.seen] == [name for name in names for _ in range(3)]
    for name, hessian, tokens in spy.seen[3:6]:
        own = measured[0][f"{name}.{[t for *_, t in spy.seen[3:6]].index(tokens)}"]
        np.testing.assert_array_equal(hessian, own.hessian)
    made, given = (linear_weights(some)["layers.0.mlp.down"] for some in (small, model))
    assert made.shape == given.shape == (3, 16, 32) and isinstance(made.stack, Affine)
    for one, rows in zip(parts(made), parts(given), strict=True):
        want = affine.quantize(rows.rows.T, bits=4, group_size=16)
        np.testing.assert_array_equal(one.codes.words, want.codes.words)
    router = small.layers[0].mlp.router.weight.get_value()
    assert router is model.layers[0].mlp.router.weight.get_value()
    assert jl.report_bytes(small).weights == jl.report_bytes(model).weights
    arrays = dict(arrays_of(made, "w"))
    again = build(describe(made, "w"), "w", lambda name, shape, dtype: arrays[name])
    assert jax.tree.structure(again) == jax.tree.structure(made)


@pytest.mark.slow
def test_quantized_experts_are_saved_and_read_without_loss(model, tmp_path):
    small = jl.quantize(model, jl.Rtn(bits=3, group_size=16), progress=False)
    jl.save(small, tmp_path / "small")
    again, _ = jl.load(tmp_path / "small")
    for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    manifest = tmp_path / "small" / "manifest.json"
    said = json.loads(manifest.read_text("utf-8"))
    (up,) = (described for name, described in said["weights"].items() if "mlp.up" in name)
    up["fields"]["stack"]["fields"]["scale"]["shape"][0] = 2  # of 3 experts
    manifest.write_text(json.dumps(said), "utf-8")
    with pytest.raises(
        ValueError, match=r"mlp\.up.* must have parts that fit, got an array of different num"
    ):
        jl.load(tmp_path / "small", verify=False)


OPTIONS = {"bits": 4, "group_size": 16}
OF_METHODS = dict.fromkeys(("rtn", "gptq", "awq", "dash-q"), OPTIONS) | {
    "rotate": {f"base.{key}": value for key, value in OPTIONS.items()},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name != "dec-dec"])
@pytest.mark.filterwarnings("ignore:calibrate")
def test_every_method_quantizes_experts(model, logits, name):
    small = jl.quantize(model, make_method(name, OF_METHODS.get(name, {})), TEXT, progress=False)
    lengths = np.array([10, 10], np.int32)
    want, got = (np.asarray(logits(some, TOKENS, lengths)) for some in (model, small))
    assert np.isfinite(got).all() and not isinstance(linear_weights(small)["layers.0.mlp.up"].stack, Dense)
    assert np.median(np.abs(got - want)) < 0.5 * np.abs(want).mean()


@pytest.mark.parametrize("around", [False, True])
def test_residuals_in_host_memory_are_refused_before_anything_is_run(model, around):
    method = jl.DecDec(base=jl.Rtn(bits=3, group_size=16), selector="exact")
    method = jl.Rotate(base=method) if around else method
    line = r"layers\.0\.mlp\.\w+ must have a rule of its own, as experts cannot fetch .*DecDec"
    with pytest.raises(ValueError, match=line) as caught:
        jl.quantize(model, method, progress=False)
    assert "\n" not in str(caught.value)


def test_residuals_in_host_memory_are_not_stacked():
    residual, scale = host_residual.encode(jnp.ones((16, 16)), bits=4)
    base = affine.quantize(jnp.ones((16, 16)), bits=4, group_size=16)
    rest = HostResidual(base, residual, scale, None, 0, "exact", base.shape, base.dtype)
    for w in (rest, Rotated(rest, 8, 1.0, 0)):
        with pytest.raises(ValueError, match="experts cannot fetch residuals from host memory"):
            stack([w, w])


def test_tensor_parallel_experts_give_what_one_device_gives(model, logits):
    lengths = np.array([10, 10], np.int32)
    split = shard(model, make_mesh(model=8))
    rows = split.layers[0].mlp.down.w.get_value().stack.rows
    assert rows.addressable_shards[0].data.shape == (3, 32, 2)
    want = np.asarray(logits(model, TOKENS, lengths))
    np.testing.assert_allclose(logits(split, TOKENS, lengths), want, atol=1e-5)


@pytest.mark.slow
def test_perplexity_generation_and_eviction_are_as_for_the_others(model):
    """A cache of which nothing is evicted answers as the text itself."""
    text = TEXT[0]
    assert np.isfinite(jl.perplexity(model, text * 2, context=12).perplexity)
    cache = jl.prefill(model, [text])
    (plain,) = jl.generate(model, None, [[*text, 3, 4]], max_new_tokens=3)
    for scores in (
        jl.eviction.snapkv_scores(model, [text]),
        jl.eviction.kvzip_scores(model, cache, [text]),
    ):
        assert scores.shape == (1, 1, 8, 12) and np.isfinite(scores).all()
        whole, half = (jl.eviction.evict(cache, scores, ratio=ratio) for ratio in (1.0, 0.5))
        (got,) = jl.generate(model, None, [[3, 4]], max_new_tokens=3, cache=whole)
        assert got.token_ids == plain.token_ids
        (short,) = jl.generate(model, None, [[3, 4]], max_new_tokens=3, cache=half)
        assert len(short.token_ids) == 3


@pytest.mark.filterwarnings("ignore:calibrate")
def test_files_that_hold_all_experts_of_a_layer_in_one_tensor_are_read(tmp_path):
    """As transformers 5 holds them, in place of one for each expert; mapped, they are not read."""
    model = Decoder(dataclasses.replace(CONFIG, ffn=CONFIG.expert_ffn), rngs=nnx.Rngs(1))
    huggingface.save(model, None, tmp_path / "each")
    assert huggingface.family_of(model).model_type == "mixtral"
    tensors = dict(tensor_files.open_directory(tmp_path / "each"))
    layer = "model.layers.0.block_sparse_moe."
    w1, w2, w3 = (
        np.stack([tensors.pop(f"{layer}experts.{e}.w{n}.weight") for e in range(3)]) for n in (1, 2, 3)
    )
    tensors["model.layers.0.mlp.gate.weight"] = tensors.pop(f"{layer}gate.weight")
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
    tensors["model.layers.0.mlp.experts.down_proj"] = w2
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "config.json").write_bytes((tmp_path / "each" / "config.json").read_bytes())
    save_file(
        {name: np.ascontiguousarray(x) for name, x in tensors.items()}, tmp_path / "fused/model.safetensors"
    )
    for path, mapped in (("each", False), ("fused", False), ("each", True)):
        again, _ = huggingface.load(tmp_path / path, mapped=mapped)
        assert isinstance(again.layers[0].mlp.up.w.get_value().stack.rows, MappedStack) == mapped
        for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(a, np.asarray(b))


def numpy_codes(rows, bits, start):
    """Symmetric codes made in numpy: not what they were, but codes."""
    N, K = rows.shape[-2:]
    codes = np.random.default_rng(start).integers(0, 2**bits, (N, K)).astype(np.uint8)
    scale = jnp.full((K // 16, N), 0.01, jnp.float16)
    return Affine(packing.pack(jnp.asarray(codes), bits), scale, None, 16, (K, N), jnp.dtype(jnp.float32))


def coded(bits, among=".", **changes):
    """A model with the linears that have `among` in their names in codes."""
    model = Decoder(dataclasses.replace(CONFIG, ffn=16, **changes), rngs=nnx.Rngs(0))
    made = {
        name: stack([numpy_codes(one.rows, bits, i) for i, one in enumerate(parts(w))])
        if isinstance(w, Experts)
        else numpy_codes(w.rows, bits, 0)
        for name, w in linear_weights(model).items()
        if among in name
    }
    return replace_weights(model, made)


def rows_of(model):
    """The rows of all linears, experts one by one, in numpy."""
    return {
        name: [np.asarray(one.dequantize_rows(jnp.float32)) for one in parts(w)]
        for name, w in linear_weights(model).items()
    }


@pytest.mark.parametrize(
    "to", ["gptq", *(pytest.param(to, marks=pytest.mark.slow) for to in ("awq", "compressed-tensors"))]
)
def test_coded_experts_are_written_for_other_tools_and_read_back(to, tmp_path):
    model = coded(bits=4)
    jl.save(model, tmp_path / "out", to=to)
    again, _ = jl.load(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert config["model_type"] == "mixtral"
    block, router = config["quantization_config"], "model.layers.0.block_sparse_moe.gate"
    if to == "gptq":  # says so as patterns
        left_out = [name[2:] for name in block["dynamic"] if name.startswith("-:")]
        assert any(re.match(name, router) for name in left_out)
    else:  # else other tools look for its codes
        assert router in block[{"awq": "modules_to_not_convert", "compressed-tensors": "ignore"}[to]]
    jax.tree.map(np.testing.assert_array_equal, rows_of(again), rows_of(model))


def test_experts_that_a_layout_cannot_hold_are_rounded_one_by_one():
    model = coded(5, "mlp.down")
    small, changes = requantize(model, "awq")  # has 4 bits
    assert list(changes) == [f"layers.0.mlp.down.{e}" for e in range(3)]
    was, got = (rows_of(some)["layers.0.mlp.down"] for some in (model, small))
    for before, after, change in zip(was, got, changes.values(), strict=True):
        want = np.abs(after - before).mean() / np.abs(before).mean()
        np.testing.assert_allclose(change, want, rtol=1e-3)
    assert 0 < min(changes.values()) and max(changes.values()) < 0.1


@pytest.mark.parametrize("to", ["gptq", "any-precision"])
def test_experts_of_gpt_oss_in_codes_are_refused_with_what_is_left(to, tmp_path):
    gpt_oss = {"expert_bias": True, "glu_limit": 7.0, "attention_sinks": True, "activation": "quick_gelu"}
    model = coded(5, "mlp", **gpt_oss)  # as MXFP4 is read
    line = r"experts of gpt_oss must be dense.*native layout, got Affine at layers\.0\.mlp\.\w+\.0\.w$"
    with pytest.raises(ValueError, match=line):
        jl.save(model, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:calibrate")
def test_experts_are_quantized_from_files_as_from_memory(tmp_path):
    model = Decoder(dataclasses.replace(CONFIG, ffn=CONFIG.expert_ffn), rngs=nnx.Rngs(1))
    huggingface.save(model, None, tmp_path / "files")
    recipe = [(r"mlp\.", jl.SqueezeLlm(bits=2)), (r".", None)]  # has a pass backwards
    small = [jl.quantize(some, recipe, TEXT, progress=False) for some in (model, tmp_path / "files")]
    for a, b in zip(*map(jax.tree.leaves, small), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:calibrate")
def test_what_a_method_costs_all_experts_of_a_linear_is_told_as_one(model):
    """In more bits less, of all weights of the linear, and by the loss of a token."""
    methods = [jl.Rtn(bits=bits, group_size=16) for bits in (2, 4, 8)]
    table = jl.sensitivity(model, methods, TEXT, layers=r"mlp\.", by="hessian", progress=False)
    assert table.keys() == {f"layers.0.mlp.{name}" for name in ("gate", "up", "down")}
    for choices in table.values():
        assert [choice.weights for choice in choices] == [3 * 16 * 32] * 3
        assert choices[0].cost > choices[1].cost > choices[2].cost > 0
        assert choices[0].num_bits < choices[1].num_bits < choices[2].num_bits
