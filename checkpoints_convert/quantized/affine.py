"""A linear in codes that mean (code - zero_point) * scale, between our formats and three tools' files.

    linear = Grid.of([weight])                          # exact, or a ValueError that says why not
    rounded(weight, bits=(4,), whole_groups=True)       # the nearest that such a scheme can hold

The layouts of the files are those of `gptq`, `awq` and `compressed_tensors`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert.quantized.words import codes_of, on_host, pack
from jaxllm.ops.packing import Packed
from jaxllm.weights import affine, host_residual
from jaxllm.weights.affine import Affine
from jaxllm.weights.block_affine import BlockAffine
from jaxllm.weights.codebook import Codebook
from jaxllm.weights.host_residual import HostResidual
from jaxllm.weights.mixed_columns import MixedColumns
from jaxllm.weights.permuted import Permuted
from jaxllm.weights.planes.bit_planes import BitPlanes
from jaxllm.weights.weight import Weight

GROUP_SIZE = 32  # of what is rounded anew and had no groups


@dataclasses.dataclass(frozen=True)
class Grid:
    """A linear in affine codes, in host memory."""

    codes: Packed  # [N, K], the inputs in `order`
    scale: np.ndarray  # [G, N]
    zero_point: np.ndarray | None  # uint8 [G, N]; None: the middle code
    group_size: int
    order: np.ndarray | None  # int32 [K]; None: as they come

    @classmethod
    def of(cls, parts: Sequence[Weight]) -> "Grid":
        """The linear in which these weights are stacked along the outputs.

        Raises ValueError, with the nearest setting, for weights that say more than a scale and a whole zero
        point of each group.
        """
        orders = [part.order for part in parts if isinstance(part, Permuted)]
        inner = [_affine(part.weight if isinstance(part, Permuted) else part) for part in parts]
        first = inner[0]
        kinds = {(w.codes.bits, w.group_size, w.zero_point is None) for w in inner}
        if len(kinds) > 1 or len(orders) not in (0, len(parts)) or not _equal(orders):
            raise ValueError("parts of one of their linears must have the same bits, groups and order")
        scale = np.concatenate([np.asarray(w.scale) for w in inner], axis=1)
        words = [np.asarray(w.codes.words) for w in inner]
        zero_points = [_whole(w) for w in inner if w.zero_point is not None]
        return cls(
            codes=on_host(
                Packed,
                words=words[0] if len(words) == 1 else np.concatenate(words),
                bits=first.codes.bits,
                size=first.codes.size,
            ),
            scale=_of_16_bits(scale),
            zero_point=np.concatenate(zero_points, axis=1) if zero_points else None,
            group_size=first.group_size,
            order=np.asarray(orders[0]) if orders else None,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        return self.codes.size, self.codes.words.shape[0]

    @property
    def zeros(self) -> np.ndarray:
        """The zero points uint8 [G, N], the middle code where there are none."""
        if self.zero_point is not None:
            return self.zero_point
        return np.full(self.scale.shape, 2 ** (self.codes.bits - 1), np.uint8)

    @property
    def g_idx(self) -> np.ndarray:
        """The group of each input, int32 [K]."""
        groups = np.arange(self.codes.size, dtype=np.int32) // np.int32(self.group_size)
        return groups if self.order is None else groups[np.argsort(self.order)]

    def codes_as_they_come(self) -> np.ndarray:
        """The codes uint8 [N, K], the inputs in their own order."""
        codes = codes_of(self.codes)
        return codes if self.order is None else codes[:, np.argsort(self.order)]

    def part(self, start: int, stop: int, dtype) -> Affine | Permuted:
        bits, K = self.codes.bits, self.codes.size
        zero_point = None if self.zero_point is None else self.zero_point[:, start:stop]
        if zero_point is not None and (zero_point == 2 ** (bits - 1)).all():
            zero_point = None
        w = on_host(
            Affine,
            codes=on_host(Packed, words=self.codes.words[start:stop], bits=bits, size=K),
            scale=self.scale[:, start:stop],
            zero_point=None if zero_point is None else pack(zero_point, bits),
            group_size=self.group_size,
            shape=(K, stop - start),
            dtype=dtype,
        )
        return w if self.order is None else on_host(Permuted, weight=w, order=self.order)


def _affine(w: Any) -> Affine:
    """The weight; ValueError for one that is more than affine codes with float scales."""
    if not isinstance(w, Affine):
        kind = type(w).__name__
        tables = ", and any-precision holds tables" if kind in ("Codebook", "BitPlanes") else ""
        raise ValueError(f"weights must be affine codes, as of Rtn, Gptq and DashQ{tables}, got {kind}")
    if isinstance(w.scale, Affine):
        raise ValueError(f"scales must be floats (scale_bits=None), got codes of {w.scale.codes.bits} bits")
    return w


def _equal(arrays: Sequence[Any]) -> bool:
    return all(np.array_equal(arrays[0], other) for other in arrays[1:])


def _whole(w: Affine) -> np.ndarray:
    """The zero points as codes, uint8 [G, N]."""
    if isinstance(w.zero_point, Packed):
        return codes_of(w.zero_point)
    zero_point = np.asarray(w.zero_point).astype(np.float32)
    codes = np.clip(np.rint(zero_point), 0, 2**w.codes.bits - 1)
    if not np.array_equal(codes, zero_point):
        raise ValueError("zero points must be whole codes (integer_zero_point=True), got float16 numbers")
    return codes.astype(np.uint8)


def _of_16_bits(scale: np.ndarray) -> np.ndarray:
    """Scales in the types that the tools read: float32 as float16, which must not change them."""
    if scale.dtype != np.float32:
        return scale
    with np.errstate(over="ignore"):
        short = scale.astype(np.float16)
    if not np.array_equal(short.astype(np.float32), scale):
        raise ValueError("scales must be float16 or bfloat16 numbers, got float32 that float16 rounds")
    return short


def least_bits(bits: int, allowed: Sequence[int]) -> int:
    """The least width that holds codes of `bits`, else the greatest."""
    return min((width for width in allowed if width >= bits), default=max(allowed))


def check_bits(linear: Grid, allowed: Sequence[int]) -> None:
    """Raises ValueError for a width that a scheme does not have."""
    if linear.codes.bits not in allowed:
        one_of = " or ".join(map(str, allowed))
        nearest = least_bits(linear.codes.bits, allowed)
        raise ValueError(
            f"bits must be {one_of}, got bits={linear.codes.bits}: the nearest is bits={nearest}"
        )


def check_whole_groups(linear: Grid) -> None:
    """Raises ValueError where the last group is shorter than the others."""
    K = linear.codes.size
    if K % linear.group_size:
        nearest = math.gcd(K, linear.group_size)
        raise ValueError(
            f"group_size must divide the inputs, got group_size={linear.group_size}, K={K}: "
            f"the nearest is group_size={nearest}"
        )


def rounded(w: Weight, bits: Sequence[int], *, whole_groups: bool) -> Affine:
    """The weight on a min-max grid that a scheme can hold: plain rounding, in groups as it had.

    bits: the widths there are; the least that holds the weight's codes is taken, else the greatest. Codes
    that only need more bits stay as they are.
    """
    inner = innermost(w)
    width, K = least_bits(bits_of(inner), bits), w.shape[0]
    group_size = min(getattr(inner, "group_size", GROUP_SIZE), K)
    if whole_groups:
        group_size = math.gcd(K, group_size)
    if isinstance(w, Affine) and w.codes.bits < width and w.group_size == group_size:
        try:
            linear = Grid.of([w])
        except ValueError:
            pass  # its zero points or scales need rounding, too
        else:
            codes = pack(codes_of(linear.codes), width)
            linear = dataclasses.replace(linear, codes=codes, zero_point=linear.zeros)
            return jax.tree.map(jnp.asarray, linear.part(0, w.shape[1], w.dtype))
    symmetric = isinstance(inner, Affine) and inner.zero_point is None
    made = affine.quantize(read_rows(w).T, bits=width, group_size=group_size, symmetric=symmetric)
    return dataclasses.replace(made, dtype=w.dtype)


def innermost(w: Any) -> Any:
    """The stored weight inside others: of an order, of scaled or rotated inputs, of a residual."""
    while (inner := getattr(w, "weight", getattr(w, "base", None))) is not None:
        w = inner
    return w


def bits_of(w: Any) -> int:
    """Bits of a weight's codes, of mixed ones the greatest; 8 for what has none."""
    match w:
        case Affine() | BlockAffine() | Codebook():
            return w.codes.bits
        case BitPlanes():
            return w.bits
        case MixedColumns():
            return 4
        case _:
            return 8


def read_rows(w: Weight) -> jax.Array:
    """All that is stored of a weight as float32 rows [N, K], the residual of a base included."""
    rows = w.dequantize_rows(jnp.float32)
    if isinstance(w, HostResidual):
        codes = jax.device_put(w.codes, jax.memory.Space.Device)
        rows = rows + (host_residual.decode(codes) * w.scale[None]).T
    return rows
