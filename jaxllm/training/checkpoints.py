"""A run's checkpoints: a directory a step, each there whole or not at all, the last two kept.

    saved = Checkpoints("run/")
    if saved.newest() is not None:
        state, history = saved.read(like=state)
    saved.write(step, state, history)

A step holds `state/` (Orbax), `history.json` and checksums of both. Steps that version 0.1.0 wrote, without
checksums, are read as well.
"""

import shutil
from pathlib import Path
from typing import Any

import jax

from jaxllm.storage import checksums
from jaxllm.storage.directory import new_directory
from jaxllm.storage.metadata import parse_json, read_meta, write_meta
from jaxllm.storage.orbax_files import reading, write

STATE, HISTORY = "state", "history.json"
FORMAT, VERSION = "jaxllm training", 2
OLD_HISTORY = Path("history") / "metadata"  # of 0.1.0
KEPT = 2  # the newest steps that stay


class Checkpoints:
    """The steps in a directory, which need not exist yet."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute()

    def steps(self) -> list[int]:
        """The steps there are, in order."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(path.name) for path in found if path.name.isdecimal())

    def newest(self) -> int | None:
        """The last step, None where there is none."""
        return max(self.steps(), default=None)

    def write(self, step: int, state: Any, history: dict[str, Any]) -> None:
        """Adds a step and removes those before the last two. OSError in one line when the disk is full."""
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        with new_directory(self.folder / str(step), who="train", num_bytes=size) as out:
            write_meta(out / HISTORY, FORMAT, VERSION, history, indent=None)
            write(out / STATE, state)
            checksums.write(out, [HISTORY, STATE])
        for old in self.steps()[:-KEPT]:
            shutil.rmtree(self.folder / str(old))

    def read(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """State and history of the newest step.

        like: a state of the structure, shapes, types and places that it must have. Raises ValueError in one
          line for another's, and for a step that is damaged (without it, the step before goes on).
        """
        import orbax.checkpoint as ocp

        folder = self.folder / str(self.newest())
        if (folder / OLD_HISTORY).is_file():
            history = parse_json(f"train: {str(folder / OLD_HISTORY)!r}", (folder / OLD_HISTORY).read_bytes())
        else:
            history = read_meta("train", folder / HISTORY, FORMAT, VERSION)
            checksums.verify("train", folder, [HISTORY, STATE], required=True)
        _check_history(history, folder)
        with reading("train", folder / STATE) as (checkpointer, place):
            return checkpointer.restore(place, jax.tree.map(ocp.utils.to_shape_dtype_struct, like)), history


def _check_history(history: Any, folder: Path) -> None:
    """Raises ValueError unless what a run remembers of itself is that of this step."""
    history = history if isinstance(history, dict) else {}
    step, losses = history.get("step"), history.get("losses")
    numbers = [history.get("seconds"), *(losses if isinstance(losses, list) else [None])]
    whole = all(type(x) in (int, float) for x in numbers) and type(history.get("tokens")) is int
    if not whole or str(step) != folder.name or len(numbers) != int(folder.name) + 1:
        raise ValueError(f"train: the history must be of step {folder.name}, got another in {str(folder)!r}")
