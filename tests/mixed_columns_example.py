"""A small matrix for tests of columns at 2 and 4 bits: its rows, statistics, and what quantizing loses."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.quant.methods.mixed_two_bit import MixedTwoBit
from jaxllm.quant.statistics import Stats
from jaxllm.weights import mixed_columns
from jaxllm.weights.mixed_columns import MixedColumns

N, K = 48, 192  # 12 column groups, 3 blocks of outputs
matmul = jax.jit(mixed_columns.matmul)
values = jax.jit(MixedColumns.dequantize_rows)


def example(n=N, k=K, seed=0):
    rng = np.random.default_rng(seed)
    rows = jnp.asarray(rng.standard_t(4, (n, k)).astype(np.float32) * 0.02)
    return rows, Stats(hessian_diag=jnp.asarray(rng.lognormal(0, 1.2, k).astype(np.float32)))


def mask_of(*groups, size=12):
    mask = np.zeros(size, bool)
    mask[list(groups)] = True
    return mask


def solve(rows, stats, mask=None, **options):
    return MixedTwoBit(**options).quantize(rows, stats, name="a", dtype=rows.dtype, mask=mask)


def solve_for_words(rows, stats, mask, **options):
    return solve(rows, stats, mask, narrow_steps=True, **options)


def error(w, rows, stats):
    h = np.asarray(stats.hessian_diag)[None]
    h = h / h.mean() + 1e-4
    return float((h * np.square(np.asarray(values(w)) - np.asarray(rows))).sum())


def num_bits(w):
    return 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(w))
