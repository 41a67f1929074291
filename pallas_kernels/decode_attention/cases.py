"""Decode attention at real shapes: one layer's context of models that people run, in pages and dense."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case
from pallas_kernels.decode_attention import calls, mosaic_gpu, reference, triton
from pallas_kernels.decode_attention.coded import Code, words_of_row
from pallas_kernels.words import to_words

HOPPER = (9, 0)


def _rows(rng: np.random.Generator, shape: tuple[int, ...], code: Code | None, dtype: Any) -> jax.Array:
    """Rows of a cache in numbers that a model could have."""
    if code is None:
        return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype)
    *lead, E = shape
    G = -(-E // code.group_size)
    scale = (rng.uniform(1, 2, (*lead, G)) * 3 / 2**code.bits).astype(np.float16)
    low = rng.uniform(-3, -2, (*lead, G)).astype(np.float16)
    grid = low.view(np.uint16).astype(np.uint32) | scale.view(np.uint16).astype(np.uint32) << 16
    codes = rng.integers(0, 2**code.bits, (*lead, E), np.uint8)
    return jnp.concatenate([jnp.asarray(grid), to_words(jnp.asarray(codes), code.bits)], axis=-1)


def _turn(backend: Any, N: int, E: int, code: Code | None) -> float:
    """Cached pairs that a thread takes in one turn."""
    tile = backend.default_tile(N, E, 2, code, HOPPER)
    return tile.rows / (32 * tile.warps)


def paged_case(
    name: str,
    backend: Any,
    *,
    kv_heads: int,
    group: int,
    E: int,
    tokens: int,
    batch: int = 1,
    new: int = 1,
    page: int = 64,
    kept: float = 1.0,
    readers: int = 1,
    code: Code | None = None,
    dtype: Any = jnp.bfloat16,
    gpus: tuple[str, ...] = ("h100", "a100", "l4", "b200"),
) -> Case:
    """A layer of `batch` requests, `readers` to a context, of whose tokens a share is kept, by head."""
    J, n = batch // readers * kv_heads, group * new
    pages_of = np.full(J, int(kept * tokens) // page)
    if kept < 1:
        pages_of[::2] //= 4  # heads differ: that is what pages are for
        pages_of[1::2] += int(kept * tokens) // page - pages_of[::2]
    P, w, int32 = int(pages_of.sum()), words_of_row(code, E), jnp.int32
    struct = jax.ShapeDtypeStruct
    stored = struct((P, page, w), dtype if code is None else jnp.uint32)
    arrays = (
        struct((batch, kv_heads, n, E), dtype),
        stored,
        stored,
        *(struct((size,), int32) for size in (J + 1, P, P, batch)),
    )

    def make(rng: np.random.Generator) -> tuple[Any, ...]:
        q = jnp.asarray(rng.standard_normal(arrays[0].shape, np.float32)).astype(dtype)
        k, v = (_rows(rng, (P, page, E), code, dtype) for _ in range(2))
        offsets = np.concatenate([[0], np.cumsum(pages_of)])
        whole = np.full(P, page), np.repeat(np.arange(J), pages_of), np.arange(batch) // readers
        return q, k, v, *(jnp.asarray(x, int32) for x in (offsets, *whole))

    rule: dict[str, Any] = {"max_readers": readers, "scale": E**-0.5, "softcap": None, "code": code}
    return Case(
        name=f"attend_pages {name} {backend.__name__.rpartition('.')[2]}",
        run=functools.partial(calls.pages, backend, **rule),
        reference=functools.partial(reference.pages, **rule),
        arrays=arrays,
        make=make,
        gpus=gpus,
        num_bytes=2 * stored.size * stored.dtype.itemsize + batch * kv_heads * n * E * 6,
        operations=4 * P * page * readers * n * E,
        units=P * page,
        units_per_turn=_turn(backend, readers * n, E, code),
    )


def dense_case(
    name: str,
    backend: Any,
    *,
    kv_heads: int,
    group: int,
    E: int,
    tokens: int,
    batch: int = 1,
    new: int = 1,
    window: int | None = None,
    softcap: float | None = None,
    code: Code | None = None,
    dtype: Any = jnp.bfloat16,
    gpus: tuple[str, ...] = ("h100", "a100", "l4", "b200"),
) -> Case:
    """A layer of a dense cache, full, or a ring of a window."""
    J, S, w = batch * kv_heads, tokens, words_of_row(code, E)
    struct = jax.ShapeDtypeStruct
    stored = struct((J, S, w), dtype if code is None else jnp.uint32)
    arrays = (
        struct((batch, new, kv_heads * group, E), dtype),
        stored,
        stored,
        struct((batch, new), jnp.int32),
        struct((batch, S), jnp.int32),
        None,
    )

    def make(rng: np.random.Generator) -> tuple[Any, ...]:
        q = jnp.asarray(rng.standard_normal(arrays[0].shape, np.float32)).astype(dtype)
        k, v = (_rows(rng, (J, S, E), code, dtype) for _ in range(2))
        at = np.broadcast_to(S - new + np.arange(new), (batch, new))
        of = np.broadcast_to(np.arange(S), (batch, S))
        return q, k, v, jnp.asarray(at, jnp.int32), jnp.asarray(of, jnp.int32), None

    rule: dict[str, Any] = {"scale": E**-0.5, "softcap": softcap, "window": window, "code": code}
    return Case(
        name=f"attend_rows {name} {backend.__name__.rpartition('.')[2]}",
        run=functools.partial(calls.rows, backend, **rule),
        reference=functools.partial(reference.rows, **rule),
        arrays=arrays,
        make=make,
        gpus=gpus,
        num_bytes=2 * stored.size * stored.dtype.itemsize,
        operations=4 * J * S * group * new * E,
        units=J * S,
        units_per_turn=_turn(backend, group * new, E, code),
    )


LLAMA: dict[str, Any] = {"kv_heads": 8, "group": 4, "E": 128}
QWEN: dict[str, Any] = {"kv_heads": 4, "group": 7, "E": 128}
SMALL: dict[str, Any] = {"kv_heads": 8, "group": 4, "E": 64}  # Llama-3.2-1B
GEMMA: dict[str, Any] = {"kv_heads": 4, "group": 2, "E": 256}  # Gemma 2

HOPPERS = ("h100",)

CASES: tuple[Case, ...] = (
    paged_case("Llama-3-8B 32k", triton, **LLAMA, tokens=32768),
    paged_case("Llama-3-8B 32k, 30 % kept, batch 8", triton, **LLAMA, tokens=32768, batch=8, kept=0.3),
    paged_case("Llama-3-8B 32k, 8 questions", triton, **LLAMA, tokens=32768, batch=8, readers=8),
    paged_case("Llama-3-8B 32k, 8 tokens", triton, **LLAMA, tokens=32768, new=8),
    paged_case("Llama-3-8B 32k, 4 bits", triton, **LLAMA, tokens=32768, code=Code(4, 128)),
    paged_case("Llama-3-8B 32k, 8 bits", triton, **LLAMA, tokens=32768, code=Code(8, 128)),
    paged_case("Llama-3-8B 32k, 2 bits", triton, **LLAMA, tokens=32768, code=Code(2, 128)),
    paged_case("Llama-3-8B 32k, 4 bits, groups of 32", triton, **LLAMA, tokens=32768, code=Code(4, 32)),
    paged_case("Llama-3.2-1B 32k", triton, **SMALL, tokens=32768),
    paged_case("Llama-3.2-1B 32k, 4 bits", triton, **SMALL, tokens=32768, code=Code(4, 64)),
    paged_case("Llama-3.2-1B 32k, 2 bits", triton, **SMALL, tokens=32768, code=Code(2, 64)),
    dense_case("Qwen2.5-7B 32k", triton, **QWEN, tokens=32768),
    dense_case("Qwen2.5-7B 4k, batch 16, 4 bits", triton, **QWEN, tokens=4096, batch=16, code=Code(4, 128)),
    paged_case("Llama-3-8B 32k", mosaic_gpu, **LLAMA, tokens=32768, gpus=HOPPERS),
    paged_case(
        "Llama-3-8B 32k, 8 questions", mosaic_gpu, **LLAMA, tokens=32768, batch=8, readers=8, gpus=HOPPERS
    ),
    dense_case("Qwen2.5-7B 32k", mosaic_gpu, **QWEN, tokens=32768, gpus=HOPPERS),
    paged_case("Llama-3-8B 32k, 4 bits", mosaic_gpu, **LLAMA, tokens=32768, code=Code(4, 128), gpus=HOPPERS),
    paged_case(
        "Llama-3-8B 32k, 4 questions, 4 bits",
        mosaic_gpu,
        **LLAMA,
        tokens=32768,
        batch=4,
        readers=4,
        code=Code(4, 128),
        gpus=HOPPERS,
    ),
    paged_case("Llama-3-8B 32k, 2 bits", mosaic_gpu, **LLAMA, tokens=32768, code=Code(2, 128), gpus=HOPPERS),
    paged_case("Llama-3-8B 32k, 8 bits", mosaic_gpu, **LLAMA, tokens=32768, code=Code(8, 128), gpus=HOPPERS),
    paged_case(
        "Llama-3-8B 32k, 4 questions, 8 bits",
        mosaic_gpu,
        **LLAMA,
        tokens=32768,
        batch=4,
        readers=4,
        code=Code(8, 128),
        gpus=HOPPERS,
    ),
    paged_case("Llama-3.2-1B 32k, 4 bits", mosaic_gpu, **SMALL, tokens=32768, code=Code(4, 64), gpus=HOPPERS),
    dense_case(
        "Qwen2.5-7B 4k, batch 16, 4 bits",
        mosaic_gpu,
        **QWEN,
        tokens=4096,
        batch=16,
        code=Code(4, 128),
        gpus=HOPPERS,
    ),
    dense_case("Gemma-2-9B window 4096", triton, **GEMMA, tokens=4608, window=4096, softcap=50.0),
)
