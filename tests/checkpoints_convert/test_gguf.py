"""GGUF files: codes kept bit for bit, every family there and back, and what is refused."""

import dataclasses
import errno
import os
import re
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from their_models import FAMILIES

from checkpoints_convert.families import gpt, llama_line
from checkpoints_convert.gguf import blocks, checkpoint, container
from checkpoints_convert.gguf.architectures import ARCHITECTURES, config_of, metadata_of
from checkpoints_convert.materialize import materialize, named_weights
from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.weights import affine
from jaxllm.weights.affine import Affine
from jaxllm.weights.block_affine import BlockAffine
from jaxllm.weights.codebook import Codebook

gguf = pytest.importorskip("gguf", reason="gguf is in the test extra")
from gguf_files import random_blocks, write_gguf  # noqa: E402

ALL = {one.model_type: one for one in (*llama_line.FAMILIES, *gpt.FAMILIES)}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
# What the files can say: as in `their_models`, but for what llama.cpp has no key for.
SAID = {
    "llama": {"rope_parameters": LLAMA3},
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3": {"query_pre_attn_scalar": 8},
}


def random_model(name: str, **settings):
    """A model of a family with random numbers; its config is read as config.json is."""
    kind, given = FAMILIES[name]
    family, rng = ALL[kind], np.random.default_rng(0)
    raw = family.defaults | given | SAID.get(name, {}) | settings
    model = family.model(family.config(raw), rngs=None)
    return materialize(model, lambda _, shape: rng.normal(0.5, 0.2, shape).astype(np.float32))


def written(model, path, tokenizer=None, **given):
    """A model saved and loaded again."""
    checkpoint.save(model, tokenizer, path, **given)
    return checkpoint.load(path)


@pytest.mark.parametrize("name", blocks.TYPES)
def test_a_block_type_is_read_to_the_numbers_of_the_package_and_written_to_its_bytes(name):
    kind, K, N = blocks.TYPES[name], 512, 3
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (kind.size, kind.num_bytes)
    data = random_blocks(np.random.default_rng(0), name, N, K)
    w = blocks.read(kind, data, np.float32)
    numbers = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(jax.tree.map(jnp.asarray, w).dequantize_rows(jnp.float32), numbers)
    if isinstance(w, BlockAffine):
        assert blocks.block_type_of(w) == kind
        np.testing.assert_array_equal(blocks.write(kind, blocks.parts_of(w, kind)), data)
    else:
        fields = {"codes": blocks.unpacked(w.codes), "scale": w.scale.T}
        np.testing.assert_array_equal(blocks.write(kind, fields), data)


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_a_quantized_file_is_read_without_floats_and_written_again_byte_for_byte(name, tmp_path):
    sizes = {} if name == "Q4_K" else {"width": 64, "ffn": 64}
    numbers = write_gguf(tmp_path / "a.gguf", kind=name, **sizes)
    model, tokenizer = checkpoint.load(tmp_path / "a.gguf")
    weights = linear_weights(model)
    assert {type(w) for w in weights.values()} == {BlockAffine if name == "Q4_K" else Affine}
    up = weights["layers.0.mlp.up"].dequantize_rows(jnp.float32)
    np.testing.assert_array_equal(up, numbers["blk.0.ffn_up.weight"])
    # llama.cpp turns neighbours: row 2 i of a head is our row i, 2 i + 1 our i + half
    q = np.asarray(weights["layers.0.attention.q"].dequantize_rows(jnp.float32))
    half, theirs = model.config.head_dim // 2, numbers["blk.0.attn_q.weight"]
    np.testing.assert_array_equal(q[1], theirs[2])
    np.testing.assert_array_equal(q[half], theirs[1])
    assert model.config.stop_tokens == (263,) and tokenizer.encode("the and") == [257, 220, 261]
    checkpoint.save(model, tokenizer, tmp_path / "b.gguf")
    first, second = (container.open_file(tmp_path / f"{x}.gguf").tensors for x in "ab")
    assert first.keys() == second.keys()
    for tensor, one in first.items():
        other = second[tensor]
        assert type(one) is type(other)
        if isinstance(one, container.Blocks):
            assert one.kind == other.kind and one.data.tobytes() == other.data.tobytes()
        else:
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"])
def test_every_family_comes_back(name, tmp_path):
    model = random_model(name)
    again, tokenizer = written(model, tmp_path / "m.gguf", model_type=FAMILIES[name][0])
    assert tokenizer is None
    weights, read = named_weights(model), named_weights(again)
    assert weights.keys() == read.keys()
    for leaf, value in weights.items():
        np.testing.assert_allclose(value, read[leaf], rtol=0, atol=1e-6 if "gemma" in name else 0)
    for rope in ("rope", "local_rope"):
        ours, theirs = getattr(model.config, rope, None), getattr(again.config, rope, None)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            wanted, got = (one.frequencies(model.config.head_dim) for one in (ours, theirs))
            np.testing.assert_allclose(got, np.broadcast_to(wanted, got.shape), rtol=1e-6)
            assert ours.attention_factor == pytest.approx(theirs.attention_factor)
            again.config = dataclasses.replace(again.config, **{rope: ours})
    assert again.config == model.config


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
SAME = [1.0, 2.0, 3.5, 4.0]


