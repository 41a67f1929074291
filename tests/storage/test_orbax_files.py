"""Orbax's directories wherever they lie, and what is wrong with one in one line, with nothing printed."""

import numpy as np
import pytest

from jaxllm.storage.orbax_files import reading, writing


@pytest.mark.parametrize("name", ["with space", "runs [2024]", "*?"])
def test_a_directory_opens_below_any_name_there_and_elsewhere(tmp_path, name):
    path = tmp_path / name / "weights"
    path.parent.mkdir()
    arrays = {"a": np.arange(5)}
    with writing(path) as (checkpointer, place):
        checkpointer.save(place, arrays)
    moved = path.parent.rename(tmp_path / "moved [x]") / "weights"
    with reading("test", moved) as (checkpointer, place):
        np.testing.assert_array_equal(checkpointer.restore(place, arrays)["a"], arrays["a"])


def test_a_damaged_file_is_one_line_that_names_the_directory_and_prints_nothing(tmp_path, capfd):
    with writing(tmp_path / "weights") as (checkpointer, place):
        checkpointer.save(place, {"a": np.arange(5)})
    for file in (tmp_path / "weights").rglob("d/*"):
        file.write_bytes(b"")
    capfd.readouterr()
    with pytest.raises(ValueError, match="test: .*weights' cannot be read: ") as caught:
        with reading("test", tmp_path / "weights") as (checkpointer, place):
            checkpointer.restore(place, {"a": np.arange(5)})
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
