"""Any-Precision's files, written as they were read, and what their layout cannot say."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quantized_files import (
    ANY,
    LINEARS,
    LLAMA,
    PHI3,
    any_precision,
    checkpoint,
    same_model,
    sparse_checkpoint,
    write,
)

import jaxllm as jl
from checkpoints_convert import huggingface
from checkpoints_convert.quantized.export import requantize
from jaxllm.files import convert
from jaxllm.models.decoder import TINY as SMALLEST
from jaxllm.models.decoder import Decoder
from jaxllm.models.linears import linear_weights
from jaxllm.ops.packing import unpack
from jaxllm.weights import codebook, sparse
from jaxllm.weights.planes.bit_planes import from_codes, read_at


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_any_precision_is_written_byte_for_byte_as_it_was_read(kind, tmp_path):
    config = {key: value for key, value in LLAMA.items() if key != "head_dim"} | {"model_type": kind}
    linears = PHI3 if kind == "phi3" else LINEARS
    tensors, _ = checkpoint(
        tmp_path / "q", any_precision, ANY, config=config, linears=linears, kind=np.float16
    )
    model, _ = convert(tmp_path / "q", tmp_path / "out", to="huggingface")
    written = huggingface.tensor_files.open_directory(tmp_path / "out")
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        assert written[name].dtype == value.dtype
        np.testing.assert_array_equal(written[name], value)
    block = json.loads((tmp_path / "out" / "config.json").read_text())["anyprec"]
    arch = block.pop("arch_config")
    keys = {"seed_precision": 2, "parent_precision": 4, "group_count": 1, "sparse_numvals": {}}
    assert block == keys  # the authors' loader asks for each
    assert (arch["model_name"], arch["layers_name"]) == ("model", "layers")
    assert sorted(arch["module_names"]) == sorted(linears)
    same_model(jl.load(tmp_path / "out")[0], model)


def test_our_any_precision_models_come_back_bit_for_bit_and_at_every_width(tmp_path):
    rng = np.random.default_rng(2)
    model = Decoder(SMALLEST, rngs=nnx.Rngs(0))
    for layer in model.layers:
        for linear in (layer.attention.q, layer.mlp.down):
            K, N = linear.w.get_value().shape
            tables = tuple(jnp.asarray(rng.normal(0, 0.1, (N, 2**b)), jnp.float32) for b in (3, 4, 5))
            codes = jnp.asarray(rng.integers(0, 32, (N, K)))
            linear.w.set_value(from_codes(codes, tables, bits=5))
    jl.save(model, tmp_path / "out", to="huggingface")
    again, _ = jl.load(tmp_path / "out")
    same_model(again, model)
    w = again.layers[1].mlp.down.w.get_value()
    assert w.bits == 5 and w.at(3).dequantize_rows().shape == w.shape[::-1]


def with_planes(model, name, bits=4):
    """The model with one linear in bit planes."""
    linear = model.layers[0].attention.q if name == "q" else model.head
    inputs, N = linear.w.get_value().shape
    table = jnp.zeros((N, 2**bits), jnp.float32)
    codes = jnp.zeros((N, inputs), jnp.int32)
    linear.w.set_value(from_codes(codes, (table,), bits=bits))
    return model


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"layers": 2}, "q", "same linears and widths must be in every layer, got 1 linears of widths"),
        ({"tied": False}, "head", "linears must be of layers, got lm_head in tables"),
        (
            {"width": 48, "layers": 1},
            "q",
            "must fill words of 32 bits, got 48 codes of 1 bits, at model.layers.0.*leave it dense",
        ),
    ],
    ids=str,
)
def test_what_any_precisions_layout_cannot_say_is_refused(changes, name, message, tmp_path):
    model = Decoder(dataclasses.replace(SMALLEST, **changes), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        jl.save(with_planes(model, name), tmp_path / "out", to="huggingface")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("widths", [(3,), (2, 3)], ids=["codebook", "planes"])
def test_outliers_are_refused_with_what_fits_and_rounded_on_request_without_touching_the_others(
    widths, tmp_path
):
    rng, K, N = np.random.default_rng(3), SMALLEST.width, SMALLEST.heads * SMALLEST.head_dim
    rows, kept = rng.normal(size=(N, K)).astype(np.float32), np.zeros((N, K), bool)
    kept[::5, 7] = True
    codes = jnp.asarray(rng.integers(0, 8, (N, K)), jnp.int32)
    tables = tuple(jnp.asarray(rng.normal(size=(N, 2**b)), jnp.float32) for b in widths)
    if len(widths) == 1:
        base = codebook.from_codes(codes, tables[0], bits=3)
    else:
        base = from_codes(codes, tables, bits=3)
    w = sparse.encode(base, jnp.asarray(rows), jnp.asarray(kept), 20)
    model = Decoder(dataclasses.replace(SMALLEST, layers=1), rngs=nnx.Rngs(0))
    model.layers[0].attention.q.w.set_value(w)
    where = (
        r"outliers=None\), .* got DenseAndSparse, at model.layers.0.self_attn.q_proj: quantize so, or round"
    )
    with pytest.raises(ValueError, match=where) as caught:
        jl.save(model, tmp_path / "out", to="any-precision")
    assert "\n" not in str(caught.value)
    small, changes = requantize(model, "any-precision")
    assert changes.keys() == {"layers.0.attention.q"} and changes["layers.0.attention.q"] < 1e-4
    made = linear_weights(small)["layers.0.attention.q"]
    got, was = (np.asarray(one.dequantize_rows(jnp.float32)) for one in (made, base))
    np.testing.assert_array_equal(got[~kept], was[~kept])
    np.testing.assert_allclose(got[kept], rows[kept], rtol=2**-9)
    jl.save(small, tmp_path / "out", to="any-precision")
    numvals = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["anyprec"]["sparse_numvals"]
    assert numvals == {"model.layers.0.self_attn.q_proj": kept.sum()}
    again = linear_weights(jl.load(tmp_path / "out")[0])["layers.0.attention.q"]
    for bits in widths:
        np.testing.assert_array_equal(
            *(read_at(planes(one), bits).dequantize_rows() for one in (again, made))
        )


def planes(w):
    """The weight around bit planes: those of one width are a codebook."""
    base = w.base
    if isinstance(base, codebook.Codebook):
        base = from_codes(unpack(base.codes), (base.table,), bits=base.codes.bits)
    return dataclasses.replace(w, base=base)


def test_weights_that_are_added_to_levels_mean_so_at_every_width_and_are_written_back(tmp_path):
    tensors, meant, counts = sparse_checkpoint(tmp_path / "q")
    model, _ = convert(tmp_path / "q", tmp_path / "out", to="huggingface")
    weights = linear_weights(model)
    for name in ("self_attn.q_proj", "mlp.down_proj", "mlp.up_proj"):
        ours = "layers.0." + name.removesuffix("_proj").replace("self_attn", "attention")
        for bits, rows in meant[name].items():
            w = read_at(weights[ours], bits)
            np.testing.assert_array_equal(w.dequantize_rows(jnp.float32), rows)
    written = huggingface.tensor_files.open_directory(tmp_path / "out")
    assert written.keys() == tensors.keys()
    jax.tree.map(np.testing.assert_array_equal, dict(written), tensors)
    block = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["anyprec"]
    assert block["sparse_numvals"] == counts


def test_weights_to_add_of_which_the_config_says_nothing_are_one_line(tmp_path):
    sparse_checkpoint(tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text("utf-8"))
    del config["anyprec"]["sparse_numvals"]["model.layers.0.mlp.down_proj"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match=r"mlp\.down_proj\.(cols|rows|vals)") as caught:
        jl.load(tmp_path / "q")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("last", "change", "message"),
    [
        ("rows", lambda x: x + 1, "rows must ascend from 0 to"),
        ("rows", lambda x: np.where(np.arange(x.size) == 5, 10**6, x), "rows must ascend from 0 to"),
        ("rows", lambda x: np.r_[x[:5], 2**31 - 1, -(2**31), x[7:]], "rows must ascend from 0 to"),
        ("cols", lambda x: x + 10**6, "cols must be below"),
        ("cols", lambda x: x - 10**6, "cols must be below"),
        ("cols", lambda x: 0 * x, "cols must ascend in each output"),
        ("cols", lambda x: x[1:], "cols must be I32"),
        ("vals", lambda x: x.astype(np.float32), "vals must be F16"),
    ],
)
def test_compressed_rows_that_are_none_are_one_line(last, change, message, tmp_path):
    def spoiled(parts):
        return parts | {last: change(parts[last]).astype(parts[last].dtype if last != "vals" else np.float32)}

    sparse_checkpoint(
        tmp_path / "q", lambda name, parts: spoiled(parts) if name == "mlp.down_proj" else parts
    )
    with pytest.raises(ValueError, match=rf"mlp\.down_proj: {message}") as caught:
        jl.load(tmp_path / "q")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"parent_precision": 9}, "parent_precision of .* got 9"),
        ({"seed_precision": 5}, "seed_precision of quantized weights must be 1, 2, 3, 4, got 5"),
        ({"group_count": 4}, "one table a row, got group_count=4"),
        ({"sparse_numvals": {"x": -3}}, "x of sparse_numvals must be .* got -3"),
        ({"sparse_numvals": 3}, "sparse_numvals of anyprec must be"),
    ],
    ids=str,
)
def test_any_precision_blocks_that_say_something_else_are_one_line(block, message, tmp_path):
    write(tmp_path / "q", LLAMA | {"anyprec": ANY["anyprec"] | block}, {"x": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=message):
        jl.load(tmp_path / "q")
