"""How long a text a checkpoint takes, by what its config says of its rotation, and by `context=`."""

import json

import pytest
from tiny_llama import TINY, write_checkpoint

import jaxllm as jl
from checkpoints_convert import huggingface
from jaxllm.models import gpt, t5

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
CASES = {
    "plain": ({}, 128),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 512),
    "linear, no whole number": ({"rope_scaling": {"type": "linear", "factor": 1.3}}, 166),
    "linear, tiny": ({"rope_scaling": {"type": "linear", "factor": 1e-9}}, 1),
    "linear, huge": ({"rope_scaling": {"type": "linear", "factor": 1e30}}, 2**31 - 1),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 512),
    "yarn of a shorter training": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        128,
    ),
    "yarn that says no factor": (
        {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 32}},
        128,
    ),
    "llama3": ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}}, 128),
    "longrope": ({"rope_scaling": LONG | {"original_max_position_embeddings": 32}}, 128),
}


def config_of(path, raw):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    family, full = huggingface.read_config(path)
    return huggingface.translate(family, full, path)


@pytest.mark.parametrize("name", CASES)
def test_a_text_may_be_as_long_as_its_rotation_reaches(name, tmp_path):
    """As vLLM reads a config: linear stretches what it says, yarn what it was trained for."""
    changes, length = CASES[name]
    config = config_of(tmp_path / "a", TINY | changes)
    assert config.context == length
    if name in ("linear", "yarn", "longrope", "llama3"):  # and it is written so that it is read so again
        model = huggingface.llama_line.Decoder(config, rngs=None)
        family = huggingface.family_of(model, "llama")
        again = config_of(tmp_path / "b", {"model_type": "llama"} | family.to_hf_config(config))
        assert again.context == length


def test_gemma_3_says_what_its_linear_rotation_reaches(tmp_path):
    raw = TINY | {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    config = config_of(tmp_path / "a", raw)
    assert config.context == 128 and config.rope.factor == 8.0
    family = next(one for one in huggingface.FAMILIES if one.model_type == "gemma3_text")
    assert family.to_hf_config(config)["max_position_embeddings"] == 128


def test_relative_positions_know_no_limit_and_tables_their_rows(tmp_path):
    assert config_of(tmp_path / "a", {"model_type": "t5", "n_positions": 16}).context == 2**31 - 1
    assert config_of(tmp_path / "b", {"model_type": "gpt2", "n_positions": 16}).context == 16
    assert t5.TINY.context == 2**31 - 1


def test_a_user_may_say_another_context(tmp_path):
    path = write_checkpoint(tmp_path / "tiny")
    for context in (64, 1024):
        model, _ = jl.load(path, context=context)
        assert model.config.context == context
    jl.save(model, tmp_path / "native")
    assert jl.load(tmp_path / "native")[0].config.context == 1024
    assert jl.load(tmp_path / "native", context=32)[0].config.context == 32
    jl.save(model, tmp_path / "hf", to="huggingface")
    assert jl.load(tmp_path / "hf")[0].config.context == 1024
    for wrong in (0, -1, True, 2**31):
        with pytest.raises(ValueError, match=f"load: context must be .* got context={wrong}"):
            jl.load(path, context=wrong)


def test_a_table_of_positions_has_no_more_rows_than_it_has(tmp_path):
    from flax import nnx

    jl.save(gpt.Gpt(gpt.TINY, rngs=nnx.Rngs(0)), tmp_path / "gpt")
    assert jl.load(tmp_path / "gpt", context=64)[0].config == gpt.TINY
    with pytest.raises(ValueError, match="are a table of 64 rows, got context=128"):
        jl.load(tmp_path / "gpt", context=128)


def test_a_stretched_model_says_its_context_and_is_written_whatever_it_was_given(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    path = write_checkpoint(tmp_path / "tiny", config=TINY | {"rope_scaling": scaling})
    model, _ = jl.load(path, context=100)
    jl.save(model, tmp_path / "out", to="huggingface")
    assert jl.load(tmp_path / "out")[0].config.context == 128  # what its rotation says
