"""Files that version 0.1.0 wrote still open, and hold what they held; `files_of_0_1_0/README.md` wrote them.

`known.npz` holds what that version computed from them: rows and statistics must be these numbers exactly,
logits up to what another compiler rounds otherwise.
"""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxllm as jl
from jaxllm import cache as kv
from jaxllm import eviction
from jaxllm.models.linears import linear_weights
from jaxllm.quant.calibrate import Calibration, calibrate
from jaxllm.quant.checkpoint import BlockCheckpoint
from jaxllm.quant.recipe import Budget, read_recipe
from jaxllm.sharding import make_mesh
from jaxllm.storage import former_names
from jaxllm.storage.fingerprint import fingerprint, fingerprint_of_first_numbers
from jaxllm.storage.manifest import describe
from jaxllm.training.trainer import train
from jaxllm.weights import nested_float
from jaxllm.weights.affine import Affine
from jaxllm.weights.codebook import Codebook
from jaxllm.weights.dense import Dense
from jaxllm.weights.experts import stack
from jaxllm.weights.host_residual import HostResidual
from jaxllm.weights.mixed_columns import MixedColumns
from jaxllm.weights.nested_float import NestedFloat
from jaxllm.weights.permuted import Permuted
from jaxllm.weights.planes.bit_planes import BitPlanes
from jaxllm.weights.rotated import Rotated
from jaxllm.weights.scaled import Scaled

OLD = Path(__file__).parent / "files_of_0_1_0"
BETWEEN = Path(__file__).parent / "files_before_group_size"
slow = partial(pytest.param, marks=pytest.mark.slow)
ROWS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1, 8, 2, 8, 1]] * 4  # what they were made of
TOKENS = jnp.asarray([ROWS[0]])
FORMATS = {
    "layers.0.attention.q": Codebook,
    "layers.0.attention.k": BitPlanes,
    "layers.0.attention.v": MixedColumns,
    "layers.0.attention.o": NestedFloat,
    "layers.0.mlp.gate": HostResidual,
    "layers.0.mlp.up": Scaled,
    "layers.0.mlp.down": Rotated,
    "layers.1.mlp.gate": Permuted,
    "layers.1.mlp.up": Affine,
    "head": Affine,
}


