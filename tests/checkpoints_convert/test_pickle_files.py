"""Pickled checkpoints: read only when asked, tensors and nothing else, and nothing of them is run."""

import collections
import json
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from tiny_llama import tiny_weights, write_checkpoint

import jaxllm as jl
from checkpoints_convert import pickle_files
from jaxllm.files import convert

GLOBALS = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(word):
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def numbers(*values):
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


def tensor(key, kind, count, shape, strides, offset=0):
    """The opcodes of one tensor, as `torch.save` writes them."""
    outside = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu")
    storage = outside + b"J" + struct.pack("<i", count) + b"tQ"
    where = b"J" + struct.pack("<i", offset) + numbers(*shape) + numbers(*strides)
    hooks = b"ccollections\nOrderedDict\n)R"
    return GLOBALS + b"(" + storage + where + b"\x89" + hooks + b"tR"


def program(entries):
    """The opcodes of an OrderedDict of (name, opcodes), with torch's `_metadata` hung on it."""
    items = b"".join(text(name) + code for name, code in entries)
    metadata = b"}" + text("_metadata") + b"ccollections\nOrderedDict\n)Rs"
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + items + b"u" + metadata + b"b."


def archive(path, code, storages, *, compression=zipfile.ZIP_STORED, order=b"little"):
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr("archive/data.pkl", code)
        out.writestr("archive/byteorder", order)
        for key, data in storages.items():
            out.writestr(f"archive/data/{key}", data)
    return path


KINDS = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "float16": "HalfStorage"}


