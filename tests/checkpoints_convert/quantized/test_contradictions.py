"""Quantized checkpoints whose config says one thing and whose arrays another: these decide, or it is refused.

And GPTQ's `dynamic`, which gives modules settings of their own.
"""

import numpy as np
import pytest
from quantized_files import (
    LINEARS,
    LLAMA,
    OURS,
    awq,
    awq_block,
    checkpoint,
    compressed,
    compressed_block,
    gptq,
    gptq_block,
    write,
)

import jaxllm as jl
from checkpoints_convert.materialize import named_weights
from checkpoints_convert.quantized.config import REPEATS, module_pattern

UP = "model.layers.0.mlp.up_proj."


def same_rows(path, rows):
    weights = named_weights(jl.load(path)[0])
    for theirs, want in rows.items():
        w = weights[OURS[theirs.partition(".")[2]]]
        np.testing.assert_array_equal(w.dequantize_rows(np.float32), want)


@pytest.mark.parametrize("says", [{"desc_act": True}, {"desc_act": False}, {"desc_act": None}], ids=str)
def test_the_order_in_the_file_decides_whatever_the_flag_says(says, tmp_path):
    _, rows = checkpoint(tmp_path / "q", gptq, gptq_block(**says), act_order=True)
    same_rows(tmp_path / "q", rows)


def refused(path, tensors, block, message):
    with pytest.raises(ValueError, match=message) as caught:
        jl.load(write(path, LLAMA | block, tensors))
    assert "\n" not in str(caught.value)


def test_a_flag_that_promises_an_order_needs_one_where_there_are_groups(tmp_path):
    tensors, _ = checkpoint(tmp_path / "q", gptq, gptq_block(desc_act=True), act_order=True)
    del tensors[UP + "g_idx"]
    refused(tmp_path / "q", tensors, gptq_block(desc_act=True), "up_proj: .*must be a g_idx, got none")
    block = compressed_block(actorder="group")
    tensors, _ = checkpoint(tmp_path / "c", compressed, block, act_order=True)
    del tensors[UP + "weight_g_idx"]
    refused(tmp_path / "c", tensors, block, "must be a weight_g_idx, got none")


@pytest.mark.parametrize("bits", [2, 4])
def test_zeros_that_contradict_their_flag_or_version_are_an_error(bits, tmp_path):
    tensors, _ = checkpoint(
        tmp_path / "a", gptq, gptq_block(bits=bits, sym=False), bits=bits, symmetric=False
    )
    refused(tmp_path / "a", tensors, gptq_block(bits=bits), "the middle code everywhere by sym=true.* first")
    tensors, rows = checkpoint(tmp_path / "b", gptq, gptq_block(bits=bits), bits=bits)
    second = gptq_block(bits=bits, checkpoint_format="gptq_v2")
    refused(tmp_path / "b", tensors, second, "by sym=true in a file of the second")
    same_rows(write(tmp_path / "b", LLAMA | gptq_block(bits=bits, sym=None), tensors), rows)
    # symmetric files of the second version that say they are neither
    tensors, rows = checkpoint(tmp_path / "c", gptq, second, bits=bits, version=2)
    refused(tmp_path / "c", tensors, gptq_block(bits=bits, sym=False), "must be of the first version")
    same_rows(write(tmp_path / "c", LLAMA | gptq_block(bits=bits), tensors), rows)


def test_zeros_of_awq_and_compressed_tensors_that_contradict_their_flag_are_an_error(tmp_path):
    tensors, _ = checkpoint(tmp_path / "a", awq, awq_block())
    refused(tmp_path / "a", tensors, awq_block(zero_point=False), "must be 8 everywhere by zero_point=false")
    block = compressed_block(symmetric=False)
    tensors, _ = checkpoint(tmp_path / "c", compressed, block, symmetric=False)
    refused(tmp_path / "c", tensors, compressed_block(), "the middle code by symmetric=true")


