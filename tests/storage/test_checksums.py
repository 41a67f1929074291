"""Checksums of what is stored: what is cut, lost or turned is named; earlier files open."""

import json
import shutil

import jax
import numpy as np
import pytest
from fuzz.formats import FORMATS

from jaxllm import native
from jaxllm.cache import files as cache_files
from jaxllm.storage import checksums
from jaxllm.storage.arrays import read_npz
from jaxllm.storage.metadata import parse_json


@pytest.fixture
def covered(tmp_path):
    """A directory of two covered files, one in a folder, and one that is not."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a").write_bytes(bytes(100))
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    checksums.write(tmp_path, ["manifest.json", "weights"])
    return tmp_path


def verify(path):
    checksums.verify("test", path, ["manifest.json", "weights"], required=True)


def turn(file, at=50):
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def test_files_as_they_were_and_others_than_those_covered_say_nothing(covered):
    verify(covered)
    (covered / "tokenizer.json").write_text("another")
    verify(covered)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: turn(p / "weights" / "a"), "weights/a' must have the checksum .*: it is damaged"),
        (lambda p: (p / "weights" / "a").write_bytes(bytes(99)), "weights/a' must have 100 bytes, got 99"),
        (lambda p: (p / "weights" / "a").unlink(), "weights/a' is missing"),
        (lambda p: (p / "weights" / "b").write_text("x"), "weights/b' has no checksum"),
        (lambda p: (p / checksums.CHECKSUMS).unlink(), "checksums.xxh3 must be in the directory"),
        (lambda p: (p / checksums.CHECKSUMS).write_text(""), "must have lines of hash, bytes, path, got ''"),
        (lambda p: turn(p / checksums.CHECKSUMS, 3), "must have"),
    ],
)
def test_the_first_file_that_differs_is_named(covered, damage, message):
    damage(covered)
    with pytest.raises(ValueError, match=f"test: .*{message}") as caught:
        verify(covered)
    assert "\n" not in str(caught.value)


def test_each_bit_of_the_list_itself_counts(covered):
    file = covered / checksums.CHECKSUMS
    right = file.read_bytes()
    for at in range(len(right) - 1):  # the last line's end says nothing
        turn(file, at)
        with pytest.raises(ValueError, match="test: "):
            verify(covered)
        file.write_bytes(right)


def test_a_list_that_grows_covers_each_file_from_when_it_has_its_name(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.part").write_text(name)
        checksums.add(tmp_path, tmp_path / f"{name}.part", name)
        (tmp_path / f"{name}.part").rename(tmp_path / name)
    assert checksums.names("test", tmp_path) == {"a", "b"}
    checksums.verify_file("test", tmp_path, "a")
    (tmp_path / "b").write_text("c")
    with pytest.raises(ValueError, match="b' must have the checksum"):
        checksums.verify_file("test", tmp_path, "b")
    with pytest.raises(ValueError, match="must have a line for 'c'"):
        checksums.verify_file("test", tmp_path, "c")


STORED = (
    pytest.param("cache", marks=pytest.mark.slow),
    "gates",
    "heads",
    "calibration",
    "blocks",
    "training",
)


@pytest.mark.parametrize("name", STORED)
def test_a_bit_turned_in_any_file_that_is_stored_is_refused(name, tmp_path):
    sample = FORMATS[name](tmp_path)
    for file in sample.files:
        sample.restore()
        turn(file, len(sample.files[file]) // 2)
        with pytest.raises(ValueError, match=": ") as caught:
            jax.block_until_ready(sample.open())
        assert "\n" not in str(caught.value)


def test_a_native_directory_is_refused_for_a_bit_in_its_arrays_unless_asked_not_to_look(tmp_path):
    model, _ = native.load_native(FORMATS["native_of_0_1_0"](tmp_path).folder)
    native.save_native(model, tmp_path / "new")
    file = max((tmp_path / "new" / "weights").rglob("d/*"), key=lambda path: path.stat().st_size)
    turn(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"load: .*{file.name}' must have the checksum"):
        native.load_native(tmp_path / "new")
    shutil.rmtree(tmp_path / "new")
    native.save_native(model, tmp_path / "new")
    (tmp_path / "new" / checksums.CHECKSUMS).unlink()
    with pytest.raises(ValueError, match="checksums.xxh3 must be in the directory"):
        native.load_native(tmp_path / "new")
    assert native.load_native(tmp_path / "new", verify=False)[0].config == model.config


def test_a_version_turned_back_to_one_without_checksums_is_refused(tmp_path):
    sample = FORMATS["cache"](tmp_path)
    file = sample.folder / cache_files.DESCRIPTION
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"version": cache_files.CHECKED - 1}))
    with pytest.raises(ValueError, match="cache.json' must have"):
        sample.open()
    (sample.folder / checksums.CHECKSUMS).unlink()  # as that version wrote it
    found = sample.open()
    sample.restore()
    jax.tree.map(np.testing.assert_array_equal, found, sample.open())


@pytest.mark.parametrize(
    "text", [b'{"a": 1, "a": 1}', b"[" * 100_000, b'{"a": NaN}', b"\xff", b"", b'{"a": {"b": 0, "b": 0}}']
)
def test_json_that_says_anything_twice_or_is_none_is_one_line(text):
    with pytest.raises(ValueError, match="^test must (be JSON, got |not be nested)") as caught:
        parse_json("test", text)
    assert "\n" not in str(caught.value)


def test_an_npz_file_is_read_as_numpy_reads_it(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.asarray("text"), "c": np.zeros((0, 4), np.uint8)}
    arrays["d"] = np.asfortranarray(np.arange(6).reshape(2, 3))
    np.savez(tmp_path / "x.npz", **arrays)
    found = read_npz(tmp_path / "x.npz")
    assert {name: (x.dtype, x.shape, x.tolist()) for name, x in found.items()} == {
        name: (x.dtype, x.shape, x.tolist()) for name, x in arrays.items()
    }
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros(10_000_000, np.uint8))
    with pytest.raises(ValueError, match="bomb.npz must be a whole .npz file, got a.npy compressed"):
        read_npz(tmp_path / "bomb.npz")
