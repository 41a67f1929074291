"""`jaxllm convert`: what it keeps, and what it refuses; outputs whole or not at all."""

import errno
import os
from pathlib import Path

import pytest
from command_line import assert_refused, broken_checkpoint


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
