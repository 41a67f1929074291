"""Every key of every config.json, and every JSON file read here: what is not of its kind is one line."""

import json

import pytest
from tiny_llama import write_checkpoint

import jaxllm as jl
from checkpoints_convert import huggingface, tensor_files
from checkpoints_convert.families.rope import FIELDS as ROPE_FIELDS

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
}
KINDS = {family.model_type: family for family in huggingface.FAMILIES}
# values that no key may have, and values that some may
NEVER = (1e300, -1.5, ["x", 1], {"a": {"b": []}}, "")
SOME = (None, True, 0, 1, 0.5, 10**18, [0.5, 2.0])


def base(kind):
    """A config.json that is read."""
    sizes = {} if kind in ("gpt2", "opt", "t5") else SIZES
    return {"model_type": kind, "text_config": sizes} if kind == "gemma3" else {"model_type": kind} | sizes


def changed(kind, key, value):
    """The same with one key set where the family reads it."""
    config = base(kind)
    inner = config["text_config"] if kind == "gemma3" and key in SIZES else config
    return config | ({"text_config": inner | {key: value}} if inner is not config else {key: value})


def outcome(path, config):
    """Our config, or the line that refuses it."""
    (path / "config.json").write_text(json.dumps(config))
    try:
        family, raw = huggingface.read_config(path)
        huggingface.check_layers(family, raw, 100)
        return huggingface.translate(family, raw, path)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        return str(error)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "phi3", "gpt2", "opt", "t5"])  # others share a table
def test_each_key_of_a_config_is_read_or_refused_in_one_line(kind, tmp_path):
    assert not isinstance(outcome(tmp_path, base(kind)), str)
    for key, field in KINDS[kind].fields.items():
        got = [outcome(tmp_path, changed(kind, key, value)) for value in (*NEVER, *SOME)]
        if "list of them" in field.must or field.must.startswith(("text", "a JSON object")):
            continue  # their own tests say what is in them
        if kind != "gemma3" or key in SIZES or key in ("tie_word_embeddings", "eos_token_id"):
            assert all(isinstance(one, str) and key in one for one in got[: len(NEVER)]), (key, got)


@pytest.mark.parametrize(
    "rope",
    [
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("default", "linear", "llama3")),
        *("yarn", "longrope", "dynamic", "x"),
    ],
)
def test_each_key_of_rope_parameters_is_read_or_refused_in_one_line(rope, tmp_path):
    good = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0}
    good |= {"high_freq_factor": 4.0, "short_factor": [1.0, 2.0], "long_factor": [1.0, 2.0]}
    good["original_max_position_embeddings"] = 16
    first = outcome(tmp_path, base("llama") | {"rope_scaling": good})
    assert isinstance(first, str) == (rope in ("dynamic", "x"))
    if rope in ("dynamic", "x"):
        return
    for key in ROPE_FIELDS:
        got = [outcome(tmp_path, base("llama") | {"rope_scaling": good | {key: v}}) for v in (*NEVER, *SOME)]
        if key not in ("rope_type", "type"):
            assert all(isinstance(one, str) and key in one for one in got[: len(NEVER)]), (key, got)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", [1, "x", [{}], True])
def test_rope_parameters_are_an_object(spelling, value, tmp_path):
    assert "must be a JSON object" in outcome(tmp_path, base("llama") | {spelling: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3, "head_dim": None}, "num_attention_heads must divide hidden_size"),
        ({"num_key_value_heads": 3}, "kv_heads must divide heads"),
        ({"head_dim": 3}, "an even part of a head must be turned, got 3"),
        ({"partial_rotary_factor": 0.1, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "got 0"),
        ({"num_hidden_layers": 10**18}, "num_hidden_layers of config.json of llama must be a whole number"),
        ({"num_hidden_layers": 101}, "at most the number of tensors in the files, got 101, 100 tensors"),
        ({"num_hidden_layers": True}, "got True"),
        ({"hidden_size": 16.0}, "hidden_size .* got 16.0"),
        ({"hidden_size": None}, "hidden_size .* got None"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0],
          "original_max_position_embeddings": 16}}, "one factor a plane, got 1 for rotary=4"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
          "high_freq_factor": 4.0}}, "low_freq_factor must be below high_freq_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1}},
         "a trained length above 1, got 1"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "however long it grows.*'dynamic'"),
        ({"rope_scaling": {"full_attention": 3}}, "full_attention of rope parameters must be a JSON object"),
    ],
    ids=str,
)  # fmt: skip
def test_keys_that_contradict_each_other_are_one_line(changes, message, tmp_path):
    import re

    got = outcome(tmp_path, base("llama") | changes)
    assert isinstance(got, str) and re.search(message, got), got


