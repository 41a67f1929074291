"""A directory, or one file, that appears whole or not at all.

It is written beside its final place, flushed to the disk, and renamed. What a killed process left
behind is removed by the next that writes to the same place.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_directory(out, *, who: str, num_bytes: int = 0) -> Iterator[Path]:
    """A temporary directory that becomes `out` when the block ends, and vanishes when it raises.

    who: whose errors these are. num_bytes: the least that will be written; a disk without that room is
      refused at once.

    Raises FileExistsError when `out` exists, OSError in one line when the disk is full.
    """
    with _temporary(out, who, num_bytes) as (temporary, out):
        yield temporary
        _flush(temporary)
        _move(temporary, out)


@contextmanager
def new_file(out, *, who: str, num_bytes: int = 0) -> Iterator[Path]:
    """The path of a file that becomes `out` when the block ends, and vanishes when it raises; as above."""
    with _temporary(out, who, num_bytes) as (temporary, out):
        yield temporary / out.name
        _flush(temporary)
        _move(temporary / out.name, out)
        temporary.rmdir()


@contextmanager
def _temporary(out, who: str, num_bytes: int) -> Iterator[tuple[Path, Path]]:
    """A new directory beside `out`, and `out`; removed when the block raises."""
    out = Path(out).absolute()
    if out.exists():
        raise FileExistsError(f"{who}: the output must not exist yet, got {str(out)!r}")
    made = _make_parents(out.parent)
    _remove_stale(out)
    temporary = out.with_name(f"{out.name}.tmp{os.getpid()}")
    with one_line_for_a_full_disk(who, out):
        try:
            temporary.mkdir()
            if shutil.disk_usage(temporary).free < num_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield temporary, out
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            for parent in made:
                parent.rmdir()
            raise


def _move(made: Path, out: Path) -> None:
    """Gives what was made its name, and takes it away again where that is cut short (Ctrl-C, a full disk)."""
    number = made.stat().st_ino
    try:
        os.rename(made, out)
        _flush_one(out.parent)
    except BaseException:
        if out.exists() and out.stat().st_ino == number:
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        raise


@contextmanager
def one_line_for_a_full_disk(who: str, out: Path) -> Iterator[None]:
    """An OSError in one line for whatever a disk without room makes the block raise."""
    try:
        yield
    except BaseException as error:
        if _is_full(error):
            message = f"{who}: the disk must have room for the output, got {str(out)!r}"
            raise OSError(errno.ENOSPC, message) from error
        raise


def _make_parents(parent: Path) -> list[Path]:
    """Makes missing parents; returns them, the deepest first."""
    made = []
    while not parent.exists():
        made.append(parent)
        parent = parent.parent
    for path in reversed(made):
        path.mkdir()
    return made


def _remove_stale(out: Path) -> None:
    """Removes temporary directories of `out` whose process is gone."""
    for path in out.parent.iterdir():
        pid = re.fullmatch(re.escape(out.name) + r"\.tmp(\d+)", path.name)
        if pid is not None and not _is_alive(int(pid[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return pid != os.getpid()  # our own earlier attempt: nobody else can be using it


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error, however it was wrapped."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "ENOSPC" in str(error) or os.strerror(errno.ENOSPC) in str(error):
            return True
        if isinstance(error, BaseExceptionGroup):
            return any(_is_full(inner) for inner in error.exceptions)
        error = error.__cause__ or error.__context__
    return False


def _flush(directory: Path) -> None:
    """Every file and folder below, and `directory` itself, to the disk."""
    for path in directory.rglob("*"):
        _flush_one(path)
    _flush_one(directory)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
