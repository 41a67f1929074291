"""A disk that gets full: one line that says whose output had no room, and nothing half written stays."""

import errno
import os

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.cache import files as cache_files
from jaxllm.cli import demo
from jaxllm.eviction.gates import ZapGate, save_gates
from jaxllm.eviction.heads import save_heads
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.quant.calibrate import calibrate
from jaxllm.quant.checkpoint import BlockCheckpoint
from jaxllm.storage import checksums
from jaxllm.training.checkpoints import Checkpoints


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_while_writing(file, **arrays):
    file.write(b"half")
    full()


@pytest.fixture(scope="module")
def model():
    return Decoder(TINY, rngs=nnx.Rngs(0))


WRITERS = {
    "cache.save": lambda model, path: cache_files.save(model.make_cache(1, capacity=8), path, model),
    "save_gates": lambda model, path: save_gates(
        ZapGate(None, None, jnp.ones((2, 32, 2)), jnp.ones((2, 2))), path
    ),
    "save_heads": lambda model, path: save_heads(jnp.ones((2, 2)), path, model),
    "train": lambda model, path: Checkpoints(path).write(1, {"w": jnp.ones(9)}, {}),
}


@pytest.mark.parametrize("what", ["fsync", "checksums"])
@pytest.mark.parametrize("who", WRITERS)
def test_what_appears_whole_leaves_nothing(who, what, model, tmp_path, monkeypatch):
    monkeypatch.setattr(*((os, "fsync") if what == "fsync" else (checksums, "write")), full)
    with pytest.raises(OSError, match=f"{who}: the disk must have room for the output, got") as caught:
        WRITERS[who](model, tmp_path / "deep" / "out")
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_whole_or_absent(model, tmp_path, monkeypatch):
    def drawn(context):
        with open(context.out / "figure.png", "wb") as file:
            full_while_writing(file)

    monkeypatch.setattr(demo, "SECTIONS", (demo.size, drawn))
    with pytest.raises(OSError, match="demo: the disk must have room for the output, got"):
        demo.run(tmp_path / "report", model=model, note=str)
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_quantization_keeps_the_blocks_it_had(model, tmp_path, monkeypatch):
    run = BlockCheckpoint(tmp_path / "run", model, "method", [])
    run.write("layers.0", {"w": jnp.arange(3.0)})
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    monkeypatch.setattr(np, "savez", full_while_writing)
    with pytest.raises(OSError, match="quantize: the disk must have room for the output, got"):
        run.write("layers.1", {"w": jnp.arange(3.0)})
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    again = BlockCheckpoint(tmp_path / "run", model, "method", [])
    assert again.has("layers.0") and not again.has("layers.1")
    np.testing.assert_array_equal(again.read("layers.0")["w"], jnp.arange(3.0))


def test_a_calibration_goes_on_where_there_is_room_again(model, tmp_path, monkeypatch):
    def run():
        return calibrate(model, [[1, 2, 3]], want=("hessian_diag",), path=tmp_path / "c", progress=False)

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", full_while_writing)
        with pytest.raises(OSError, match="calibrate: the disk must have room for the output, got"):
            run()
    assert not list((tmp_path / "c").glob("*.part"))
    assert sorted(run()) == sorted(run())
