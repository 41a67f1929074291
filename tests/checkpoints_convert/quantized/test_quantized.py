"""Checkpoints quantized by other tools, read as our formats: the numbers meant, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized_files import (
    CASES,
    HIDDEN,
    KEYS,
    LLAMA,
    OURS,
    PHI3,
    SYMMETRIC,
    awq_block,
    checkpoint,
    compressed,
    compressed_block,
    gptq,
    gptq_block,
    int32,
    logits,
    same_model,
    word_row,
    write,
)

import jaxllm as jl
from checkpoints_convert.materialize import named_weights
from jaxllm.files import convert
from jaxllm.weights import affine
from jaxllm.weights.affine import Affine
from jaxllm.weights.permuted import Permuted
from jaxllm.weights.planes.bit_planes import BitPlanes


@pytest.mark.parametrize("name", CASES)
def test_a_quantized_linear_means_just_the_numbers_of_its_layout(name, tmp_path):
    make, block, options = CASES[name]
    _, rows = checkpoint(tmp_path / "q", make, block, **options)
    model, tokenizer = jl.load(tmp_path / "q")
    assert tokenizer is None
    weights = named_weights(model)
    for theirs, want in rows.items():
        w = weights[OURS[theirs.partition(".")[2]]]
        assert w.shape == want.shape[::-1] and w.dtype == np.float32
        np.testing.assert_array_equal(w.dequantize_rows(jnp.float32), want)
        inner = w.weight if isinstance(w, Permuted) else w
        assert isinstance(w, Permuted) == ("act-order" in name)
        assert type(inner) is (BitPlanes if name == "any-precision" else Affine)
        if isinstance(inner, Affine):
            assert (inner.zero_point is None) == (name in SYMMETRIC)
    assert isinstance(weights["head.w"], jax.Array) and model.embedding.table.get_value().dtype == jnp.float32


@pytest.mark.parametrize("name", ["gptq, 3 bits, act-order", "awq", "compressed, zeros", "any-precision"])
def test_logits_are_those_of_the_model_with_dense_weights(name, tmp_path):
    make, block, options = CASES[name]
    checkpoint(tmp_path / "q", make, block, **options)
    got, want = (logits(jl.load(tmp_path / part)[0]) for part in ("q", "q-dense"))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", ["gptq, act-order", "gptq, zeros", "awq", "any-precision"])
def test_linears_stacked_in_one_of_theirs_are_cut_apart(name, tmp_path):
    make, block, options = CASES[name]
    config = {key: value for key, value in LLAMA.items() if key != "head_dim"} | {"model_type": "phi3"}
    _, rows = checkpoint(tmp_path / "q", make, block, config=config, linears=PHI3, **options)
    model, _ = jl.load(tmp_path / "q")
    weights = {key: w for key, w in named_weights(model).items() if not isinstance(w, jax.Array)}
    assert len(weights) == 7
    parts = {
        "self_attn.qkv_proj": ("attention.q", "attention.k", "attention.v"),
        "mlp.gate_up_proj": ("mlp.gate", "mlp.up"),
        "mlp.down_proj": ("mlp.down",),
    }
    for theirs, names in parts.items():
        got = [weights[f"layers.0.{name}.w"].dequantize_rows(jnp.float32) for name in names]
        np.testing.assert_array_equal(np.concatenate(got), rows[theirs])


def test_gptq_stores_the_matrices_of_gpt_2_like_all_others(tmp_path):
    config = {"model_type": "gpt2", "vocab_size": 67, "n_embd": 64, "n_layer": 1, "n_head": 4,
              "n_positions": 64}  # fmt: skip
    rng = np.random.default_rng(0)

    def one(*shape):
        return rng.normal(0, 0.1, shape).astype(np.float32)

    tensors = {
        "wte.weight": one(67, 64),
        "wpe.weight": one(64, 64),
        "ln_f.weight": one(64),
        "ln_f.bias": one(64),
    }
    for norm in ("ln_1", "ln_2"):
        tensors |= {f"h.0.{norm}.weight": one(64), f"h.0.{norm}.bias": one(64)}
    sizes = {
        "attn.c_attn": (64, 192),
        "attn.c_proj": (64, 64),
        "mlp.c_fc": (64, 256),
        "mlp.c_proj": (256, 64),
    }
    rows = {}
    for name, (K, N) in sizes.items():
        parts, rows[name] = gptq(rng, K, N)
        tensors |= {f"h.0.{name}.{last}": value for last, value in parts.items()}
        tensors[f"h.0.{name}.bias"] = one(N)
    model, _ = jl.load(write(tmp_path / "q", config | gptq_block(), tensors))
    weights = named_weights(model)
    got = [weights[f"layers.0.attention.{name}.w"].dequantize_rows(jnp.float32) for name in "qkv"]
    np.testing.assert_array_equal(np.concatenate(got), rows["attn.c_attn"])
    np.testing.assert_array_equal(weights["layers.0.mlp.up.bias"], tensors["h.0.mlp.c_fc.bias"])
    packed = {"h.0.mlp.c_fc." + last: value for last, value in compressed(rng, 64, 256)[0].items()}
    write(tmp_path / "q", config | compressed_block(), tensors | packed)
    with pytest.raises(
        ValueError, match=r"compressed-tensors has no \[in, out\] matrices, got transformer.h.0"
    ):
        jl.load(tmp_path / "q")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_of_nothing_less_one_comes_back_as_it_was(bits, tmp_path):
    """GPTQModel subtracts from whole words, borrowing from the fields above; at 3 bits from each field."""
    tensors, _ = checkpoint(
        tmp_path / "q", gptq, gptq_block(bits=bits, sym=False), bits=bits, symmetric=False
    )
    name = "model.layers.0.self_attn.k_proj.qzeros"
    zeros = np.random.default_rng(1).integers(0, 2**bits, (2, KEYS))
    zeros[:, :3] = 0
    if bits == 3:
        tensors[name] = np.stack([word_row((row - 1) % 8, 3) for row in zeros])
    else:
        words = np.stack([word_row(row, bits) for row in zeros]).view(np.uint32).astype(np.int64)
        tensors[name] = np.stack([int32(row - sum(1 << i for i in range(0, 32, bits))) for row in words])
    model, _ = jl.load(write(tmp_path / "q", LLAMA | gptq_block(bits=bits, sym=False), tensors))
    w = named_weights(model)["layers.0.attention.k.w"]
    np.testing.assert_array_equal(affine.zero_points(w), zeros)


def test_a_symmetric_file_of_the_second_version_that_says_the_first_is_read_as_it_is(tmp_path):
    _, rows = checkpoint(tmp_path / "q", gptq, gptq_block(), version=2)
    w = named_weights(jl.load(tmp_path / "q")[0])["layers.0.mlp.up.w"]
    assert w.zero_point is None
    np.testing.assert_array_equal(w.dequantize_rows(jnp.float32), rows["mlp.up_proj"])


def test_inputs_in_the_order_of_their_groups_need_no_permutation(tmp_path):
    tensors, rows = checkpoint(tmp_path / "q", gptq, gptq_block(desc_act=True))
    write(tmp_path / "q", LLAMA | gptq_block(desc_act=True), tensors)
    weights = named_weights(jl.load(tmp_path / "q")[0])
    assert all(type(weights[name]) is Affine for name in OURS.values())
    np.testing.assert_array_equal(
        weights["layers.0.mlp.up.w"].dequantize_rows(jnp.float32), rows["mlp.up_proj"]
    )


def test_linears_left_out_stay_dense_and_biases_of_nothing_are_dropped(tmp_path):
    tensors, rows = checkpoint(tmp_path / "q", gptq, gptq_block())
    name = "model.layers.0.self_attn.o_proj"
    for last in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{name}.{last}"]
    tensors[f"{name}.weight"] = rows["self_attn.o_proj"]
    tensors["model.layers.0.mlp.up_proj.bias"] = np.zeros(HIDDEN, np.float16)
    weights = named_weights(jl.load(write(tmp_path / "q", LLAMA | gptq_block(), tensors))[0])
    np.testing.assert_array_equal(weights["layers.0.attention.o.w"], rows["self_attn.o_proj"])
    tensors["model.layers.0.mlp.up_proj.bias"][5] = 1
    write(tmp_path / "q", LLAMA | gptq_block(), tensors)
    with pytest.raises(ValueError, match=r"1 left over \(model.layers.0.mlp.up_proj.bias\)"):
        jl.load(tmp_path / "q")


def test_names_without_their_prefix_are_found(tmp_path):
    tensors, _ = checkpoint(tmp_path / "q", gptq, gptq_block())
    want, _ = jl.load(tmp_path / "q")
    tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    same_model(jl.load(write(tmp_path / "q", LLAMA | gptq_block(), tensors))[0], want)


def test_a_cast_is_of_dense_weights_alone(tmp_path):
    checkpoint(tmp_path / "q", gptq, gptq_block())
    plain, cast = (named_weights(jl.load(tmp_path / "q", dtype=d)[0]) for d in (None, "bfloat16"))
    w = cast["layers.0.mlp.up.w"]
    assert cast["embedding.table"].dtype == jnp.bfloat16 and w.dtype == jnp.bfloat16
    assert w.scale.dtype == jnp.float16
    np.testing.assert_array_equal(w.codes.words, plain["layers.0.mlp.up.w"].codes.words)


@pytest.mark.parametrize("name", ["gptq, act-order", "compressed"])
def test_a_mesh_holds_the_same_codes_each_device_its_part(name, tmp_path):
    make, block, options = CASES[name]
    checkpoint(tmp_path / "q", make, block, **options)
    plain, _ = jl.load(tmp_path / "q")
    mesh = jl.make_mesh(data=1, model=2, devices=jax.devices()[:2])
    model, _ = jl.load(tmp_path / "q", mesh=mesh)
    same_model(model, plain)
    w = named_weights(model)["layers.0.mlp.down.w"]
    words = w.weight.codes.words if isinstance(w, Permuted) else w.codes.words  # [64, 128 / 32, 4]
    shape = (32, 4, 4) if isinstance(w, Permuted) else (64, 2, 4)  # cut along N, along K
    assert words.addressable_shards[0].data.shape == shape
    if name == "gptq, act-order":
        np.testing.assert_allclose(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


def test_a_quantized_checkpoint_becomes_a_native_one(tmp_path):
    make, block, options = CASES["compressed, act-order"]
    checkpoint(tmp_path / "q", make, block, **options)
    model, _ = convert(tmp_path / "q", tmp_path / "native")
    again, _ = jl.load(tmp_path / "native")
    same_model(again, model)
    assert named_weights(again)["layers.0.mlp.up.w"].weight.scale.dtype == jnp.bfloat16
    with pytest.raises(
        ValueError, match="only dense weights can be written as they are, .* got Permuted at layers.0"
    ):
        jl.save(model, tmp_path / "out", to="huggingface")
    assert not (tmp_path / "out").exists()


# What is refused, in one line.


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "or of gptq .*, awq .*, compressed-tensors .*names 'bitsandbytes'",
        ),
        ({"quant_method": "fp8"}, "names 'fp8'"),
        ({"quant_algo": "NVFP4"}, "names 'NVFP4'"),
        ({}, None),
        ("gptq", "quantization_config must be a JSON object, got 'gptq'"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 32}, "bits of .* must be 2, 3, 4, 8, got 5"),
        ({"quant_method": "gptq", "bits": "4", "group_size": 32}, "got '4'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size of .* -1 or at least 1, got 0"),
        ({"quant_method": "gptq", "bits": 4, "group_size": True}, "got True"),
        ({"quant_method": "gptq", "bits": 4}, "group_size of .* got None"),
        (gptq_block(checkpoint_format="marlin")["quantization_config"], "names 'gptq as marlin'"),
        (gptq_block(is_marlin_format=True)["quantization_config"], "names 'gptq as marlin'"),
        (awq_block(version="gemv")["quantization_config"], "names 'awq as gemv'"),
        (awq_block(bits=3)["quantization_config"], "bits of .* must be 4, got 3"),
        (compressed_block("int-quantized")["quantization_config"], "as int-quantized'"),
        (compressed_block(strategy="block")["quantization_config"], "int by block'"),
        (compressed_block(type="float")["quantization_config"], "float by group'"),
        (compressed_block(num_bits=3)["quantization_config"], "num_bits of .* must be 4, 8, got 3"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "config_groups must be a JSON"),
    ],
    ids=str,
)
def test_schemes_and_sizes_that_are_not_supported_are_one_line(block, message, tmp_path):
    write(tmp_path / "q", LLAMA | {"quantization_config": block}, {"x": np.zeros(1, np.float32)})
    message = "tensors of llama, got" if message is None else message  # {} says nothing: plain weights
    with pytest.raises(ValueError, match=message) as caught:
        jl.load(tmp_path / "q")
    assert "\n" not in str(caught.value)


def several_ways(names, **targets):
    """A block of config.json with 8 bits a row, 4 bits with zeros, and 4 bits, each for its targets."""
    eight = compressed_block(num_bits=8, strategy="channel", group_size=None)
    groups = {}
    blocks = (eight, compressed_block(symmetric=False), compressed_block())
    for name, block in zip(names, blocks, strict=True):
        groups[name] = block["quantization_config"]["config_groups"]["group_0"] | {"targets": targets[name]}
    both = compressed_block()
    both["quantization_config"]["config_groups"] = groups
    return both


def test_linears_of_one_checkpoint_are_stored_in_several_ways(tmp_path):
    q = "model.layers.0.self_attn.q_proj"
    # names come before patterns, these before kinds; of two patterns the first in alphabetical order
    eights = ["re:.*down", "re:.*n.o_proj", "re:.*q_proj"]
    block = several_ways("abc", a=eights, b=[q], c=["Linear", "re:.*o_proj"])

    def make(rng, K, N):
        options = next(ways)
        return compressed(rng, K, N, **options)

    eight, zeros = {"bits": 8, "group_size": -1}, {"symmetric": False}
    ways = iter([zeros, {}, {}, eight, {}, {}, eight])  # in the order of LINEARS
    _, rows = checkpoint(tmp_path / "q", make, block)
    weights = named_weights(jl.load(tmp_path / "q")[0])
    for theirs, want in rows.items():
        np.testing.assert_array_equal(
            weights[OURS[theirs.partition(".")[2]]].dequantize_rows(jnp.float32), want
        )
    assert weights["layers.0.mlp.down.w"].codes.bits == weights["layers.0.attention.o.w"].codes.bits == 8
    lone = several_ways("abc", a=["re:.*down"], b=[q], c=["re:.*k_proj"])
    tensors, _ = checkpoint(tmp_path / "r", compressed, compressed_block())
    write(tmp_path / "r", LLAMA | lone, tensors)
    with pytest.raises(ValueError, match=r"a target of config_groups must name model\.layers\.0\.self_attn"):
        jl.load(tmp_path / "r")
    missing = several_ways("abc", a=None, b=[q], c=["Linear"])
    write(tmp_path / "r", LLAMA | missing, tensors)
    with pytest.raises(ValueError, match="a.targets must be a list of names, got None"):
        jl.load(tmp_path / "r")


UP = "model.layers.0.mlp.up_proj."


@pytest.mark.parametrize(
    ("last", "change", "message"),
    [
        ("qweight", lambda v: v[:-1], r"up_proj: qweight must be I32 \[8, 128\] by config.json, got I32 \[7"),
        ("qweight", lambda v: v.astype(np.float32), "qweight must be I32 .*got F32"),
        ("qzeros", lambda v: v.T.copy(), r"qzeros must be I32 \[2, 16\]"),
        ("scales", lambda v: v.astype(np.int32), "scales must be F16 or BF16 or F32 .*got I32"),
        ("g_idx", lambda v: v * 0, "g_idx must put 32 inputs in each of 2 groups"),
        ("g_idx", lambda v: v - 1, "g_idx must put 32 inputs"),
        ("g_idx", lambda v: v + 2**30, "g_idx must put 32 inputs"),
        ("scales", None, r"1 missing \(model.layers.0.mlp.up_proj.scales\)"),
        (
            "qweight",
            None,
            r"1 missing \(model.layers.0.mlp.up_proj.weight\); 3 left over \(model.layers.0.mlp",
        ),
    ],
)
def test_broken_tensors_of_a_linear_are_one_line(last, change, message, tmp_path):
    block = gptq_block(desc_act=True)
    tensors, _ = checkpoint(tmp_path / "q", gptq, block, act_order=True)
    if change is None:
        del tensors[UP + last]
    else:
        tensors[UP + last] = change(tensors[UP + last])
    write(tmp_path / "q", LLAMA | block, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        jl.load(tmp_path / "q")
    assert "\n" not in str(caught.value)


def test_sizes_that_a_layout_cannot_hold_are_one_line(tmp_path):
    checkpoint(tmp_path / "q", gptq, gptq_block())
    config = LLAMA | gptq_block() | {"intermediate_size": 100}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="codes must fill words of 32 bits, got 100 codes of 4 bits"):
        jl.load(tmp_path / "q")
    tensors, _ = checkpoint(tmp_path / "c", compressed, compressed_block())
    tensors[UP + "weight_shape"][0] += 1
    write(tmp_path / "c", LLAMA | compressed_block(), tensors)
    with pytest.raises(ValueError, match=r"up_proj: weight_shape must be \(128, 64\), got \(129, 64\)"):
        jl.load(tmp_path / "c")
