"""Tiles that were measured: one JSON file a kind of GPU, those that ship and the user's own.

    {"dequant_gemm triton": {"K=4096 M=1 N=4096 bits=4 dtype=bfloat16 group_size=128": {"m": 8, "n": 64}}}

A kernel's `default_tile`, decorated by `measured`, is asked only where no file has a tile for its arguments.
`jaxllm bench tune` writes the user's file, in the user's cache directory; it goes before the one that ships.
What ships was measured on the GPU that the file is named for.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from platformdirs import user_cache_path

T = TypeVar("T")
Table = dict[str, dict[str, dict[str, int]]]
SHIPPED = Path(__file__).parent / "measured_tiles"
COUNTS = ("M", "B")  # of rows and of clouds: rounded up to powers of two, as tiles change slowly with them


@dataclasses.dataclass(frozen=True)
class Asked:
    """A tile that a kernel asked for while it was traced."""

    kernel: str
    key: str
    tile: Any


_asked: list[Asked] = []
_tried: dict[str, Any] = {}  # by kernel: what the tuner tries in place of all others


def measured(kernel: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorates a kernel's `default_tile`: the tile measured for its arguments goes first."""

    def decorate(default_tile: Callable[..., T]) -> Callable[..., T]:
        signature = inspect.signature(default_tile)

        @functools.wraps(default_tile)
        def tile(*args, **kwargs) -> T:
            sizes = key(**signature.bind(*args, **kwargs).arguments)
            found = default_tile(*args, **kwargs)
            if stored := _table(_kind()).get(kernel, {}).get(sizes):
                with contextlib.suppress(TypeError):  # of a version with other fields
                    found = type(found)(**stored)
            found = _tried.get(kernel, found)
            _asked.append(Asked(kernel, sizes, found))
            del _asked[:-100]
            return found

        return tile

    return decorate


def key(**sizes: Any) -> str:
    """What a tile is measured for. The capability is left out, which the file's name says."""

    def text(name: str, value: Any) -> str:
        if name in COUNTS:
            value = 1 << max(0, value - 1).bit_length()
        if name == "dtype":
            value = jnp.dtype(value).name
        return f"{name}={value}"

    return " ".join(text(name, sizes[name]) for name in sorted(sizes) if name != "capability")


def asked_by(function: Callable[..., Any], *arrays: Any) -> Asked | None:
    """The tile that a function asks for with such arrays, None if it asks for none."""
    _asked.clear()
    jax.clear_caches()
    jax.eval_shape(function, *arrays)
    return _asked[-1] if _asked else None


@contextlib.contextmanager
def trying(kernel: str, tile: Any) -> Iterator[None]:
    """Gives a kernel this tile, whatever it is traced with."""
    _tried[kernel] = tile
    jax.clear_caches()
    try:
        yield
    finally:
        del _tried[kernel]
        jax.clear_caches()


def variations(tile: T) -> list[T]:
    """The tile, and those with one number twice or half as large."""
    found = [tile]
    for field in dataclasses.fields(tile):  # type: ignore[arg-type]
        value = getattr(tile, field.name)
        if type(value) is int:
            found += [dataclasses.replace(tile, **{field.name: v}) for v in (value // 2, 2 * value) if v > 0]  # type: ignore[type-var]
    return found


def file_name(kind: str) -> str:
    """Of a kind of device: "NVIDIA H200" -> "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-") + ".json"


def user_file(kind: str) -> Path:
    """Where the user's own tiles of a kind of GPU are."""
    return user_cache_path("jaxllm") / "tiles" / file_name(kind)


def store(kind: str, asked: Asked, tile: Any) -> Path:
    """Writes a tile into the user's file, whole or not at all."""
    path = user_file(kind)
    table = _read(path)
    table.setdefault(asked.kernel, {})[asked.key] = dataclasses.asdict(tile)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(table, indent=1, sort_keys=True))
    scratch.replace(path)
    _table.cache_clear()
    return path


def _kind() -> str:
    device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    return str(getattr(device, "device_kind", device))


@functools.cache
def _table(kind: str) -> Table:
    """Both files; a file that cannot be read counts as none (it is a cache)."""
    table = _read(SHIPPED / file_name(kind))
    for kernel, of_kernel in _read(user_file(kind)).items():
        table.setdefault(kernel, {}).update(of_kernel)
    return table


def _read(path: Path) -> Table:
    try:
        table = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    good = isinstance(table, dict) and all(isinstance(of_kernel, dict) for of_kernel in table.values())
    return table if good else {}
