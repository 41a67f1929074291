"""The paper's interleaved words of 2/4/16-bit weights (arXiv:2311.16442v4), an exact import and export.

    small = jl.quantize(model, jl.MixedTwoBit(narrow_steps=True), tokens)
    words = to_interleaved(linear_weights(small)["layers.0.mlp.up"])

Two of three neighbouring groups at 2 bits have 3 bits for their steps there: `narrow_steps` fits them so.

Letters: K inputs, N outputs, C = ceil(K / 16) column groups, n2 and n4 of them at 2 and 4 bits, B = ceil(N /
16) blocks of outputs.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.weights.mixed_columns import FOUR_BIT_FIELDS, TWO_BIT_FIELDS, MixedColumns
from pallas_kernels.mixed_two_bit_gemm.reference import (
    INPUTS_PER_GROUP,
    OUTPUTS_PER_BLOCK,
    block_rows,
    by_output,
    nibbles,
)
from pallas_kernels.words import from_words, to_words


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """A weight as the paper's figure draws it, column groups in their natural order, on the host.

    Three neighbouring groups at 2 bits share a word of 16 bits an output, and one a block of 16 outputs:

        words   zero 2 | 2 | 2    step 3 | 3 | 4                                bits 0-5, 6-15
        zeros   step_zero 3 | - | 3 | - | 4 | 4 unused                          bits 0-2, 4-6, 8-11
    """

    main: np.ndarray  # uint32 [C, N]: 16 codes of 2 bits, or the first 8 of 4 bits
    side: np.ndarray  # uint32 [n4, N]: the other 8
    side_index: np.ndarray  # int32 [C]: row of `side`, -1 at 2 bits
    words: np.ndarray  # uint16 [ceil(n2 / 3), N]
    zeros: np.ndarray  # uint16 [ceil(n2 / 3), B]
    scales: np.ndarray  # float16 [n2, B]
    four_scale: np.ndarray  # float16 [G, N]
    four_zero_point: np.ndarray  # uint8 [G, N]
    values: np.ndarray  # float16 [nonzeros]: residuals by output, then by input
    columns: np.ndarray  # uint16 [nonzeros]
    row_starts: np.ndarray  # int32 [N + 1]
    spare: int  # places for outliers in a block
    group4: int
    shape: tuple[int, int]
    dtype: object


def pack_words(zero_point: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Words of 16 bits from zeros and steps [..., 3]; the first two steps below 8."""
    z, s = zero_point.astype(np.uint16), step.astype(np.uint16)
    fields = [z[..., 0], z[..., 1] << 2, z[..., 2] << 4, s[..., 0] << 6, s[..., 1] << 9, s[..., 2] << 12]
    return functools.reduce(np.bitwise_or, fields)


