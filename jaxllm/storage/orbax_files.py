"""Arrays in Orbax's directories: written and read without its log, wherever they lie, errors in one line.

write(out / "weights", arrays)
with reading("load", path / "weights") as (checkpointer, place):
    arrays = checkpointer.restore(place, target)
"""

import glob
import logging
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxllm.storage.metadata import one_line


def write(path: Path, arrays: Any) -> None:
    """Writes a tree of arrays as the directory `path`; when it returns or raises nobody writes there.

    A thread does it, for in the main one Ctrl-C would leave Orbax's own threads at work: it waits for them
    with Thread.join, which after an interruption takes a running thread for one that has ended.
    """

    def save() -> None:
        with _checkpointer(path) as (checkpointer, place):
            checkpointer.save(place, arrays)
            checkpointer.wait_until_finished()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # its thread runs: however this block is left, it is waited for
        pool.submit(save).result()


@contextmanager
def reading(who: str, path: Path) -> Iterator[tuple[Any, Path]]:
    """A checkpointer, and by what name it reads the directory `path`.

    who: whose errors these are. Raises ValueError in one line for whatever fails in the block.
    """
    try:
        with _checkpointer(path) as both:
            yield both
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file, on many lines
        why = one_line(error).removeprefix(f"{who}: ")[:300]
        raise ValueError(f"{who}: {str(path)!r} cannot be read: {why}") from error


@contextmanager
def _checkpointer(path: Path) -> Iterator[tuple[Any, Path]]:
    """A checkpointer, and by what name it knows the directory `path`."""
    import orbax.checkpoint as ocp

    with _quiet(), _plain(path) as place, ocp.StandardCheckpointer() as checkpointer:
        yield checkpointer, place


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of Orbax and its tasks: they print the traceback of an error that is raised anyway."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    hooks = sys.excepthook, sys.unraisablehook
    sys.excepthook = sys.unraisablehook = _ignore
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook = hooks
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _ignore(*_: Any) -> None:
    """Prints nothing: TensorStore's threads print what they raise besides."""


@contextmanager
def _plain(path: Path) -> Iterator[Path]:
    """A name of a directory without brackets, stars and question marks: its own, or one behind a link.

    Orbax looks for files below a directory with patterns that its name is part of: none in "[4bit]".
    """
    if glob.escape(str(path)) == str(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="jaxllm") as folder:
        link = Path(folder) / "link"
        link.symlink_to(path.parent.absolute(), target_is_directory=True)
        yield link / path.name
