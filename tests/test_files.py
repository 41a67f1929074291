"""`load` knows what it was given; the native format comes back bit for bit, whole or not at all."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_llama import write_checkpoint

import jaxllm.weights.matmul
from jaxllm.files import convert, load, save
from jaxllm.models import decoder, gpt, t5
from jaxllm.models.decoder import Decoder
from jaxllm.models.rope import Rope
from jaxllm.pytree import pytree, static
from jaxllm.sharding import make_mesh
from jaxllm.storage import checksums
from jaxllm.storage.directory import new_directory, new_file
from jaxllm.weights.dense import Dense


def make(dtype=jnp.float32, **features) -> Decoder:
    config = dataclasses.replace(decoder.TINY, **features)
    return Decoder(config, rngs=nnx.Rngs(0), dtype=dtype)


def assert_same(a, b):
    """Two models: config, structure, every bit."""
    assert a.config == b.config
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_native_directory_comes_back_bit_for_bit(dtype, tmp_path):
    rope = Rope(kind="longrope", short_factors=(1.0, 1.5, 2.0, 2.5), long_factors=(2.0,) * 4)
    model = make(
        jnp.dtype(dtype), tied=True, windows=(None, 8), rope=rope, local_rope=Rope(theta=7.0),
        stop_tokens=(1, 2), qk_norm=True,
    )  # fmt: skip
    save(model, tmp_path / "out")
    again, tokenizer = load(tmp_path / "out")
    assert tokenizer is None
    assert_same(model, again)


def test_special_numbers_keep_their_bits(tmp_path):
    model = make()
    scale = model.norm.scale
    bits = np.full(scale.get_value().shape, 0x7FC01234, np.uint32)  # a NaN that carries something
    bits[:4] = [0x80000000, 0xFF800000, 1, 0x7F7FFFFF]  # -0, -inf, the least, the largest
    scale.set_value(jnp.asarray(bits.view(np.float32)))
    save(model, tmp_path / "out")
    assert_same(model, load(tmp_path / "out")[0])


@pytest.mark.parametrize("family", [(gpt.Gpt, gpt.TINY), (t5.T5, t5.TINY)])
def test_the_other_models_come_back_too(family, tmp_path):
    kind, config = family
    model = kind(config, rngs=nnx.Rngs(0))
    save(model, tmp_path / "out")
    assert_same(model, load(tmp_path / "out")[0])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("hf") / "tiny")


def test_the_tokenizer_is_saved_beside_with_its_chat_template(checkpoint, tmp_path):
    model, tokenizer = load(checkpoint)
    save(model, tmp_path / "out", tokenizer)
    again, other = load(tmp_path / "out")
    assert_same(model, again)
    assert other.encode("the end") == tokenizer.encode("the end")
    assert other.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("to", ["native", "huggingface"])
def test_convert_goes_both_ways(checkpoint, tmp_path, to):
    model, _ = load(checkpoint)
    out, tokenizer = convert(checkpoint, tmp_path / "out", to=to)
    assert_same(model, out)
    assert tokenizer.eos_token_id == 263
    assert_same(model, load(tmp_path / "out")[0])
    assert (tmp_path / "out" / "manifest.json").exists() == (to == "native")
    back, _ = convert(tmp_path / "out", tmp_path / "back", to="huggingface")
    assert_same(model, back)
    with pytest.raises(FileExistsError, match="convert: the output must not exist yet"):
        convert(checkpoint, tmp_path / "out", to=to)


def test_convert_casts_where_asked(checkpoint, tmp_path):
    model, _ = convert(checkpoint, tmp_path / "out", dtype="bfloat16")
    assert model.dtype == jnp.bfloat16
    assert_same(model, load(tmp_path / "out")[0])


@pytest.mark.parametrize("to", ["native", "huggingface"])
def test_loading_casts_and_shards(checkpoint, tmp_path, to):
    plain, _ = convert(checkpoint, tmp_path / "out", to=to)
    mesh = make_mesh(data=2, model=2, devices=jax.devices()[:4])
    model, _ = load(tmp_path / "out", dtype="bfloat16", mesh=mesh)
    rows = model.layers[0].mlp.gate.w.get_value().rows
    assert rows.dtype == jnp.bfloat16 and rows.addressable_shards[0].data.shape == (32, 32)
    want = plain.layers[0].mlp.gate.w.get_value().rows.astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(rows), np.asarray(want))


def test_llama2c_files_are_known_by_what_they_are(shared_data):
    model, tokenizer = load(shared_data / "models/stories260K/stories260K.bin")
    assert model.config.layers == 5 and len(tokenizer) == 512
    sorter, nothing = load(shared_data / "models/gpt_nano_sort/gpt-nano-sort-model.json")
    assert sorter.config.layers == 3 and nothing is None


def test_stories260k_becomes_a_hugging_face_directory_that_says_the_same(shared_data, tmp_path):
    source = shared_data / "models/stories260K/stories260K.bin"
    model, tokenizer = convert(source, tmp_path / "out", to="huggingface")
    again, other = load(tmp_path / "out")
    assert_same(model, again)
    text = "Once upon a time, Lily’s <s> ball\n"
    assert other.encode(text) == tokenizer.encode(text)
    assert other.decode(other.encode(text), skip_special_tokens=True) == text


@pytest.mark.slow
def test_a_fresh_process_reads_the_same_bits(tmp_path):
    model = make(jnp.bfloat16)
    save(model, tmp_path / "out")
    code = (
        "import sys, hashlib, jax, numpy as np\n"
        "from jaxllm.files import load\n"
        "model, _ = load(sys.argv[1])\n"
        "h = hashlib.sha256()\n"
        "for x in jax.tree.leaves(model): h.update(np.asarray(x).tobytes())\n"
        "print(h.hexdigest())"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    import hashlib

    want = hashlib.sha256()
    for leaf in jax.tree.leaves(model):
        want.update(np.asarray(leaf).tobytes())
    assert done.stdout.strip() == want.hexdigest()


# A second format, as a later issue would add it; nothing in native.py knows it.


@pytree
class Toy:
    """Codes and scales, a table that may be missing, and a dense remainder inside."""

    codes: jax.Array  # [N, K] int8
    scale: jax.Array  # [N] bfloat16
    table: jax.Array | None
    rest: Dense
    logical: tuple[int, int] = static()
    original: type = static()
    name: str = static()

    @property
    def shape(self):
        return self.logical


def toy(w: Dense, with_table: bool) -> Toy:
    K, N = w.shape
    codes = jnp.clip(jnp.round(w.rows * 50), -127, 127).astype(jnp.int8)
    table = jnp.arange(4, dtype=jnp.uint8) if with_table else None
    scale = jnp.full((N,), 0.02, jnp.bfloat16)
    rest = Dense(w.rows[:2].astype(jnp.float16))
    return Toy(codes, scale, table, rest, (K, N), jnp.dtype(jnp.bfloat16), "toy")


def with_toys(model: Decoder) -> Decoder:
    for i, layer in enumerate(model.layers):
        for part in (layer.attention.q, layer.mlp.down):
            part.w = nnx.Param(toy(part.w.get_value(), with_table=i == 0))
    return model


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setattr(jaxllm.weights.matmul, "FORMATS", (Dense, Toy))


@pytest.mark.usefixtures("toys")
def test_a_format_that_load_has_never_heard_of_comes_back_bit_for_bit(tmp_path):
    model = with_toys(make())
    save(model, tmp_path / "out")
    again, _ = load(tmp_path / "out")
    assert_same(model, again)
    w = again.layers[0].attention.q.w.get_value()
    assert w.logical == (32, 32) and w.original == jnp.bfloat16 and w.name == "toy"
    assert again.layers[1].mlp.down.w.get_value().table is None


@pytest.mark.usefixtures("toys")
def test_only_plain_weights_are_cast(tmp_path):
    save(with_toys(make()), tmp_path / "out")
    model, _ = load(tmp_path / "out", dtype="float16")
    w = model.layers[0].attention.q.w.get_value()
    assert (w.codes.dtype, w.scale.dtype) == (jnp.int8, jnp.bfloat16)
    assert model.layers[0].attention.k.w.get_value().dtype == jnp.float16


def test_a_format_that_this_version_lacks_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(jaxllm.weights.matmul, "FORMATS", (Dense, Toy))
    save(with_toys(make()), tmp_path / "out")
    monkeypatch.setattr(jaxllm.weights.matmul, "FORMATS", (Dense,))
    with pytest.raises(ValueError, match="must be of a format of Dense, Packed, got format='Toy'"):
        load(tmp_path / "out")
    with pytest.raises(TypeError, match="must be an array or a format, got Toy"):
        save(with_toys(make()), tmp_path / "other")
    monkeypatch.setattr(jaxllm.weights.matmul, "FORMATS", (Dense, Toy))
    with pytest.raises(ValueError, match="only dense weights can be written"):
        save(with_toys(make()), tmp_path / "other", to="huggingface")
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A native directory that tests copy and break."""
    path = tmp_path_factory.mktemp("native") / "out"
    save(make(), path)
    return path


