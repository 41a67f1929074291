"""Hugging Face directories read and written: numbers, types, meshes, tokenizers, broken files, memory."""

import json
import os
import subprocess
import sys
import textwrap
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_llama import TINY, tiny_weights, write_checkpoint

from checkpoints_convert import huggingface, tensor_files
from checkpoints_convert.build_model import is_copy
from checkpoints_convert.materialize import materialize, named_leaves
from checkpoints_convert.tensor_files import same
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder
from jaxllm.sharding import make_mesh


def leaf(model, name):
    return np.asarray(named_leaves(model)[name])


def rewrite(path, tensors, config=None):
    """Puts other tensors (and another config) into a directory."""
    entries = [(k, v.shape, v.dtype, lambda v=v: v) for k, v in tensors.items()]
    tensor_files.write_file(path / "model.safetensors", entries)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "tiny")


def test_a_loaded_model_holds_the_files_numbers(checkpoint):
    model, _ = huggingface.load(checkpoint)
    weights = tiny_weights()
    name = "model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_array_equal(leaf(model, "layers.1.attention.k.w"), weights[name])
    np.testing.assert_array_equal(leaf(model, "head.w"), weights["lm_head.weight"])
    assert model.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_files_of_other_float_types_keep_them_but_float64(checkpoint, dtype):
    weights = {name: value.astype(dtype) for name, value in tiny_weights().items()}
    model, _ = huggingface.load(rewrite(checkpoint, weights))
    want = np.float32 if dtype is np.float64 else dtype
    assert model.dtype == want
    got = leaf(model, "layers.0.mlp.up.w")
    np.testing.assert_array_equal(got, weights["model.layers.0.mlp.up_proj.weight"].astype(want))


def test_weights_are_cast_where_asked(checkpoint):
    model, _ = huggingface.load(checkpoint, dtype=jnp.bfloat16)
    assert {x.dtype for x in named_leaves(model).values()} == {jnp.dtype(jnp.bfloat16)}


def test_the_safetensors_package_reads_what_is_written_and_the_other_way_round(tmp_path):
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(0)
    tensors = {"a": rng.standard_normal((3, 5)).astype("f4"), "b": np.float16([1, 2, 3])}
    rewrite(tmp_path, tensors)
    for name, value in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(value, tensors[name])
    save_file(tensors, tmp_path / "theirs.safetensors")
    for name, value in tensor_files.open_file(tmp_path / "theirs.safetensors").items():
        np.testing.assert_array_equal(value, tensors[name])


def test_a_mesh_holds_the_same_numbers_each_device_its_part(checkpoint):
    plain, _ = huggingface.load(checkpoint)
    mesh = make_mesh(data=2, model=2, devices=jax.devices()[:4])
    model, _ = huggingface.load(checkpoint, mesh=mesh)
    for name, value in named_leaves(plain).items():
        np.testing.assert_array_equal(leaf(model, name), value)
    gate = named_leaves(model)["layers.0.mlp.gate.w"]
    assert gate.addressable_shards[0].data.shape == (32, 32)  # of [64, 32]


