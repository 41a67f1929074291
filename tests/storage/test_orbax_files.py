"""Orbax's directories wherever they lie, and what is wrong with one in one line, with nothing printed."""

import signal
import threading
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxllm.storage.orbax_files import reading, write


@pytest.mark.parametrize("name", ["with space", "runs [2024]", "*?"])
def test_a_directory_opens_below_any_name_there_and_elsewhere(tmp_path, name):
    path = tmp_path / name / "weights"
    path.parent.mkdir()
    arrays = {"a": np.arange(5)}
    write(path, arrays)
    moved = path.parent.rename(tmp_path / "moved [x]") / "weights"
    with reading("test", moved) as (checkpointer, place):
        np.testing.assert_array_equal(checkpointer.restore(place, arrays)["a"], arrays["a"])


def test_a_damaged_file_is_one_line_that_names_the_directory_and_prints_nothing(tmp_path, capfd):
    write(tmp_path / "weights", {"a": np.arange(5)})
    for file in (tmp_path / "weights").rglob("d/*"):
        file.write_bytes(b"")
    capfd.readouterr()
    with pytest.raises(ValueError, match="test: .*weights' cannot be read: ") as caught:
        with reading("test", tmp_path / "weights") as (checkpointer, place):
            checkpointer.restore(place, {"a": np.arange(5)})
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


def test_behind_ctrl_c_nobody_goes_on_writing(tmp_path, monkeypatch):
    """Pressed while Orbax's threads are at work: it is raised when they are not any more."""
    inner, begun, ended = ocp.StandardCheckpointer.save, [], []

    def slow(self, *args):
        begun.append(True)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.2)
        inner(self, *args)
        ended.append(True)

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", slow)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "weights", {"a": np.arange(5)})
    finally:
        signal.signal(signal.SIGINT, previous)
    assert begun == ended == [True] and (tmp_path / "weights").is_dir()