def saved(path, tensors):
    """Tensors as torch saves them."""
    entries, storages = [], {}
    for i, (name, value) in enumerate(tensors.items()):
        strides = [stride // value.itemsize for stride in value.strides]
        entries.append((name, tensor(str(i), KINDS[value.dtype.name], value.size, value.shape, strides)))
        storages[str(i)] = value.tobytes()
    return archive(path, program(entries), storages)


@pytest.fixture
def pickled(tmp_path):
    """A directory with weights in a pickle alone."""
    path = write_checkpoint(tmp_path / "tiny")
    (path / "model.safetensors").unlink()
    saved(path / pickle_files.SINGLE, tiny_weights())
    return path


def test_a_pickle_is_read_when_asked_and_not_otherwise(pickled):
    with pytest.raises(ValueError, match="can run code.*unsafe_format='pickle'.*--unsafe-format pickle"):
        jl.load(pickled)
    model, _ = jl.load(pickled, unsafe_format="pickle")
    np.testing.assert_array_equal(model.head.w.get_value().rows, tiny_weights()["lm_head.weight"])


def test_a_converted_pickle_is_a_directory_like_all_others(pickled, tmp_path):
    convert(pickled, tmp_path / "out", "huggingface", unsafe_format="pickle")
    model, _ = jl.load(tmp_path / "out")
    np.testing.assert_array_equal(model.head.w.get_value().rows, tiny_weights()["lm_head.weight"])


def test_several_pickles_are_found_by_their_index(pickled):
    weights = tiny_weights()
    first = {name: value for name, value in weights.items() if "layers.0" in name}
    (pickled / pickle_files.SINGLE).unlink()
    saved(pickled / "a.bin", first)
    saved(pickled / "b.bin", {name: value for name, value in weights.items() if name not in first})
    places = {name: "a.bin" if name in first else "b.bin" for name in weights}
    (pickled / pickle_files.INDEX).write_text(json.dumps({"weight_map": places}))
    found = pickle_files.open_directory(pickled)
    assert found.keys() == weights.keys()
    assert all(np.array_equal(found[name], weights[name]) for name in weights)


def test_views_have_their_offsets_and_strides(tmp_path):
    data = np.arange(12, dtype=np.float32)
    entries = [
        ("whole", tensor("0", "FloatStorage", 12, (3, 4), (4, 1))),
        ("turned", tensor("0", "FloatStorage", 12, (4, 3), (1, 4))),
        ("part", tensor("0", "FloatStorage", 12, (2, 2), (4, 1), 5)),
        ("one", tensor("0", "FloatStorage", 12, (), (), 11)),
        ("none", tensor("0", "FloatStorage", 12, (0, 4), (4, 1))),
        ("half", tensor("1", "BFloat16Storage", 2, (2,), (1,))),
    ]
    half = np.array([1.5, -2], ml_dtypes.bfloat16)
    found = pickle_files.open_file(
        archive(tmp_path / "x.bin", program(entries), {"0": data.tobytes(), "1": half.tobytes()})
    )
    whole = data.reshape(3, 4)
    for name, want in {"whole": whole, "turned": whole.T, "part": whole[1:, 1:3], "one": data[11]}.items():
        np.testing.assert_array_equal(found[name], want)
    assert found["none"].shape == (0, 4)
    np.testing.assert_array_equal(found["half"], half)


class Runs:
    """What runs a command when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_names_anything_else_runs_nothing(pickled, tmp_path, protocol):
    mark = tmp_path / "mark"
    for what in (
        Runs(os.system, f"touch {mark}"),
        Runs(eval, f"open({str(mark)!r}, 'w')"),
        Runs(collections.OrderedDict, [(1, Runs(open, str(mark), "w"))]),
        Runs(getattr, "x", "upper"),
    ):
        for value in (what, {"lm_head.weight": what}):
            archive(pickled / pickle_files.SINGLE, pickle.dumps(value, protocol), {})
            with pytest.raises(ValueError, match="may name tensors and nothing else|has no opcode") as caught:
                jl.load(pickled, unsafe_format="pickle")
            assert "\n" not in str(caught.value) and not mark.exists()


def one(**changes):
    """A program of one tensor, some of its numbers changed."""
    options = {"key": "0", "kind": "FloatStorage", "count": 4, "shape": (2, 2), "strides": (2, 1)} | changes
    return program([("a", tensor(**options))])


BUILT = b"\x80\x02}" + text("a") + GLOBALS + b"}" + text("x") + b"K\x01sbs."
PATCHED = b"\x80\x02" + GLOBALS + b"N}" + text("call") + b"K\x01s\x86b."
BROKEN = {
    "past its end": (one(offset=1), r"lie in its storage of 4 numbers, got offset=1"),
    "a negative offset": (one(offset=-1), "must be a storage, an offset"),
    "a negative stride": (one(strides=(-2, 1)), "must be a storage"),
    "a long stride": (one(strides=(2**30, 1)), "lie in its storage"),
    "an expanded tensor": (one(shape=(2**30, 2**30), strides=(0, 0)), "lie in its storage"),
    "shape and strides": (one(shape=(4,)), "must be a storage"),
    "a long storage": (one(count=5), "storage '0' must have 5 numbers, got 16 bytes"),
    "a negative storage": (one(count=-1), "must have -1 numbers"),
    "a storage not there": (one(key="../0"), "must be of a type and in the archive"),
    "another type": (one(kind="UntypedStorage"), "nothing else, got 'torch.UntypedStorage'"),
    "no dictionary": (b"\x80\x02K\x01.", "must hold a dictionary of tensors, got int"),
    "no tensors": (b"\x80\x02}" + text("a") + b"K\x01s.", "tensors by name, got int at 'a'"),
    "no name": (b"\x80\x02}K\x01" + tensor("0", "FloatStorage", 4, (4,), (1,)) + b"s.", "by name"),
    "cut off": (one()[:-1], "must be what torch.save writes"),
    "nothing": (b"", "must be what torch.save writes"),
    "a large memo": (b"\x80\x02}r" + struct.pack("<I", 2**31) + b".", "places of the memo"),
    "an object": (b"\x80\x02ctorch\nFloatStorage\n)\x81.", "has no opcode NEWOBJ"),
    "a changed function": (BUILT, "must be what torch.save writes"),
    "a changed rebuilder": (PATCHED, "must be what torch.save writes"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_pickle_is_one_line(how, tmp_path):
    code, message = BROKEN[how]
    file = archive(tmp_path / "x.bin", code, {"0": bytes(16)})
    with pytest.raises(ValueError, match=message) as caught:
        pickle_files.open_file(file)
    assert "\n" not in str(caught.value)
    assert pickle_files.open_file(archive(file, one(), {"0": bytes(16)}))["a"].shape == (2, 2)


def test_an_archive_that_torch_does_not_write_is_one_line(tmp_path):
    file = tmp_path / "x.bin"
    archive(file, one(), {"0": bytes(16)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="entries of x.bin must be plain bytes"):
        pickle_files.open_file(file)
    archive(file, one(), {"0": bytes(16)}, order=b"big")
    with pytest.raises(ValueError, match="must be little-endian"):
        pickle_files.open_file(file)
    for content in (b"", b"PK\x03\x04", pickle.dumps({})):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="must be a zip archive, as torch writes since version 1.6"):
            pickle_files.open_file(file)


def test_every_cut_and_many_turned_bytes_are_one_line_or_tensors(tmp_path):
    file = saved(tmp_path / "x.bin", {"a": np.arange(6, dtype=np.float32).reshape(2, 3)})
    good = file.read_bytes()
    rng = np.random.default_rng(0)
    changed = [good[:n] for n in range(0, len(good), 7)]
    for _ in range(400):
        at = int(rng.integers(len(good)))
        changed.append(good[:at] + bytes([int(rng.integers(256))]) + good[at + 1 :])
    for content in changed:
        file.write_bytes(content)
        try:
            found = pickle_files.open_file(file)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert all(value.nbytes <= len(good) for value in found.values())


@pytest.mark.parity
def test_what_torch_saves_is_read_as_torch_reads_it(torch, tmp_path):
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(3, 4, generator=rng)
    module = torch.nn.Linear(4, 3)
    state = {"a": a, "b": a.t(), "c": a[1:, 2:], "d": a.bfloat16(), "e": a.half(), "f": torch.arange(5)}
    state |= {"g": torch.nn.Parameter(a.clone()), "h": a > 0, "i": a.to(torch.int32)}
    for value in (state, module.state_dict()):
        torch.save(value, tmp_path / "x.bin")
        found = pickle_files.open_file(tmp_path / "x.bin")
        assert found.keys() == value.keys()
        for name, want in value.items():
            want = want.detach()
            assert found[name].dtype.name == str(want.dtype).removeprefix("torch.")
            np.testing.assert_array_equal(found[name].astype(np.float64), want.double().numpy())


def test_the_command_reads_a_pickle_when_asked(pickled, tmp_path):
    from click.testing import CliRunner

    from jaxllm.cli.convert import convert as command

    out = tmp_path / "out"
    got = CliRunner().invoke(command, [str(pickled), str(out)])
    assert got.exit_code and "--unsafe-format pickle" in str(got.exception) and not out.exists()
    got = CliRunner().invoke(command, [str(pickled), str(out), "--unsafe-format", "pickle"])
    assert got.exit_code == 0 and (out / "manifest.json").is_file()