def test_names_without_their_prefix_old_buffers_and_a_copied_tied_head_are_accepted(checkpoint):
    weights = {name.removeprefix("model."): value for name, value in tiny_weights().items()}
    weights["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    weights["lm_head.weight"] = weights["embed_tokens.weight"].copy()
    config = TINY | {"tie_word_embeddings": True}
    model, _ = huggingface.load(rewrite(checkpoint, weights, config))
    assert model.head is None
    np.testing.assert_array_equal(leaf(model, "embedding.table"), weights["embed_tokens.weight"])


def test_a_head_of_its_own_is_kept_where_the_config_ties_it(checkpoint):
    """As transformers 5 does."""
    weights = tiny_weights()
    rewrite(checkpoint, weights, TINY | {"tie_word_embeddings": True})
    with pytest.warns(UserWarning, match="lm_head.weight differs from model.embed_tokens.weight: it is kept"):
        model, _ = huggingface.load(checkpoint)
    assert not model.config.tied
    np.testing.assert_array_equal(leaf(model, "head.w"), weights["lm_head.weight"])


@pytest.mark.parametrize("table", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("head", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_copy_of_the_table_in_another_type_is_no_head_of_its_own(table, head, checkpoint):
    weights = tiny_weights()
    table = weights["model.embed_tokens.weight"].astype(table)
    weights |= {"model.embed_tokens.weight": table, "lm_head.weight": table.astype(head)}
    assert is_copy(weights["lm_head.weight"], table)
    rewrite(checkpoint, weights, TINY | {"tie_word_embeddings": True})
    model, _ = huggingface.load(checkpoint)  # a warning of ours is an error
    assert model.config.tied and model.head is None
    weights["lm_head.weight"] = table.astype(head) * head(2)
    assert not is_copy(weights["lm_head.weight"], table)


def test_the_single_file_comes_before_an_index_that_was_left_behind(checkpoint):
    new = tiny_weights(1)
    (checkpoint / "model.safetensors").rename(checkpoint / "old.safetensors")
    index = {"weight_map": dict.fromkeys(new, "old.safetensors")}
    (checkpoint / tensor_files.INDEX).write_text(json.dumps(index))
    rewrite(checkpoint, new)
    with pytest.warns(UserWarning, match="model.safetensors is read.*index.json beside it are other weights"):
        model, _ = huggingface.load(checkpoint)
    np.testing.assert_array_equal(leaf(model, "head.w"), new["lm_head.weight"])
    rewrite(checkpoint, tiny_weights())  # now both are the same, and nothing is to be said
    huggingface.load(checkpoint)
    (checkpoint / "old.safetensors").unlink()  # nor where only the index was left
    rewrite(checkpoint, new)
    np.testing.assert_array_equal(leaf(huggingface.load(checkpoint)[0], "head.w"), new["lm_head.weight"])


def test_missing_and_left_over_names_are_listed(checkpoint):
    weights = tiny_weights()
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    message = (
        r"2 missing \(model.layers.1.mlp.up_proj.weight, model.norm.weight\); "
        r"1 left over \(model.layers.0.self_attn.q_proj.bias\)"
    )
    with pytest.raises(ValueError, match=message):
        huggingface.load(rewrite(checkpoint, weights))


def broken(path, how):
    """Breaks a checkpoint in one way."""
    weights, config = tiny_weights(), dict(TINY)
    file = path / "model.safetensors"
    match how:
        case "shape":
            weights["model.norm.weight"] = np.ones(31, np.float32)
            rewrite(path, weights)
        case "integers":
            from safetensors.numpy import save_file

            save_file(weights | {"model.norm.weight": np.ones(32, np.int32)}, file)
        case "cut off":
            file.write_bytes(file.read_bytes()[:-1])
        case "cut in header":
            file.write_bytes(file.read_bytes()[:100])
        case "empty":
            file.write_bytes(b"")
        case "no JSON inside":
            file.write_bytes(b"\x10" + b"\0" * 7 + b"x" * 99)
        case "no weights":
            file.unlink()
        case "pickled":
            file.rename(path / "pytorch_model.bin")
        case "no config":
            (path / "config.json").unlink()
        case "no JSON":
            (path / "config.json").write_text("{")
        case "lost shard":
            file.unlink()
            (path / tensor_files.INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}')
        case "tokenizer":
            (path / "tokenizer.json").write_text("{")
        case _:
            config |= how
            (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", r"model.norm.weight must have shape \(32,\), got \(31,\)"),
        ("integers", "numbers must be of F64, F32, F16, BF16, got model.norm.weight of I32"),
        ("cut off", r"model.safetensors must have \d+ bytes, got \d+: cut off"),
        ("cut in header", "model.safetensors is cut off in its header"),
        ("empty", "model.safetensors is cut off in its header, got 0 bytes"),
        ("no JSON inside", "the header of model.safetensors must be JSON"),
        ("no weights", "no model.safetensors"),
        ("pickled", "a pickle can run code when opened.*unsafe_format='pickle'.*got pytorch_model.bin"),
        ("no config", "no config.json"),
        ("no JSON", "config.json must be JSON"),
        ("lost shard", "the index names a file that is not there, got '../x.safetensors'"),
        ("tokenizer", "the tokenizer files must load"),
        ({"model_type": "mamba"}, r"must be one of llama, mistral, .*, got 'mamba'"),
        ({"quantization_config": {"quant_method": "hqq"}}, "or of gptq .*, awq .*names 'hqq'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "got rope_type='dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope parameters must have factor"),
        ({"hidden_act": "softplus"}, "activation must be one of silu.*got 'softplus'"),
        ({"hidden_size": 64}, "must have shape"),
    ],
    ids=str,
)
def test_a_broken_checkpoint_is_one_line(checkpoint, how, message):
    broken(checkpoint, how)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        huggingface.load(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_config_without_a_size_says_which(checkpoint):
    config = {key: value for key, value in TINY.items() if key != "hidden_size"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json of llama must have hidden_size"):
        huggingface.load(checkpoint)


def test_a_hub_id_that_is_not_at_hand_is_one_line(monkeypatch):
    with pytest.raises(FileNotFoundError, match="the hub did not give it, got 'no-one/no-model'") as caught:
        huggingface.load("no-one/no-model", local_files_only=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such directory or hub id"):
        huggingface.load("/no/such/directory")


def test_end_tokens_of_generation_config_come_before_those_of_config(checkpoint):
    assert huggingface.load(checkpoint)[0].config.stop_tokens == (263,)
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [263, 7]}')
    assert huggingface.load(checkpoint)[0].config.stop_tokens == (263, 7)


def test_the_tokenizers_own_policy_decides_about_the_begin_token(checkpoint):
    from tokenizers import Tokenizer, processors

    _, tokenizer = huggingface.load(checkpoint)
    assert tokenizer.encode("in") == [259]
    inner = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 262)])
    inner.save(str(checkpoint / "tokenizer.json"))
    _, tokenizer = huggingface.load(checkpoint)
    assert tokenizer.encode("in") == [262, 259]


def test_saving_keeps_tokenizer_chat_template_end_tokens_and_all_bytes(checkpoint, tmp_path):
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [263, 7]}')
    model, tokenizer = huggingface.load(checkpoint)
    huggingface.save(model, tokenizer, tmp_path / "out", max_shard_bytes=20_000)
    again, other = huggingface.load(tmp_path / "out")
    assert again.config == model.config
    assert other.encode("the end") == tokenizer.encode("the end")
    messages = [{"role": "user", "content": "hi"}]
    assert other.apply_chat_template(messages, tokenize=False) == "<s>user: hi\n"
    before = tensor_files.open_directory(checkpoint)
    after = tensor_files.open_directory(tmp_path / "out")
    assert before.keys() == after.keys() and all(same(before[k], after[k]) for k in before)
    index = json.loads((tmp_path / "out" / tensor_files.INDEX).read_text())
    assert set(index["weight_map"]) == set(before)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in before.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny"]


def test_an_output_that_exists_is_refused(checkpoint):
    model, tokenizer = huggingface.load(checkpoint)
    with pytest.raises(FileExistsError, match="the output must not exist yet"):
        huggingface.save(model, tokenizer, checkpoint)


def test_filling_holds_one_tensor_beside_the_model():
    """The counting fake: sources that know how many of them are alive."""
    alive, most, calls = [0], [0], []

    def read(name, shape):
        value = np.zeros(shape, np.float32)
        alive[0] += value.nbytes
        most[0] = max(most[0], alive[0])
        weakref.finalize(value, lambda n=value.nbytes: alive.__setitem__(0, alive[0] - n))
        calls.append(name)
        return value

    model = materialize(Decoder(decoder.TINY, rngs=None), read)
    sizes = [value.nbytes for value in named_leaves(model).values()]
    assert most[0] == max(sizes) and alive[0] == 0
    assert len(calls) == len(set(calls)) == len(sizes)


MEASURE = """
import pathlib, sys, threading, time
import jax
from checkpoints_convert import huggingface

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

path, small = sys.argv[1:]
huggingface.load(small)  # imports, the backend, the allocator's first pages
before, most, run = anonymous(), [0], [True]
def watch():
    while run[0]:
        most[0] = max(most[0], anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model, _ = huggingface.load(path)
jax.block_until_ready(model)
run[0] = False
thread.join()
print(most[0] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_anonymous_memory_stays_under_the_model_and_its_largest_tensor(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
             "num_key_value_heads": 16, "head_dim": 64, "vocab_size": 16_000,
             "num_hidden_layers": 5}  # fmt: skip
    small = write_checkpoint(tmp_path / "small")
    big = tmp_path / "big"
    big.mkdir()
    (big / "config.json").write_text(json.dumps(TINY | sizes))
    family, raw = huggingface.read_config(big)
    config = huggingface.translate(family, raw, big)
    abstract = named_leaves(Decoder(config, rngs=None))
    rng = np.random.default_rng(0)
    entries = [
        (tensor.theirs, abstract[tensor.ours[0]].shape, np.dtype("<f4"),
         lambda shape=abstract[tensor.ours[0]].shape: rng.random(shape, np.float32))
        for tensor in huggingface.tensors_of(family, abstract)
    ]  # fmt: skip
    tensor_files.write_file(big / "model.safetensors", entries)
    total = sum(tensor_files.num_bytes(entry[1], entry[2]) for entry in entries)
    largest = max(tensor_files.num_bytes(entry[1], entry[2]) for entry in entries)
    assert total >= 400e6
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(big), str(small)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert total * 0.95 < int(done.stdout) < total + largest, (total, largest)