@pytest.fixture(scope="module")
def known():
    with np.load(OLD / "known.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def decoder():
    return jl.load(OLD / "decoder")[0]


@pytest.fixture(scope="module")
def gpt():
    return jl.load(OLD / "gpt")[0]


@jax.jit
def forward(model, tokens, cache=None, memory=None):
    return model(tokens, cache, **({} if memory is None else {"memory": memory}))[0]


def close(a, b):
    np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_weights_of_every_format_are_the_rows_that_they_were(decoder, known):
    weights = linear_weights(decoder)
    assert {name: type(w) for name, w in weights.items() if not isinstance(w, Dense)} == FORMATS
    for name in FORMATS:
        np.testing.assert_array_equal(weights[name].dequantize_rows(jnp.float32), known[f"decoder/{name}"])
    close(forward(decoder, TOKENS), known["decoder/logits"])


def test_the_other_families_give_the_logits_that_they_gave(gpt, known):
    assert gpt.dtype == jnp.bfloat16
    np.testing.assert_allclose(forward(gpt, TOKENS), known["gpt/logits"], atol=2e-2)
    t5 = jl.load(OLD / "t5")[0]
    close(forward(t5, TOKENS, memory=t5.encode(TOKENS)), known["t5/logits"])


def stored(cache) -> list[np.ndarray]:
    """All arrays but `extents`, which came later: of a file without, texts may be as long as they are."""
    tail = kv.split_context(cache)[1]
    np.testing.assert_array_equal(tail.extents, tail.lengths)
    return [np.asarray(x) for x in jax.tree.leaves(cache) if x is not tail.extents]


@pytest.mark.parametrize("name", [slow("dense"), "dense_4_bits", "paged", slow("paged_4_bits")])
def test_a_cache_holds_its_rows_bit_for_bit_and_goes_on(name, decoder, known):
    cache = kv.load(OLD / "caches" / name, decoder)
    assert isinstance(cache, kv.PagedCache if "paged" in name else kv.DenseCache)
    assert cache.lengths.tolist() == [12, 7]
    described = json.loads((OLD / "caches" / name / "cache.json").read_text())["arrays"]
    with np.load(OLD / "caches" / name / "arrays.npz") as raw:
        arrays = [(dtype, shape, raw[key].tobytes()) for key, (shape, dtype) in described.items()]
    assert sorted((x.dtype.name, list(x.shape), x.tobytes()) for x in stored(cache)) == sorted(arrays)
    # subtle: new rows are quantized, too, and a compiled program's order of sums turns one code of these by a
    # step: there, one operation after the other
    with jax.disable_jit(name == "paged_4_bits"):
        close(forward(decoder, jnp.asarray([[7, 7], [9, 1]]), cache), known[f"caches/{name}/logits"])


def test_a_cache_of_version_3_opens_by_the_names_of_now(decoder):
    """It was made as the one of 0.1.0 was, of the same model and rows."""
    folder = OLD.parent / "files_of_cache_version_3"
    cache = kv.load(folder, decoder)
    assert json.loads((folder / "cache.json").read_text())["version"] == 3
    with np.load(folder / "arrays.npz") as raw:
        arrays = sorted(raw[key].tobytes() for key in raw.files)
    assert sorted(x.tobytes() for x in stored(cache)) == arrays
    same = kv.load(OLD / "caches" / "paged_4_bits", decoder)
    assert jax.tree.structure(cache) == jax.tree.structure(same)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), cache, same)  # scores were computed again


def test_a_cache_still_knows_whose_keys_it_holds(gpt):
    with pytest.raises(ValueError, match="another model's keys"):
        kv.load(OLD / "caches" / "dense", gpt)


def test_gates_and_heads_score_as_they_did(decoder, gpt, known):
    gates = eviction.load_gates(OLD / "gates")
    assert isinstance(gates, eviction.FastGate)
    _, scores = jl.prefill_with_scores(gpt, ROWS[:2], gates)
    np.testing.assert_allclose(scores, known["gates/scores"], atol=1e-2)
    assert isinstance(eviction.load_gates(OLD / "gates_zap"), eviction.ZapGate)
    np.testing.assert_array_equal(eviction.load_heads(OLD / "heads", model=decoder), known["heads"])


@pytest.mark.slow
def test_a_calibration_is_of_its_model_and_is_not_measured_again(gpt, known, tmp_path):
    want = ("hessian_diag", "hessian", "guided_hessian", "sample")
    folder = shutil.copytree(OLD / "calibration", tmp_path / "calibration")
    before = {file: file.read_bytes() for file in folder.iterdir()}
    stats = calibrate(gpt, ROWS, want=want, path=folder, output_groups=2, batch=4, sample=4, progress=False)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    for name in ("layers.0.attention.v", "layers.1.mlp.down"):
        for field in want:
            np.testing.assert_array_equal(getattr(stats[name], field), known[f"calibration/{name}/{field}"])
        assert stats[name].tokens == 76
    method = jl.Gptq(bits=4, group_size=16, guided=True, output_groups=2)
    small = jl.quantize(gpt, method, Calibration(OLD / "calibration"), progress=False)
    assert isinstance(linear_weights(small)["layers.1.mlp.down"], Affine)
    with pytest.raises(ValueError, match="must be of this model"):
        jl.quantize(jl.load(OLD / "decoder")[0], [("1.mlp.down", method), (".", None)], stats, progress=False)