def test_layer_types_are_one_for_each_layer_and_known(tmp_path):
    many = base("qwen2") | {"use_sliding_window": True, "layer_types": ["full_attention"] * 3}
    assert "one for each layer, got 3 for 2" in outcome(tmp_path, many)
    assert "layer_types" in outcome(tmp_path, many | {"layer_types": ["full_attention", "x"]})


def test_a_t5_starts_with_a_token_that_it_has(tmp_path):
    got = outcome(tmp_path, base("t5") | {"vocab_size": 8, "decoder_start_token_id": 8})
    assert "decoder_start_token_id must be below vocab_size, got 8" in got
    assert "num_decoder_layers must be at most" in outcome(tmp_path, base("t5") | {"num_decoder_layers": 999})


HOSTILE = {
    "no JSON": (b"{", "must be JSON"),
    "no UTF-8": (b'{"a": "\xff"}', "must be JSON"),
    "NaN": (b'{"a": NaN}', "NaN is no number"),
    "a list": (b"[1]", r"must be a JSON object, got \[1\]"),
    "deep": (b'{"a": ' + b"[" * 1000 + b"]" * 1000 + b"}", "nested more than 64 deep"),
    "deeper": (b"[" * 200_000, "nested more than|must be JSON"),
    "a long number": (b'{"a": ' + b"9" * 5000 + b"}", "must be JSON"),
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", tensor_files.INDEX])
@pytest.mark.parametrize("how", HOSTILE)
def test_a_json_file_that_is_none_is_one_line(name, how, tmp_path):
    path = write_checkpoint(tmp_path / "tiny")
    if name == tensor_files.INDEX:
        (path / "model.safetensors").unlink()
    text, message = HOSTILE[how]
    (path / name).write_bytes(text)
    with pytest.raises(ValueError, match=message) as caught:
        jl.load(path)
    assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("end", ["x", -1, 1.5, [True], {}, [[1]]])
def test_end_tokens_are_token_ids(end, tmp_path):
    path = write_checkpoint(tmp_path / "tiny")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    with pytest.raises(ValueError, match="eos_token_id of generation_config.json must be a token id"):
        jl.load(path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "must have weight_map"),
        ({"weight_map": []}, "weight_map of model.safetensors.index.json must be a JSON object"),
        ({"weight_map": {"a": 3}}, "a of weight_map of .* must be text, got 3"),
        ({"weight_map": {"a": "../x.safetensors"}}, "not there, got '../x.safetensors'"),
        ({"weight_map": {"a": "/etc/passwd"}}, "not there, got '/etc/passwd'"),
        ({"weight_map": {"a": "x\0"}}, "not there"),
        ({"weight_map": {"a": "x" * 3000}}, "not there"),  # longer than a file's name may be
        ({"weight_map": {"a": "link.safetensors"}}, "not there, got 'link.safetensors'"),
        ({"weight_map": {"a": "part.safetensors"}}, "names tensors that no file has, got a"),
    ],
)
def test_an_index_names_files_of_its_directory_and_tensors_of_its_files(index, message, tmp_path):
    path = write_checkpoint(tmp_path / "tiny")
    (path / "model.safetensors").rename(path / "part.safetensors")
    (tmp_path / "outside.safetensors").write_bytes((path / "part.safetensors").read_bytes())
    (path / "link.safetensors").symlink_to("../outside.safetensors")
    (path / tensor_files.INDEX).write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        jl.load(path)
    assert "\n" not in str(caught.value)


def test_links_into_the_hubs_cache_are_its_files(tmp_path):
    """There, a snapshot is a folder of links to blobs."""
    path = write_checkpoint(tmp_path / "models--a--b" / "snapshots" / "c")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (path / "model.safetensors").rename(blobs / "1f")
    (path / "part.safetensors").symlink_to("../../blobs/1f")
    names = tensor_files.open_file(blobs / "1f")
    index = {"weight_map": dict.fromkeys(names, "part.safetensors")}
    (path / tensor_files.INDEX).write_text(json.dumps(index))
    assert tensor_files.open_directory(path).keys() == names.keys()
