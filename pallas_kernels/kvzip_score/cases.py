"""KVzip's score at real shapes: a chunk of 2,000 tokens and its repetition in one layer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import GPUS, Case
from pallas_kernels.kvzip_score import mosaic_gpu, reference, triton


def case(
    name: str,
    backend: Any,
    *,
    kv_heads: int,
    group: int,
    E: int,
    chunk: int,
    prompt: int,
    batch: int = 1,
    gpus: tuple[str, ...] = GPUS,
) -> Case:
    """A chunk of keys, then the queries' own: a prompt and the chunk again."""
    T, H = chunk + prompt, kv_heads * group
    S = chunk + T
    struct = jax.ShapeDtypeStruct
    arrays = (
        struct((batch, T, H, E), jnp.bfloat16),
        struct((batch * kv_heads, S, E), jnp.bfloat16),
        struct((batch, T, S), jnp.bool_),
        None,
        None,
    )

    def make(rng: np.random.Generator) -> tuple[Any, ...]:
        q, k = (jnp.asarray(rng.standard_normal(a.shape, np.float32), a.dtype) for a in arrays[:2])
        seen = np.arange(S)[None] <= np.arange(T)[:, None] + chunk
        return q, k, jnp.asarray(np.broadcast_to(seen, (batch, T, S))), None, None

    rule: dict[str, Any] = {"scale": E**-0.5, "softcap": None, "reduce": "max"}
    if backend is triton:
        tile = triton.default_tile(E, 2)
        turn = tile.queries * tile.keys / (32 * tile.warps)
    else:
        turn = mosaic_gpu.ROWS * mosaic_gpu.KEYS / 128
    pairs = batch * H * T * (chunk + T // 2)
    return Case(
        name=f"attention_per_key {name} {backend.__name__.rpartition('.')[2]}",
        run=functools.partial(backend.attention_per_key, **rule),
        reference=functools.partial(reference.attention_per_key, **rule),
        arrays=arrays,
        make=make,
        gpus=gpus,
        num_bytes=sum(a.size * a.dtype.itemsize for a in arrays if a is not None) + 4 * batch * H * S,
        operations=4 * E * pairs,
        units=2 * pairs,
        units_per_turn=turn,
    )


LLAMA: dict[str, Any] = {"kv_heads": 8, "group": 4, "E": 128, "chunk": 2000, "prompt": 24}
QWEN: dict[str, Any] = {"kv_heads": 4, "group": 7, "E": 128, "chunk": 2000, "prompt": 24}
SMALL: dict[str, Any] = {"kv_heads": 8, "group": 4, "E": 64, "chunk": 2000, "prompt": 24}

CASES: tuple[Case, ...] = (
    case("Llama-3-8B", triton, **LLAMA),
    case("Qwen2.5-7B, batch 4", triton, **QWEN, batch=4),
    case("Llama-3.2-1B", triton, **SMALL),
    case("Llama-3-8B", mosaic_gpu, **LLAMA, gpus=("h100",)),
    case("Qwen2.5-7B, batch 4", mosaic_gpu, **QWEN, batch=4, gpus=("h100",)),
    case("Llama-3.2-1B", mosaic_gpu, **SMALL, gpus=("h100",)),
)
