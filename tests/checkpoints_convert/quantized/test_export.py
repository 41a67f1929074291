"""Quantized models as other tools' files: bit for bit the published layouts, exact or refused."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quantized_files import (
    ANY,
    LLAMA,
    PHI3,
    any_precision,
    awq,
    awq_block,
    checkpoint,
    compressed,
    compressed_block,
    gptq,
    gptq_block,
)

import jaxllm as jl
from checkpoints_convert.quantized.affine import read_rows
from checkpoints_convert.tensor_files import open_directory
from jaxllm.files import convert, requantize
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.weights import affine, codebook, host_residual
from jaxllm.weights.affine import Affine
from jaxllm.weights.codebook import Codebook
from jaxllm.weights.dense import Dense
from jaxllm.weights.host_residual import HostResidual
from jaxllm.weights.permuted import Permuted
from jaxllm.weights.rotated import Rotated
from jaxllm.weights.scaled import Scaled

SECOND = gptq_block(checkpoint_format="gptq_v2")
EIGHT = compressed_block(num_bits=8, strategy="channel", group_size=None)

# name: (what to write, what makes a linear, what config.json says, its options)
WRITTEN = {
    **{
        f"gptq, {bits} bits{', zeros' * zeros}": (
            "gptq",
            gptq,
            gptq_block(bits=bits, sym=not zeros, checkpoint_format="gptq_v2"),
            {"bits": bits, "symmetric": not zeros, "version": 2},
        )
        for bits, zeros in ((2, True), (3, True), (4, False), (8, True))
    },
    "gptq, 3 bits, act-order": (
        "gptq",
        gptq,
        gptq_block(bits=3, desc_act=True, group_size=16, checkpoint_format="gptq_v2"),
        {"bits": 3, "act_order": True, "group_size": 16, "version": 2},
    ),
    "gptq, one group": (
        "gptq",
        gptq,
        gptq_block(group_size=-1, checkpoint_format="gptq_v2"),
        {"group_size": -1, "version": 2},
    ),
    "awq": ("awq", awq, awq_block(), {}),
    "compressed": ("compressed-tensors", compressed, compressed_block(), {}),
    "compressed, zeros": (
        "compressed-tensors",
        compressed,
        compressed_block(symmetric=False),
        {"symmetric": False},
    ),
    "compressed, act-order": (
        "compressed-tensors",
        compressed,
        compressed_block(actorder="group"),
        {"act_order": True},
    ),
    "compressed, 8 bits a row": ("compressed-tensors", compressed, EIGHT, {"bits": 8, "group_size": -1}),
    "any-precision": ("any-precision", any_precision, ANY, {}),
}

# those that say nothing which the others do not
SLOW = {
    "gptq, 8 bits, zeros",
    "gptq, one group",
    "gptq, 2 bits, zeros",
    "compressed",
    "compressed, act-order",
}


def said(path):
    """What config.json says of quantized weights."""
    config = json.loads((path / "config.json").read_text())
    return config.get("quantization_config") or config["anyprec"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in WRITTEN]
)
def test_files_are_written_byte_for_byte_as_they_were_read(name, tmp_path):
    to, make, block, options = WRITTEN[name]
    tensors, _ = checkpoint(tmp_path / "q", make, block, **options)
    convert(tmp_path / "q", tmp_path / "out", to=to)
    written = open_directory(tmp_path / "out")
    assert written.keys() == tensors.keys()
    for key, value in tensors.items():
        assert written[key].dtype == value.dtype, key
        np.testing.assert_array_equal(written[key], value, err_msg=key)
    given, got = next(iter(block.values())), said(tmp_path / "out")
    if to == "compressed-tensors":
        given, got = (one["config_groups"]["group_0"]["weights"] for one in (given, got))
    assert {key: got.get(key) for key in given if key != "arch_config"} == {
        key: value for key, value in given.items() if key != "arch_config"
    }


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_linears_stacked_in_one_of_theirs_are_written_stacked(to, tmp_path):
    config = {key: value for key, value in LLAMA.items() if key != "head_dim"} | {"model_type": "phi3"}
    make, block, options = (gptq, SECOND, {"version": 2}) if to == "gptq" else (awq, awq_block(), {})
    tensors, _ = checkpoint(tmp_path / "q", make, block, config=config, linears=PHI3, **options)
    convert(tmp_path / "q", tmp_path / "out", to=to)
    written = open_directory(tmp_path / "out")
    assert all(np.array_equal(written[key], value) for key, value in tensors.items())


@pytest.fixture(scope="module")
def dense():
    """A model whose linears are all of one shape, so that little is compiled."""
    config = dataclasses.replace(TINY, width=64, heads=4, kv_heads=4, head_dim=16, ffn=64, layers=2)
    return Decoder(config, rngs=nnx.Rngs(0))


def linears_of(model):
    return {name: w for name, w in linear_weights(model).items() if "layers" in name}


def with_linears(model, make, only=""):
    """The model with its linears, or those whose names have a part, made anew: of (name, rows)."""
    made = {name: make(name, w.dequantize_rows(jnp.float32)) for name, w in linears_of(model).items()
            if only in name}  # fmt: skip
    return replace_weights(model, made)


def stored(model, only="", **settings):
    """The model rounded to the nearest."""
    return with_linears(model, lambda _, rows: affine.quantize(rows.T, **settings), only)


def same_rows(a, b):
    a, b = linears_of(a), linears_of(b)
    assert a.keys() == b.keys()
    for name, w in a.items():
        np.testing.assert_array_equal(
            w.dequantize_rows(jnp.float32), b[name].dequantize_rows(jnp.float32), err_msg=name
        )


def written(model, path, to):
    """What was written, read again."""
    jl.save(model, path, to=to)
    return jl.load(path)[0]


@pytest.mark.parametrize("to", ["gptq", "compressed-tensors"])
def test_linears_of_several_settings_and_dense_ones_are_told_apart_in_the_config(to, dense, tmp_path):
    model = stored(dense, "attention", bits=4, group_size=32)
    model = stored(model, "mlp.up", bits=8, group_size=64, symmetric=True)
    model = stored(model, "mlp.down", bits=4, group_size=16)  # and the gates stay dense
    again = written(model, tmp_path / "out", to)
    same_rows(again, model)
    assert {type(w) for name, w in linears_of(again).items() if "gate" in name} == {Dense}
    block = said(tmp_path / "out")
    gate, up = (f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up"))
    if to == "gptq":
        assert (block["bits"], block["group_size"], block["sym"]) == (4, 32, False)
        assert block["dynamic"][f"+:{re.escape(up)}$"] == {"bits": 8, "group_size": 64}
        assert block["dynamic"][f"-:{re.escape(gate)}$"] == {}
        (names,) = block["modules_in_block_to_quantize"]
        assert sorted(names) == [f"mlp.{n}_proj" for n in ("down", "up")] + [
            f"self_attn.{n}_proj" for n in "koqv"
        ]
    else:
        assert {gate, "lm_head"} <= set(block["ignore"]) and up not in block["ignore"]
        targets = [group["targets"] for group in block["config_groups"].values()]
        assert targets[0] == ["Linear"] and any(up in names for names in targets[1:])


def test_awq_leaves_dense_what_is_dense(dense, tmp_path):
    model = stored(dense, "attention", bits=4, group_size=32)
    same_rows(written(model, tmp_path / "out", "awq"), model)
    assert "model.layers.0.mlp.up_proj" in said(tmp_path / "out")["modules_to_not_convert"]


@pytest.mark.parametrize("bits", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_codebooks_are_any_precisions_tables_of_one_width(bits, dense, tmp_path):
    rng = np.random.default_rng(0)

    def made(_, rows):
        table = jnp.asarray(rng.normal(0, 0.1, (len(rows), 2**bits)), jnp.float16)  # in no order
        return codebook.from_codes(jnp.asarray(rng.integers(0, 2**bits, rows.shape)), table, bits=bits)

    model = with_linears(dense, made)
    again = written(model, tmp_path / "out", "any-precision")
    same_rows(again, model)
    same_rows(written(again, tmp_path / "again", "huggingface"), model)
    assert said(tmp_path / "out")["seed_precision"] == said(tmp_path / "out")["parent_precision"] == bits


def float_zeros(rows):
    scale, zero_point = affine.min_max(rows, bits=4, group_size=32)
    return affine.encode(rows, scale, zero_point + 0.25, bits=4, group_size=32)


REFUSED = {
    "dense": (None, "gptq", "gptq needs a quantized model, got dense weights: quantize first"),
    "bits": ({"bits": 5}, "gptq", "bits must be 2 or 3 or 4 or 8, got bits=5: the nearest is bits=8"),
    "awq bits": ({"bits": 3}, "awq", "bits must be 4, got bits=3: the nearest is bits=4"),
    "short group": (
        {"group_size": 48},
        "compressed-tensors",
        "group_size must divide .*=48, K=64: the nearest is group_size=16",
    ),
    "codes": ({}, "any-precision", "must be tables, as of SqueezeLlm, Lnq and AnyPrecision, got Affine"),
    "zeros": (float_zeros, "awq", r"whole codes \(integer_zero_point=True\), got float16"),
    "scales": (
        lambda rows: affine.encode(rows, *affine.min_max(rows, bits=4, group_size=32), bits=4,
                                   group_size=32, integer_zero_point=True, scale_bits=4),
        "gptq",
        r"scales must be floats \(scale_bits=None\), got codes of 4 bits",
    ),
    "tables": (
        lambda rows: codebook.encode(rows, rows[:, :4], bits=2),
        "gptq",
        "must be affine codes, .* any-precision holds tables, got Codebook",
    ),
    "inputs scaled": (
        lambda rows: Scaled(affine.quantize(rows.T, bits=4, group_size=32), jnp.ones(64, jnp.float16)),
        "awq",
        "must be affine codes, as of Rtn, Gptq and DashQ, got Scaled",
    ),
    "act-order": (
        lambda rows: Permuted(affine.quantize(rows.T, bits=4, group_size=32), jnp.arange(64)[::-1]),
        "awq",
        "in their own order, got act-order: gptq holds it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_layout_cannot_hold_is_one_line_with_the_nearest_that_it_can(name, dense, tmp_path):
    make, to, message = REFUSED[name]
    model = dense
    if isinstance(make, dict):
        model = stored(dense, "0.mlp.up", **({"bits": 4, "group_size": 32} | make))
    elif make is not None:
        model = with_linears(dense, lambda _, rows: make(rows), "0.mlp.up")
    with pytest.raises(ValueError, match=message) as caught:
        jl.save(model, tmp_path / "out", to=to)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    if make is not None:
        assert "at model.layers.0.mlp.up_proj: quantize so, or round it (--requantize)" in str(caught.value)


def test_a_config_that_awq_cannot_say_is_refused(dense, tmp_path):
    model = stored(dense, "attention", bits=4, group_size=32)
    with pytest.raises(ValueError, match=r"must have one group_size, got \[16, 32\]: gptq holds several"):
        jl.save(stored(model, "mlp", bits=4, group_size=16), tmp_path / "out", to="awq")
    head = affine.quantize(linear_weights(dense)["head"].rows.T, bits=4, group_size=32)
    with pytest.raises(ValueError, match="lm_head must be dense, got codes: gptq holds a quantized head"):
        jl.save(replace_weights(model, {"head": head}), tmp_path / "out", to="awq")
    same_rows(written(replace_weights(model, {"head": head}), tmp_path / "out", "gptq"), model)


def test_requantizing_rounds_what_does_not_fit_and_leaves_the_rest(dense, tmp_path):
    model = with_linears(dense, lambda _, rows: float_zeros(rows), "mlp")
    model = stored(model, "attention.q", bits=4, group_size=32)
    small, changes = requantize(model, "awq")
    assert sorted(changes) == sorted(name for name in linears_of(model) if "mlp" in name)
    before, after = (linears_of(m)["layers.1.mlp.up"].dequantize_rows(jnp.float32) for m in (model, small))
    change = np.abs(before - after).mean() / np.abs(before).mean()
    assert 0 < change < 0.1
    np.testing.assert_allclose(changes["layers.1.mlp.up"], change, rtol=1e-5)
    q = "layers.0.attention.q"
    np.testing.assert_array_equal(*(linears_of(m)[q].codes.words for m in (small, model)))
    same_rows(written(small, tmp_path / "out", "awq"), small)


def test_codes_that_only_need_more_bits_are_not_rounded(dense, tmp_path):
    model = stored(dense, "mlp", bits=3, group_size=32, symmetric=True)
    small, changes = requantize(model, "awq")
    assert set(changes.values()) == {0.0} and len(changes) == 6
    same_rows(written(small, tmp_path / "out", "awq"), model)


@pytest.mark.parametrize(
    ("to", "kind"),
    [pytest.param("gptq", Affine, marks=pytest.mark.slow), ("any-precision", Codebook)],
)
def test_requantizing_takes_any_weight_and_an_embedding_becomes_dense(to, kind, dense):
    rows = linear_weights(dense)["layers.0.mlp.up"].rows
    two = codebook.encode(rows, rows[:, :4], bits=2)
    table = linear_weights(dense)["embedding"].rows
    eight = affine.quantize(table.T, bits=8, group_size=64)
    rotated = Rotated(affine.quantize(rows.T, bits=4, group_size=32), 8, 1.0, 0)
    residual, scale = host_residual.encode(rows - two.dequantize_rows(), bits=4)
    rest = HostResidual(two, residual, scale, None, 0, "exact", two.shape, two.dtype)
    weights = {"layers.0.mlp.up": two, "layers.0.mlp.gate": rotated, "layers.0.attention.q": rest}
    small, changes = requantize(replace_weights(dense, weights | {"embedding": eight}), to)
    made = linear_weights(small)
    assert all(isinstance(made[name], kind) for name in weights)
    np.testing.assert_array_equal(made["embedding"].rows, eight.dequantize_rows(jnp.float32))
    exact = {"any-precision": {"layers.0.mlp.up"}}.get(to, set())  # the codebook, held as it is
    assert set(changes) == set(weights) - exact
    # the residual's share was not lost: what was rounded is nearer to the weight than the base
    base, whole = (np.abs(w.dequantize_rows(jnp.float32) - rows).mean() for w in (two, read(rest)))
    assert whole < base / 2


def read(w):
    return Dense(read_rows(w))


@pytest.mark.parametrize("to", ["native", "huggingface", "gguf"])
def test_layouts_that_round_nothing_cannot_be_requantized_to(to, dense):
    with pytest.raises(
        ValueError, match="requantize: to must be one of gptq, awq, compressed-tensors, any-precision, got"
    ):
        requantize(dense, to)