@pytest.mark.parametrize("group_size", [16, 64, -1])
def test_a_group_size_that_does_not_fit_the_arrays_is_an_error(group_size, tmp_path):
    tensors, _ = checkpoint(tmp_path / "q", gptq, gptq_block())
    refused(tmp_path / "q", tensors, gptq_block(group_size=group_size), "must be .* by config.json")


def test_a_quantized_head_is_kept_where_the_config_ties_it(tmp_path):
    tensors, _ = checkpoint(tmp_path / "q", gptq, gptq_block())
    parts, rows = gptq(np.random.default_rng(3), 64, 72)
    del tensors["lm_head.weight"]
    tensors |= {f"lm_head.{name}": value for name, value in parts.items()}
    rng = np.random.default_rng(4)
    tensors["model.embed_tokens.weight"] = rng.normal(0, 0.1, (72, 64)).astype(np.float32)
    config = LLAMA | gptq_block() | {"tie_word_embeddings": True, "vocab_size": 72}
    with pytest.warns(UserWarning, match="lm_head.weight differs"):
        model, _ = jl.load(write(tmp_path / "q", config, tensors))
    np.testing.assert_array_equal(named_weights(model)["head.w"].dequantize_rows(np.float32), rows)


# `dynamic`: the first pattern that a module's name begins with decides.


def dynamic(path, patterns, **own):
    """A checkpoint whose linears have the options that `own` has by the last part of their names."""
    ways = iter([own.get(name.rpartition(".")[2], {}) for name in LINEARS])

    def make(rng, K, N):
        return gptq(rng, K, N, **next(ways))

    return checkpoint(path, make, gptq_block(dynamic=patterns))


def test_modules_have_the_bits_and_groups_that_dynamic_gives_them(tmp_path):
    patterns = {
        r"+:.*\.up_proj": {"bits": 8, "group_size": 64, "sym": False},
        r".*\.0\..*(down|up)_proj": {"group_size": 16, "desc_act": True},
        r"up_proj": {"bits": 2},  # fits none: a name begins with its pattern
    }
    eight = {"bits": 8, "group_size": 64, "symmetric": False}
    own = {"up_proj": eight, "down_proj": {"group_size": 16, "act_order": True}}
    _, rows = dynamic(tmp_path / "q", patterns, **own)
    same_rows(tmp_path / "q", rows)


def test_modules_that_dynamic_leaves_out_are_dense(tmp_path):
    patterns = {"-:.*o_proj": {}}
    tensors, rows = dynamic(tmp_path / "q", patterns)
    refused(
        tmp_path / "q", tensors, gptq_block(dynamic=patterns), "leaves model.layers.0.self_attn.o_proj dense"
    )
    name = "model.layers.0.self_attn.o_proj"
    tensors = {key: value for key, value in tensors.items() if not key.startswith(name)}
    tensors[f"{name}.weight"] = rows.pop("self_attn.o_proj")
    write(tmp_path / "q", LLAMA | gptq_block(dynamic=patterns), tensors)
    same_rows(tmp_path / "q", rows)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([], None),
        ("x", "dynamic must be a JSON object"),
        ({"x": 3}, "dynamic of 'x' must be a JSON object, got 3"),
        ({"x": {"bits": 5}}, "bits of quantized weights must be 2, 3, 4, 8, got 5"),
        ({"x": {"sym": 1}}, "sym of quantized weights must be true or false"),
        ({"(": {}}, "a regular expression"),
        ({"(a*)*": {}}, "must repeat no group"),
        ({".*" * (REPEATS + 1): {}}, "must repeat no group, and at most"),
    ],
)
def test_what_dynamic_must_not_say_is_one_line(patterns, message, tmp_path):
    tensors, rows = checkpoint(tmp_path / "q", gptq, gptq_block(dynamic=patterns))
    if message is None:
        same_rows(tmp_path / "q", rows)
    else:
        refused(tmp_path / "q", tensors, gptq_block(dynamic=patterns), message)


def test_patterns_that_people_write_are_taken():
    for text in (r".*\.18\..*gate.*", r"model\.layers\.(?:[0-9]|1[0-9])\..*", r"re:[^.*+]+\(x\)*", ""):
        assert module_pattern(text)
