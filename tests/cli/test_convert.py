"""`jaxllm convert`: what it keeps, and what it refuses; outputs whole or not at all."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from command_line import assert_refused, broken_checkpoint

import jaxllm as jl
from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.weights import affine


@pytest.mark.parametrize("to", ["native", "huggingface"])
def test_convert_keeps_the_model(jaxllm, tiny_checkpoint, to):
    done = jaxllm("convert", tiny_checkpoint, "out", "--to", to, "--json")
    assert done.status == 0, done.err
    assert list(done.json) == ["out", "weight_bytes", "bits_per_weight", "seconds"]
    assert done.json["out"] == "out"
    said = [
        jaxllm("generate", "--model", model, "--prompt", "the man", "--max-new-tokens", 5, "--json")
        for model in (tiny_checkpoint, "out")
    ]
    assert said[0].json["prompts"] == said[1].json["prompts"]


def test_convert_to_another_dtype_halves_the_bytes(jaxllm, tiny_checkpoint):
    done = jaxllm("convert", tiny_checkpoint, "out", "--dtype", "bfloat16", "--json")
    assert done.json["bits_per_weight"] == 16


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "model.safetensors"),
        ("shape", r"norm.*31"),
        ("missing", r"model\.norm\.weight"),
        ("unknown", "[Ll]lama"),
        ("quantized", "hqq"),
        ("pickled", "pickle"),
    ],
)
def test_broken_checkpoint_is_refused_and_nothing_is_left(jaxllm, tmp_path_factory, how, message):
    source = broken_checkpoint(tmp_path_factory.mktemp("broken") / how, how)
    assert_refused(jaxllm("convert", source, "out"), message)


@pytest.fixture
def five_bits(jaxllm, tiny_checkpoint):
    """A native directory, one of whose linears has codes of 5 bits."""
    model, tokenizer = jl.load(tiny_checkpoint)
    name = "layers.0.mlp.up"
    w = affine.quantize(linear_weights(model)[name].rows.T, bits=5, group_size=16)
    jl.save(replace_weights(model, {name: w}), "small", tokenizer)
    return Path("small")


def test_a_quantized_model_is_written_for_others_exactly_or_rounded_where_asked(jaxllm, five_bits):
    refused = jaxllm("convert", five_bits, "out", "--to", "awq")
    assert_refused(refused, "bits must be 4, got bits=5: the nearest is .*--requantize", left=[five_bits])
    done = jaxllm("convert", five_bits, "out", "--to", "awq", "--requantize", "--json")
    assert done.status == 0, done.err
    assert done.json["requantized"] == 1 and 0.01 < done.json["relative_change"] < 0.2
    again = jaxllm("convert", "out", "other", "--to", "gptq", "--json")
    assert again.json["weight_bytes"] == done.json["weight_bytes"]


@pytest.mark.slow
def test_the_perplexity_before_and_after_rounding_is_that_of_eval(jaxllm, five_bits):
    Path("text.txt").write_text("Once upon a time there was a little dog. " * 20, "utf-8")
    rounded = ("--to", "awq", "--requantize", "--text", "text.txt", "--json")
    done = jaxllm("convert", five_bits, "out", *rounded).json
    assert done["perplexity_before"] != done["perplexity"]
    for model, name in ((five_bits, "perplexity_before"), ("out", "perplexity")):
        read = jaxllm("eval", "--model", model, "--text", "text.txt", "--json").json
        np.testing.assert_allclose(read["perplexity"], done[name], rtol=1e-5)


def test_codes_of_a_dense_model_and_a_text_without_rounding_are_refused(jaxllm, tiny_checkpoint):
    assert_refused(jaxllm("convert", tiny_checkpoint, "out", "--to", "gptq"), "quantize first")
    assert_refused(
        jaxllm("convert", tiny_checkpoint, "out", "--to", "gptq", "--requantize"),
        "dense weights: quantize first",
    )
    assert_refused(
        jaxllm("convert", tiny_checkpoint, "out", "--requantize"),
        "to must be one of gptq, awq, .*, got 'native'",
    )
    assert_refused(
        jaxllm("convert", tiny_checkpoint, "out", "--text", "text.txt"), "--text applies with --requantize"
    )


def test_a_gguf_file_is_written_and_read_through_the_door(jaxllm, tiny_checkpoint):
    pytest.importorskip("gguf")
    done = jaxllm("convert", tiny_checkpoint, "model.gguf", "--to", "gguf", "--json")
    assert done.status == 0, done.err
    again = jaxllm("convert", "model.gguf", "out", "--to", "huggingface", "--json")
    assert again.status == 0 and again.json["weight_bytes"] == done.json["weight_bytes"]
    (model, _), (same, _) = jl.load(tiny_checkpoint), jl.load("out")
    name = "layers.1.attention.q"
    np.testing.assert_array_equal(*(linear_weights(m)[name].rows for m in (model, same)))
    assert_refused(
        jaxllm("convert", tiny_checkpoint, "model.gguf", "--to", "gguf"),
        "must not exist",
        left=[Path("model.gguf"), Path("out")],
    )


def test_existing_output_directory_is_refused_and_kept(jaxllm, tiny_checkpoint):
    Path("out").mkdir()
    Path("out/mine.txt").write_text("keep")
    for to in ("native", "huggingface"):
        done = jaxllm("convert", tiny_checkpoint, "out", "--to", to)
        assert_refused(done, "out", left=[Path("out")])
    assert_refused(jaxllm("demo", "--out", "out"), "out", left=[Path("out")])
    assert [path.name for path in Path("out").iterdir()] == ["mine.txt"]


def test_full_disk_is_one_line_and_leaves_nothing(jaxllm, tiny_checkpoint, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for to in ("native", "huggingface"):
        done = jaxllm("convert", tiny_checkpoint, "out", "--to", to)
        assert_refused(done, "disk must have room.*out")