@pytest.mark.parametrize(
    "rope",
    [
        YARN,
        YARN | {"attention_factor": 1.5, "beta_fast": 16.0},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        LLAMA3,
        {"rope_type": "longrope", "long_factor": SAME, "short_factor": SAME, "attention_factor": 1.0},
        {"rope_type": "longrope", "long_factor": SAME, "short_factor": [1.0] * 4, "attention_factor": 1.25},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_a_rotation_turns_alike_behind_the_keys_of_llama_cpp(rope):
    arch = next(one for one in ARCHITECTURES if one.name == "qwen2")
    family = arch.family
    config = family.config(family.defaults | FAMILIES["qwen2"][1] | {"rope_parameters": rope, "head_dim": 8})
    metadata, factors = metadata_of(arch, config, family.to_hf_config(config))
    raw = config_of(arch, metadata, {"token_embd.weight": (67, 16)}, factors)
    read = family.config(family.defaults | raw)
    np.testing.assert_allclose(
        np.broadcast_to(config.rope.frequencies(8), (2, 4)), np.broadcast_to(read.rope.frequencies(8), (2, 4))
    )
    assert read.rope.attention_factor == pytest.approx(config.rope.attention_factor)
    assert read.context == config.context


def test_what_a_file_leaves_out_means_what_it_means_to_llama_cpp():
    sizes = {"context_length": 64, "embedding_length": 16, "block_count": 2, "feed_forward_length": 24}
    sizes |= {"attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-6}
    read = {}
    for arch in ARCHITECTURES[:-1]:
        metadata = {f"{arch.name}.{name}": value for name, value in sizes.items()}
        raw = config_of(arch, metadata, {"token_embd.weight": (67, 16)}, {})
        read[arch.name] = arch.family.config(arch.family.defaults | raw)
    assert all((c.kv_heads, c.head_dim, c.tied, c.vocab) == (4, 4, True, 67) for c in read.values())
    assert read["gemma2"].windows == (4096, None) and read["gemma3"].windows == read["phi3"].windows == ()
    assert read["gemma2"].attention_softcap == 50.0 and read["gemma2"].logit_softcap == 30.0
    assert read["gemma3"].local_rope is None and {c.rope.theta for c in read.values()} == {1e4}


def test_files_say_what_llama_cpp_reads(tmp_path):
    """Gemma's norms are one more, a head's halves are neighbours, vectors are float32."""
    gemma = random_model("gemma2")
    checkpoint.save(gemma, None, tmp_path / "gemma.gguf")
    tensors = {one.name: one.data for one in gguf.GGUFReader(tmp_path / "gemma.gguf").tensors}
    np.testing.assert_array_equal(tensors["output_norm.weight"], np.asarray(gemma.norm.scale.get_value()) + 1)
    llama = random_model("llama")
    half = nnx.merge(nnx.graphdef(llama), jax.tree.map(lambda x: np.asarray(x, np.float16), nnx.state(llama)))
    checkpoint.save(half, None, tmp_path / "llama.gguf")
    reader = gguf.GGUFReader(tmp_path / "llama.gguf")
    tensors = {one.name: one for one in reader.tensors}
    assert tensors["blk.1.attn_norm.weight"].tensor_type.name == "F32"
    assert tensors["blk.1.attn_k.weight"].tensor_type.name == "F16"
    k = np.asarray(half.layers[1].attention.k.w.get_value().rows)
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    np.testing.assert_array_equal(tensors["blk.1.attn_k.weight"].data[:8], k[order])
    assert "rope_freqs.weight" in tensors  # llama 3's rotation
    assert reader.fields["llama.block_count"].contents() == 2


def grid(bits, group_size, zero_point=None, *, K=64, N=8, whole=True, dtype=np.float16):
    """A weight of such a grid, codes and zero points drawn."""
    rng, G = np.random.default_rng(0), -(-K // group_size)
    codes = jnp.asarray(rng.integers(0, 2**bits, (N, K), dtype=np.uint8))
    zeros = None if zero_point is None else jnp.full((N, G), zero_point, jnp.float32)
    scale = jnp.asarray(rng.uniform(0.001, 0.02, (N, G)).astype(np.float32))
    w = affine.from_codes(codes, scale, zeros, bits=bits, group_size=group_size, integer_zero_point=whole)
    return dataclasses.replace(w, scale=scale.T) if dtype == np.float32 else w


@pytest.fixture(scope="module")
def plain():
    """A float model whose matrices have 64 inputs."""
    return random_model(
        "phi3", hidden_size=64, intermediate_size=64, rope_parameters={"rope_type": "default"}
    )


def with_weight(model, name, w):
    return replace_weights(model, {name: w})


@pytest.mark.parametrize(
    ("w", "kind"),
    [
        (grid(4, 32, N=64), "Q4_0"),
        (grid(3, 64, N=64), "Q4_0"),
        (grid(4, 32, 3, N=64), "Q5_0"),
        (grid(6, 32, N=64), "Q8_0"),
        (grid(8, 64, N=64), "Q8_0"),
        (grid(2, 32, 1.0, N=64, whole=False), "Q4_0"),
    ],
)
def test_a_whole_grid_is_written_in_the_smallest_type_that_holds_it_bit_for_bit(w, kind, plain, tmp_path):
    model = with_weight(plain, "layers.0.attention.o", w)
    again, _ = written(model, tmp_path / "m.gguf", model_type="phi3")
    tensor = container.open_file(tmp_path / "m.gguf").tensors["blk.0.attn_output.weight"]
    assert tensor.kind.name == kind
    read = linear_weights(again)["layers.0.attention.o"]
    np.testing.assert_array_equal(read.dequantize_rows(jnp.float32), w.dequantize_rows(jnp.float32))


def test_weights_that_share_a_tensor_are_cut_and_stacked_again(plain, tmp_path):
    parts = {"layers.1.mlp.gate": grid(4, 32, N=64), "layers.1.mlp.up": grid(5, 32, 16, N=64)}
    again, _ = written(replace_weights(plain, parts), tmp_path / "m.gguf", model_type="phi3")
    for name, w in parts.items():
        read = linear_weights(again)[name]
        assert read.codes.bits == 5  # the smallest type that holds both
        np.testing.assert_array_equal(read.dequantize_rows(jnp.float32), w.dequantize_rows(jnp.float32))


@pytest.mark.parametrize(
    ("w", "said"),
    [
        (grid(4, 16, N=64), "group_size must be a multiple of 32"),
        (grid(4, 32, 7.5, N=64, whole=False), "zero points must be whole"),
        (grid(4, 32, N=64, dtype=np.float32), "scales must be float16"),
        (grid(8, 32, 3, N=64), "must be -128 to 127"),
        (Codebook(grid(2, 32, N=64).codes, jnp.zeros((64, 4)), (64, 64), jnp.dtype("float32")),
         "no block type holds Codebook"),
    ],
)  # fmt: skip
def test_a_weight_that_no_type_holds_is_refused_with_one_that_fits(w, said, plain, tmp_path):
    with pytest.raises(ValueError, match=said) as caught:
        checkpoint.save(with_weight(plain, "layers.0.attention.o", w), None, tmp_path / "m.gguf")
    assert "symmetric=True) fits Q4_0" in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("mistral", {"sliding_window": 8}, "llama of llama.cpp has no place for windows"),
        ("gemma2", {"query_pre_attn_scalar": 6}, "no place for attention_scale"),
        ("gemma2", {"attn_logit_softcapping": None}, "no place for attention_softcap=None"),
        ("opt", {}, "must be one of llama, qwen2"),
    ],
)
def test_a_model_that_the_keys_cannot_say_is_refused(name, settings, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        checkpoint.save(
            random_model(name, **settings), None, tmp_path / "m.gguf", model_type=FAMILIES[name][0]
        )


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_appears_whole_or_not_at_all_and_the_package_is_asked_for(plain, tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"x")
    with pytest.raises(FileExistsError, match=r"gguf\.save: the output must not exist yet"):
        checkpoint.save(plain, None, tmp_path / "m.gguf")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"gguf\.save: the disk must have room for the output"):
            checkpoint.save(plain, None, tmp_path / "deep" / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    with pytest.raises(FileNotFoundError, match=r"gguf\.load: no such file"):
        checkpoint.load(tmp_path / "other.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxllm\[gguf\]'"):
        checkpoint.load(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a small file, and where the fields of its header lie."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, kind="Q8_0", width=32, ffn=32, heads=2, kv_heads=1)
    return path.read_bytes()


def put(at, letter, value):
    """A change: one number of the file is another."""

    def change(data: bytes) -> bytes:
        raw = bytearray(data)
        struct.pack_into(f"<{letter}", raw, at(data) if callable(at) else at, value)
        return bytes(raw)

    return change


def behind(text: bytes, more: int = 0):
    """The place behind the first `text` of a file."""
    return lambda data: data.index(text) + len(text) + more


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put(0, "I", 1), "must begin with b'GGUF'"),
        (put(4, "I", 9), "must be of version 2 or 3"),
        (put(8, "Q", 1 << 60), "cannot have so many tensors"),
        (put(16, "Q", 1 << 60), "cannot have so many keys"),
        (put(24, "Q", 1 << 63), "cannot have so many letters"),
        (
            put(behind(b"llama.block_count"), "I", 99),
            "must be a number, text, or an array of these, got type",
        ),
        (put(behind(b"llama.block_count", 4), "I", 1 << 31), "must be a whole number"),
        (put(behind(b"llama.block_count", 4), "I", 1 << 30), "at most the number of tensors"),
        (
            put(behind(b"llama.attention.head_count_kv", 4), "I", 3),
            "must make a config: decoder: kv_heads must",
        ),
        (put(behind(b"tokenizer.ggml.tokens", 8), "Q", 1 << 40), "cannot have so many items"),
        (put(behind(b"tokenizer.ggml.eos_token_id", 4), "I", 1 << 31), "eos_token_id must be a whole number"),
        (put(behind(b"blk.0.attn_q.weight"), "I", 400), "must have 1 to 4 dimensions"),
        (put(behind(b"blk.0.attn_q.weight", 4), "Q", 0), "must have sizes above 0"),
        (put(behind(b"blk.0.attn_q.weight", 4), "Q", 33), "must be multiples of 32"),
        (put(behind(b"blk.0.attn_q.weight", 12), "Q", 1 << 50), "cut off"),
        (put(behind(b"blk.0.attn_q.weight", 20), "I", 77), "got type 77"),
        (put(behind(b"blk.0.attn_q.weight", 24), "Q", 0), "must follow one another"),
        (lambda data: data[:-40], "cut off"),
        (lambda data: data[: data.index(b"ggml.merges")], "cannot have so many letters"),
        (lambda data: data + bytes(64), "must end with its last tensor"),
        (lambda data: b"", "is cut off in its header"),
        (lambda data: data.replace(b"attn_k.weight", b"attn_q.weight"), "must stand once"),
        (lambda data: data.replace(b"attn_k.weight", b"attn_x.weight"), "1 missing (blk.0.attn_k.weight)"),
        (lambda data: data.replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.\xff\xff\xff"), "must be UTF-8"),
        (
            lambda data: data.replace(b"general.architecture", b"general.architecturx"),
            "architecture must be one",
        ),
    ],
)
def test_a_header_that_says_what_the_file_is_not_is_one_line(change, said, small, tmp_path):
    (tmp_path / "m.gguf").write_bytes(change(small))
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        checkpoint.load(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q4_K", "Q6_K"])
def test_logits_are_those_of_transformers_on_the_same_file(kind, tmp_path, torch):
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with it: in the test extra")
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "m.gguf", kind=kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = np.arange(24)[None] % 260
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).logits.numpy()
    model, _ = checkpoint.load(tmp_path / "m.gguf", dtype=jnp.float32)
    np.testing.assert_allclose(model(jnp.asarray(ids))[0], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