def unpack_words(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Zeros and steps [..., 3] of the words."""
    zero_point = np.stack([words >> at & 3 for at in (0, 2, 4)], axis=-1)
    step = np.stack([words >> 6 & 7, words >> 9 & 7, words >> 12 & 15], axis=-1)
    return zero_point, step


def to_interleaved(w: MixedColumns) -> Interleaved:
    """The paper's layout of a weight. Raises ValueError where a step does not fit the 3 bits it has there."""
    N, C = w.shape[1], w.order.shape[0]
    order = np.asarray(w.order).astype(np.int64)
    n2, n4 = (0 if part is None else part.shape[1] for part in (w.two, w.four))
    side_index = np.full(C, -1, np.int32)
    side_index[order[n2:]] = np.arange(n4)
    main = np.zeros((C, N), np.uint32)
    side = np.zeros((n4, N), np.uint32)
    words, zeros = (
        np.zeros((-(-n2 // 3), N), np.uint16),
        np.zeros((-(-n2 // 3), -(-N // OUTPUTS_PER_BLOCK)), np.uint16),
    )
    scales = np.zeros((0, zeros.shape[1]), np.float16)
    if w.two is not None:
        assert w.step is not None and w.zero_point is not None and w.step_zero is not None
        main[order[:n2]] = np.asarray(w.two).T
        step = np.asarray(by_output(from_words(w.step, 4), N))
        zero_point = np.asarray(by_output(from_words(w.zero_point[..., None], 2), N))
        shared = np.asarray(nibbles(w.step_zero, n2))
        narrow = np.arange(n2) % 3 < 2
        worst = max(step[:, narrow].max(initial=0), shared[:, narrow].max(initial=0))
        if worst > 7:
            raise ValueError(
                f"to_interleaved: two of three steps must fit 3 bits (narrow_steps=True), got step={worst}"
            )
        words = pack_words(_threes(zero_point), _threes(step)).T
        three = _threes(shared).astype(np.uint16)
        zeros[:] = (three[..., 0] | three[..., 1] << 4 | three[..., 2] << 8).T
        scales = np.asarray(w.step_scale).T
    four_scale, four_zero_point = np.zeros((0, N), np.float16), np.zeros((0, N), np.uint8)
    if w.four is not None:
        assert w.four_zero_point is not None
        main[order[n2:]], side[:] = np.moveaxis(np.asarray(w.four), 2, 0).swapaxes(1, 2)
        four_scale = np.asarray(w.four_scale).T
        four_zero_point = np.asarray(by_output(from_words(w.four_zero_point, 4), N)).T.astype(np.uint8)
    values, columns, row_starts, spare = _to_rows(w, order, N)
    return Interleaved(
        main=main,
        side=side,
        side_index=side_index,
        words=words,
        zeros=zeros,
        scales=scales,
        four_scale=four_scale,
        four_zero_point=four_zero_point,
        values=values,
        columns=columns,
        row_starts=row_starts,
        spare=spare,
        group4=w.group4,
        shape=w.shape,
        dtype=w.dtype,
    )


def from_interleaved(layout: Interleaved) -> MixedColumns:
    """The weight of a paper's layout: the inverse of `to_interleaved`."""
    N, C = layout.shape[1], layout.main.shape[0]
    wide = layout.side_index >= 0
    order = np.argsort(wide, kind="stable")
    n4 = int(wide.sum())
    n2, B = C - n4, -(-N // OUTPUTS_PER_BLOCK)
    fields: dict[str, Any] = dict.fromkeys((*TWO_BIT_FIELDS, *FOUR_BIT_FIELDS, "outlier", "place"))

    def by_block(v: np.ndarray) -> np.ndarray:  # [N, n] -> [B, n, 16]
        v = np.pad(v, ((0, B * OUTPUTS_PER_BLOCK - N), (0, 0)))
        return v.reshape(B, OUTPUTS_PER_BLOCK, -1).swapaxes(1, 2)

    if n2:
        zero_point, step = (v.swapaxes(0, 1).reshape(N, -1)[:, :n2] for v in unpack_words(layout.words))
        three = np.stack([layout.zeros & 7, layout.zeros >> 4 & 7, layout.zeros >> 8 & 15], axis=-1)
        shared = three.swapaxes(0, 1).reshape(B, -1)[:, :n2].astype(np.uint8)
        shared = np.pad(shared, ((0, 0), (0, n2 % 2)))
        fields |= {
            "two": layout.main[order[:n2]].T,
            "step": to_words(jnp.asarray(by_block(step)), 4),
            "zero_point": to_words(jnp.asarray(by_block(zero_point)), 2)[..., 0],
            "step_zero": shared[:, ::2] | shared[:, 1::2] << 4,
            "step_scale": layout.scales.T,
        }
    if n4:
        fields |= {
            "four": np.stack([layout.main[order[n2:]], layout.side], axis=-1).swapaxes(0, 1),
            "four_scale": layout.four_scale.T,
            "four_zero_point": to_words(jnp.asarray(by_block(layout.four_zero_point.T)), 4),
        }
    if layout.spare:
        fields["outlier"], fields["place"] = _from_rows(layout, order, N)
    fields["order"] = order.astype(np.int16 if C < 2**15 else np.int32)
    arrays: dict[str, Any] = {name: None if v is None else jnp.asarray(v) for name, v in fields.items()}
    return MixedColumns(**arrays, group4=layout.group4, shape=layout.shape, dtype=layout.dtype)


def _threes(v: np.ndarray) -> np.ndarray:
    """[..., n] as [..., ceil(n / 3), 3], zeros at the end."""
    return np.pad(v, ((0, 0), (0, -v.shape[1] % 3))).reshape(v.shape[0], -1, 3)


def _to_rows(w: MixedColumns, order: np.ndarray, N: int):
    """Outliers in compressed rows, and the places of a block."""
    if w.outlier is None:
        return np.zeros(0, np.float16), np.zeros(0, np.uint16), np.zeros(N + 1, np.int32), 0
    W = order.size * INPUTS_PER_GROUP
    value, place = np.asarray(w.outlier), np.asarray(w.place).astype(np.int64)
    block, slot = np.nonzero(value)
    at = place[block, slot]
    row, inside = block * block_rows(W) + at // W, at % W
    column = order[inside // INPUTS_PER_GROUP] * INPUTS_PER_GROUP + inside % INPUTS_PER_GROUP
    by_row = np.lexsort((column, row))
    starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=N))]).astype(np.int32)
    return value[block, slot][by_row], column[by_row].astype(np.uint16), starts, value.shape[1]


def _from_rows(layout: Interleaved, order: np.ndarray, N: int) -> tuple[np.ndarray, np.ndarray]:
    """Residuals and their places by outlier block, from compressed rows."""
    W = order.size * INPUTS_PER_GROUP
    R = block_rows(W)
    row = np.repeat(np.arange(N), np.diff(layout.row_starts))
    column = layout.columns.astype(np.int64)
    at = (
        row % R * W
        + np.argsort(order)[column // INPUTS_PER_GROUP] * INPUTS_PER_GROUP
        + column % INPUTS_PER_GROUP
    )
    by_place = np.lexsort((at, row // R))
    block = (row // R)[by_place]
    slot = np.arange(block.size) - np.searchsorted(block, block)
    value = np.zeros((-(-N // R), layout.spare), np.float16)
    place = np.zeros(value.shape, np.uint16)
    value[block, slot], place[block, slot] = layout.values[by_place], at[by_place]
    return value, place
