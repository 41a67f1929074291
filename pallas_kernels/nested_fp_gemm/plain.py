"""A float16 matrix product with the tiles and the pipeline of `mosaic_gpu`, and nothing to join.

What NestedFP's fp16 mode is measured against: the difference is the cost of two bytes instead of one half.
"""

from jaxtyping import Array, Float, Float32

from pallas_kernels.nested_fp_gemm import mosaic_gpu


def plain_gemm(
    x: Float[Array, "M K"],
    w: Float[Array, "N K"],
    *,
    tile: mosaic_gpu.Tile | None = None,
    interpret: bool = False,
) -> Float32[Array, "M N"]:
    """`x @ w.T` in float32; M a multiple of the tile's tokens, the rest as `mosaic_gpu.why_not` says."""
    (M, K), N = x.shape, w.shape[0]
    tile = mosaic_gpu.default_tile(M, N, K, "fp16") if tile is None else tile
    return mosaic_gpu.gemm(x, (w,), tile=tile, name="plain_fp16_gemm", interpret=interpret)