@pytest.mark.slow
def test_a_stopped_quantization_goes_on_behind_its_finished_block(gpt, known, tmp_path):
    folder = shutil.copytree(OLD / "stopped", tmp_path / "stopped")
    first = (folder / "layers.0.npz").read_bytes()
    method = jl.Gptq(bits=4, group_size=16)
    small = jl.quantize(gpt, method, ROWS, batch=4, checkpoint=folder, progress=False)
    assert (folder / "layers.0.npz").read_bytes() == first and (folder / "layers.1.npz").is_file()
    for name in ("layers.0.attention.q", "layers.0.mlp.down"):
        np.testing.assert_array_equal(
            linear_weights(small)[name].dequantize_rows(jnp.float32), known[f"stopped/{name}"]
        )
    with pytest.raises(ValueError, match="must hold the same model, method and text"):
        jl.quantize(gpt, jl.Gptq(bits=3, group_size=16), ROWS, batch=4, checkpoint=folder, progress=False)


def test_recipes_say_what_they_said():
    base = jl.Rtn(bits=3, group_size=16)
    want = [
        ("mlp", jl.DecDec(base=base, k_chunk=64)),
        ("attention", jl.MixedTwoBit(group4=32)),
        ("head", None),
    ]
    assert read_recipe(OLD / "recipe.json") == want
    assert read_recipe(OLD / "budget.json") == Budget(
        3.5, (jl.Rtn(bits=3, group_size=16, integer_zero_point=False),)
    )


@pytest.mark.slow
def test_files_of_other_names_of_options_are_what_they_were(gpt, tmp_path):
    with np.load(BETWEEN / "known.npz") as arrays:
        known = dict(arrays)
    cache = kv.load(BETWEEN / "cache", gpt)
    np.testing.assert_allclose(forward(gpt, jnp.asarray([[7, 7], [9, 1]]), cache), known["logits"], atol=2e-2)
    calibration = Calibration(BETWEEN / "calibration")
    assert calibration.output_groups == 2 and calibration.is_of(gpt)
    np.testing.assert_array_equal(calibration["layers.0.attention.q"].guided_hessian, known["hessian"])
    recipe = [
        (
            "0.attention.q",
            jl.Gptq(bits=4, group_size=8, integer_zero_point=False, guided=True, output_groups=2),
        ),
        ("0.attention.k", jl.MixedTwoBit(target_bits=4.5, outliers=0.01)),
        (".", None),
    ]
    folder = shutil.copytree(BETWEEN / "finished", tmp_path / "finished")
    small = linear_weights(jl.quantize(gpt, recipe, ROWS, batch=4, checkpoint=folder, progress=False))
    for name in "qk":
        rows = small[f"layers.0.attention.{name}"].dequantize_rows(jnp.float32)
        np.testing.assert_array_equal(rows, known[name])


def test_recipes_may_say_options_by_their_former_names(tmp_path):
    rule = {"pattern": ".", "method": "dec-dec", "select": "exact", "base": {"method": "rtn", "group": 16}}
    (tmp_path / "recipe.json").write_text(json.dumps([rule]))
    want = jl.DecDec(base=jl.Rtn(group_size=16), selector="exact")
    assert read_recipe(tmp_path / "recipe.json") == [(".", want)]


@pytest.mark.parametrize("metadata, narrow", [("4", False), ("334", True)])
def test_a_stopped_run_of_mixed_columns_is_known_again_unless_it_did_something_else(metadata, narrow):
    said = (  # by 0.1.0, in run.json
        "MixedTwoBit(target_bits=2.91, outliers=0.002, where='exclusive', selection='gain', fit='search', "
        f"metadata='{metadata}', per_block=False, group4=128, seed=0)"
    )
    now = former_names.method(repr(jl.MixedTwoBit(narrow_steps=narrow)))
    assert former_names.method(said) == now
    for other in (("'gain'", "'range'"), ("per_block=False", "per_block=True"), ("seed=0", "seed=1")):
        assert former_names.method(said.replace(*other)) != now