def edited(saved, tmp_path, edit):
    path = tmp_path / "edited"
    shutil.copytree(saved, path)
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    checksums.write(path, ["manifest.json", "weights"])
    return path


def set_rows(manifest, **changes):
    manifest["weights"]["head.w"]["fields"]["rows"].update(changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(version=9), "manifest.json must be of version 1 or 2, got version=9"),
        (lambda m: m.update(model="os.system"), "model must be one of Decoder, Gpt, T5, got"),
        (lambda m: m["config"].update(type="Popen"), "names an unknown type, got type='Popen'"),
        (lambda m: m["config"].update(beyond=1), "Config has no field beyond"),
        (lambda m: m["weights"].pop("head.w"), "must have the model's weights.*head.w"),
        (lambda m: m["weights"]["head.w"].update(type="Blob"), "got format='Blob'"),
        (lambda m: m["weights"]["head.w"].update(fields={}), "must have the fields of Dense"),
        (lambda m: set_rows(m, dtype="bfloat16"), r"must be bfloat16\[128, 32\].*got float32"),
        (lambda m: set_rows(m, shape=[128, 31]), r"head.w must have shape \(32, 128\)"),
        (lambda m: m["config"].update(vocab=64), "must have shape"),
    ],
)
def test_a_manifest_that_does_not_fit_is_one_line(saved, tmp_path, edit, message):
    path = edited(saved, tmp_path, edit)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_directory_without_its_weights_is_one_line(saved, tmp_path):
    path = edited(saved, tmp_path, lambda manifest: None)
    shutil.rmtree(path / "weights")
    with pytest.raises(ValueError, match="weights/.*is missing"):
        load(path)
    with pytest.raises(ValueError, match="weights' cannot be read") as caught:
        load(path, verify=False)
    assert "\n" not in str(caught.value)
    (path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        load(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.pt", b"x", "a pickle can run code when opened: give the directory"),
        ("pytorch_model.bin", b"PK\x03\x04", "a pickle can run code when opened"),
        ("old.bin", b"\x80\x02", "a pickle can run code when opened"),
        ("model.ggml", b"ggml", "must be a directory, a hub id, a .gguf file or a llama2.c .bin file"),
        ("x.bin", b"1234", "ends inside its header"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory or hub id"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="the hub did not give it, got 'nobody/nothing'"):
        load("nobody/nothing", local_files_only=True)


@pytest.mark.parametrize("dtype", ["int8", "float64", "nonsense"])
def test_a_type_that_weights_cannot_have_is_refused(checkpoint, dtype):
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16"):
        load(checkpoint, dtype=dtype)


# Whole or not at all.


def test_an_output_that_exists_is_refused_and_untouched(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="the output must not exist yet, got"):
        save(make(), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("where", ["before", "weights", "manifest", "flush"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, where):
    import orbax.checkpoint as ocp

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    match where:
        case "before":
            usage = shutil.disk_usage(tmp_path)._replace(free=1000)
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        case "weights":
            monkeypatch.setattr(ocp.StandardCheckpointer, "save", full)
        case "manifest":
            monkeypatch.setattr(type(tmp_path), "write_text", full)
        case "flush":
            monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk must have room for the output") as caught:
        save(make(), tmp_path / "deep" / "out")
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_lives_is_kept(tmp_path):
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True)  # fmt: skip
    stale, other = tmp_path / f"out.tmp{done.stdout.strip()}", tmp_path / "out.tmpfile"
    alive, mine = tmp_path / f"out.tmp{os.getppid()}", tmp_path / f"out.tmp{os.getpid()}"
    for path in (stale, other, alive, mine):
        path.mkdir()
    with new_directory(tmp_path / "out", who="test") as out:
        (out / "x").write_text("y")
        assert not (tmp_path / "out").exists()
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "out", other, alive])


@pytest.mark.parametrize("make_new", [new_directory, new_file])
def test_ctrl_c_right_behind_the_rename_leaves_nothing_either(make_new, tmp_path, monkeypatch):
    rename = os.rename

    def interrupted(*paths):
        rename(*paths)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), make_new(tmp_path / "new" / "out", who="test") as out:
        (out / "x" if make_new is new_directory else out).write_text("y")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_no_output(tmp_path):
    code = (
        "import os, signal, sys, orbax.checkpoint as ocp\n"
        "from flax import nnx\n"
        "from jaxllm.files import save\n"
        "from jaxllm.models import decoder\n"
        "ocp.StandardCheckpointer.wait_until_finished = lambda self: os.kill(os.getpid(), 9)\n"
        "save(decoder.Decoder(decoder.TINY, rngs=nnx.Rngs(0)), sys.argv[1])"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "out")]
    assert subprocess.run(run, capture_output=True, timeout=120).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("out.tmp")
    save(make(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_model_that_ships_is_loaded_when_nothing_is_named():
    from importlib.resources import files

    if not (files("jaxllm") / "pico" / "target").is_dir():
        pytest.skip("pico is not trained yet")
    model, tokenizer = load()
    assert model.config.context == 1024 and len(tokenizer) == model.config.vocab
