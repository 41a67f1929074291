"""Real shapes of the nested product: Llama-3-8B, Qwen2.5-7B, and an eighth of a 70B."""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import GPUS, Case
from pallas_kernels.nested_fp_gemm import mosaic_gpu, plain, reference, triton


def encoded(rng: np.random.Generator, N: int, K: int):
    """Upper and lower bytes of normal weights."""
    w = (rng.standard_normal((N, K), np.float32) * 0.1).clip(-1.8, 1.8).astype(np.float16)
    upper = jnp.clip(jnp.asarray(w).astype(jnp.float32) * 256, -448, 448).astype(reference.F8)
    return upper.view(jnp.uint8), jnp.asarray((w.view(np.uint16) & 0xFF).astype(np.uint8))


def _case(model: str, backend: ModuleType, mode: str, M: int, N: int, K: int, dtype=jnp.float16) -> Case:
    """Instructions are counted by the weights that one thread decodes in a turn."""
    gpus: tuple[str, ...] = GPUS
    if backend is mosaic_gpu:
        tokens, weights, gpus = mosaic_gpu.default_tile(M, N, K, mode).tokens, 64 * 128 / 128, ("h100",)
    else:
        tile = triton.default_tile(M, N, K)
        tokens, weights = tile.tokens, tile.rows * tile.depth / (32 * tile.warps)

    def make(rng):
        upper, lower = encoded(rng, N, K)
        x = jnp.asarray(rng.standard_normal((M, K), np.float32)).astype(dtype)
        return x, upper, None if mode == "fp8" else lower, jnp.int32(0) if mode == "traced" else None

    name = backend.__name__.rsplit(".", 1)[1]
    return Case(
        name=f"nested_fp_gemm {mode} {model} {M}x{N}x{K} {jnp.dtype(dtype)} {name}",
        run=functools.partial(backend.nested_fp_gemm, mode=mode),
        reference=functools.partial(reference.nested_fp_gemm, mode=mode),
        arrays=(
            jax.ShapeDtypeStruct((M, K), dtype),
            jax.ShapeDtypeStruct((N, K), jnp.uint8),
            None if mode == "fp8" else jax.ShapeDtypeStruct((N, K), jnp.uint8),
            jax.ShapeDtypeStruct((), jnp.int32) if mode == "traced" else None,
        ),
        make=make,
        gpus=gpus,
        num_bytes=N * K * (1 if mode == "fp8" else 2) + M * K * 2 + M * N * 4,
        operations=2 * M * N * K,
        units=N * K * -(-M // tokens),  # a weight is decoded once for each tile of tokens
        units_per_turn=weights,
    )


def _plain(model: str, M: int, N: int, K: int) -> Case:
    tile = mosaic_gpu.default_tile(M, N, K, "fp16")
    return Case(
        name=f"plain_fp16_gemm {model} {M}x{N}x{K} mosaic_gpu",
        run=plain.plain_gemm,
        reference=plain_reference,
        arrays=(jax.ShapeDtypeStruct((M, K), jnp.float16), jax.ShapeDtypeStruct((N, K), jnp.float16)),
        gpus=("h100",),
        num_bytes=N * K * 2 + M * K * 2 + M * N * 4,
        operations=2 * M * N * K,
        units=N * K * -(-M // tile.tokens),
        units_per_turn=64.0,
    )


def plain_reference(x, w):
    return jnp.einsum("mk,nk->mn", x, w, preferred_element_type=jnp.float32)


LLAMA, QWEN, SHARD = "Llama-3-8B", "Qwen2.5-7B", "70B/8"
CASES: tuple[Case, ...] = (
    _case(LLAMA, mosaic_gpu, "fp16", 1, 14336, 4096),
    _case(LLAMA, mosaic_gpu, "fp16", 16, 4096, 4096, jnp.bfloat16),
    _case(QWEN, mosaic_gpu, "fp16", 256, 18944, 3584),
    _case(SHARD, mosaic_gpu, "fp16", 2048, 3584, 8192),
    _plain(SHARD, 2048, 3584, 8192),
    _plain(QWEN, 256, 18944, 3584),
    _case(LLAMA, mosaic_gpu, "fp8", 8, 4096, 14336),
    _case(SHARD, mosaic_gpu, "fp8", 2048, 3584, 8192),
    _case(LLAMA, mosaic_gpu, "traced", 64, 4096, 4096, jnp.bfloat16),
    _case(LLAMA, triton, "fp16", 1, 4096, 4096),
    _case(QWEN, triton, "fp16", 256, 3584, 3584, jnp.bfloat16),
    _case(LLAMA, triton, "traced", 4, 14336, 4096),
)