def test_recipes_may_say_the_former_options_of_mixed_columns(tmp_path):
    rule = {
        "pattern": ".",
        "method": "mixed-two-bit",
        "metadata": "334",
        "selection": "gain",
        "per_block": False,
    }
    (tmp_path / "recipe.json").write_text(json.dumps([rule]))
    assert read_recipe(tmp_path / "recipe.json") == [(".", jl.MixedTwoBit(narrow_steps=True))]
    (tmp_path / "recipe.json").write_text(json.dumps([rule | {"per_block": True}]))
    with pytest.raises(ValueError, match="per_block"):
        read_recipe(tmp_path / "recipe.json")


def bytes_as_float8(tree):
    """As 0.1.0 held it: the upper bytes of nested weights as the float8 that they are the bits of."""

    def is_nested(w):
        return isinstance(w, NestedFloat)

    def turn(w):
        return dataclasses.replace(w, upper=w.upper.view("float8_e4m3fn")) if is_nested(w) else w

    return jax.tree.map(turn, tree, is_leaf=is_nested)


def same_bytes(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("mesh", [None, slow((4, 2))])
def test_upper_bytes_that_were_called_float8_are_bytes_bit_for_bit(mesh, decoder, tmp_path):
    former = bytes_as_float8(decoder)
    jl.save(former, tmp_path / "former")
    assert '"float8_e4m3fn"' in (tmp_path / "former" / "manifest.json").read_text()
    again = jl.load(tmp_path / "former", mesh=mesh and make_mesh(data=mesh[0], model=mesh[1]))[0]
    w, was = (linear_weights(model)["layers.0.attention.o"] for model in (again, decoder))
    assert w.upper.dtype == jnp.uint8 and (mesh is None or not w.upper.sharding.is_fully_replicated)
    same_bytes(w, was)
    # what was written for the model still knows it
    assert fingerprint(again) == fingerprint(decoder) == fingerprint(former)
    assert fingerprint_of_first_numbers(decoder) == fingerprint_of_first_numbers(former)
    jl.save(again, tmp_path / "now")
    assert "float8" not in (tmp_path / "now" / "manifest.json").read_text()


def test_a_nested_weight_without_exceptions_is_described_as_it_was(decoder):
    """Of those there is nothing in files written before, nor in those of models without any."""
    was = json.loads((OLD / "decoder" / "manifest.json").read_text())["weights"]["layers.0.attention.o.w"]
    w = linear_weights(decoder)["layers.0.attention.o"]
    assert w.exceptions is None and w.exception_of_output is None and len(jax.tree.leaves(w)) == 2
    was["fields"]["upper"]["dtype"] = "uint8"
    assert json.dumps(describe(w, "w")) == json.dumps(was)


def test_a_stopped_quantization_reads_upper_bytes_that_were_called_float8(gpt, tmp_path):
    rows = 0.1 * jax.random.normal(jax.random.key(0), (2, 24, 40))
    weights = {"one": nested_float.encode(rows[0]), "two": stack([nested_float.encode(r) for r in rows])}
    blocks = BlockCheckpoint(tmp_path, gpt, "NestedFp()", [])
    blocks.write("layers.0", bytes_as_float8(weights))
    same_bytes(blocks.read("layers.0"), weights)


def test_a_training_run_goes_on(known, tmp_path):
    folder = shutil.copytree(OLD / "training", tmp_path / "training")

    def batches(step):
        return {"x": np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)}

    def loss(w, batch):
        return jnp.mean((batch["x"] @ w["w"] - 1) ** 2)

    start = {"w": jnp.zeros((3, 2))}
    done = train(loss, start, batches, optimizer=optax.adam(0.1), steps=6, checkpoint=folder, progress=False)
    np.testing.assert_array_equal(done.losses[:3], known["training/losses"][:3])  # read, not run again
    close(done.losses, known["training/losses"])
    close(done.params["w"], known["training/w"])
