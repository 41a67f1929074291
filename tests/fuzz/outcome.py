"""What came of one input: refused in one line, opened, or one of the things that must never be."""

import contextlib
import dataclasses
import re
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fuzz.mutate import mutate
from jaxllm.storage import checksums

LIMIT = 10  # seconds an input may take
MORE = 64 << 20  # bytes an input may take beyond twice its files: Python's own, a compiled program's
GOOD = ("refused", "equal", "opened")  # "opened": to other numbers, which the file's author may have meant


@dataclasses.dataclass
class Sample:
    """Good files of one format below a folder, and how they are opened."""

    folder: Path
    open: Callable[[], Any]
    stored: (
        bool  # with checksums of ours: what was changed behind their back must be refused, or change nothing
    )

    def __post_init__(self):
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        self.files = {file: file.read_bytes() for file in files}
        self.right = leaves(self.open())

    def restore(self) -> None:
        """Puts all files back as they were."""
        for file, data in self.files.items():
            if not file.is_file() or file.read_bytes() != data:
                file.write_bytes(data)


def leaves(value: Any) -> list[np.ndarray]:
    """All that was opened, as arrays on the host: every byte is read."""
    return [np.array(x) for x in jax.tree.leaves(value)]


def is_equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    """Whether all bytes, shapes and types are the same."""
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in zip(a, b, strict=True)
    )


class TooLong(BaseException):
    """Past every `except Exception`."""


@contextlib.contextmanager
def limited(seconds: int):
    """Raises TooLong in the block after so many seconds."""

    def stop(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def resident(what: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at most since `forget_peak` (VmHWM)."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def forget_peak() -> int:
    """Bytes of this process in memory; the peak is counted from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def outcome(sample: Sample, seed: int) -> tuple[str, str]:
    """What came of one input, and how it was made and what was said. The files stay changed."""
    rng = np.random.default_rng(seed)
    file = list(sample.files)[rng.integers(len(sample.files))]
    how = mutate(rng, file)
    signed = sample.stored and file.name != checksums.CHECKSUMS and rng.random() < 0.4
    if signed:  # a hostile author writes checksums as well
        held = checksums.names("fuzz", sample.folder)
        checksums.write(sample.folder, [name for name in held if (sample.folder / name).is_file()])
        how += ", signed"
    size = sum(path.stat().st_size for path in sample.folder.rglob("*") if path.is_file())
    before = forget_peak()
    try:
        with limited(LIMIT), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = leaves(sample.open())
    except TooLong:
        return "hang", how
    except MemoryError as error:
        return "memory", f"{how}: {error}"
    except Exception as error:
        said = f"{how}: {type(error).__name__}: {error}"
        one_line = type(error) in (ValueError, FileNotFoundError, OSError) and "\n" not in str(error)
        if not one_line or not 0 < len(str(error)) < 1500:
            return "traceback", said
        found = None
    taken = resident("VmHWM") - before
    if taken > 2 * size + MORE:
        return "memory", f"{how}: {taken:,} bytes for files of {size:,}"
    if found is None:
        return "refused", said
    if is_equal(found, sample.right):
        return "equal", how
    return "silent" if sample.stored and not signed else "opened", how
