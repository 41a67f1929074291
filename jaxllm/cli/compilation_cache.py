"""Compiled programs kept between runs, in the user's cache directory.

Compiling is most of what a first run takes, and JAX finds a program again by all that it depends on: the
computation, the compiler's version and options, the processor. JAX's own variables, where set, decide.
"""

import os
from pathlib import Path

import jax
from platformdirs import user_cache_path

from jaxllm.cli.output import note

OF_JAX = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
LARGEST = 2**30  # bytes; above them the programs that were not read for longest go, until half is left


def start() -> None:
    """Keeps compiled programs from now on. A directory that cannot be written is a note, never an error."""
    if any(name in os.environ for name in OF_JAX):
        return
    path = user_cache_path("jaxllm", appauthor=False) / "compiled"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError("no permission to write")
        prune(path, LARGEST)
    except OSError as error:
        note(f"jaxllm: compiled programs are not kept: {path}: {error.strerror or error}")
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def prune(path: Path, largest: int) -> None:
    """Removes empty files and, where all have more than `largest` bytes, the least recently read ones."""
    files = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_file():
                is_whole, last_read = entry.stat().st_size > 0, entry.stat().st_atime
                files.append((is_whole, last_read, entry.stat().st_size, entry.path))
    total = sum(size for _, _, size, _ in files)
    bound = largest // 2 if total > largest else total
    for is_whole, _, size, name in sorted(files):
        if is_whole and total <= bound:
            break
        Path(name).unlink(missing_ok=True)
        total -= size
