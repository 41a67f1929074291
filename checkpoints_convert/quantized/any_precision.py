"""Any-Precision's checkpoints (SNU-ARC/any-precision-llm), read and written; the order of their bits."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt32

from checkpoints_convert.json_fields import OBJECT, check_fields, null_or
from checkpoints_convert.quantized.affine import bits_of, innermost, read_rows
from checkpoints_convert.quantized.config import layers_by_linear, whole_number
from checkpoints_convert.quantized.words import Shapes, Tensors, codes_of, on_host, words_of
from jaxllm.storage.metadata import excerpt
from jaxllm.weights import bit_planes, codebook
from jaxllm.weights.bit_planes import CODES_PER_WORD, BitPlanes
from jaxllm.weights.codebook import Codebook
from jaxllm.weights.sparse import DenseAndSparse
from jaxllm.weights.weight import Weight


@dataclasses.dataclass(frozen=True)
class Planes:
    """A linear in bit planes."""

    planes: np.ndarray  # uint32 [B, N, K / 32]
    tables: tuple[np.ndarray, ...]  # float16 [N, 2**b], narrowest first
    seed: int

    def part(self, start: int, stop: int, dtype) -> BitPlanes:
        B, _, words = self.planes.shape
        return on_host(
            BitPlanes,
            planes=self.planes[:, start:stop],
            tables=tuple(table[start:stop] for table in self.tables),
            bits=B,
            seed_bits=self.seed,
            parent_bits=B,
            shape=(32 * words, stop - start),
            dtype=dtype,
        )


@dataclasses.dataclass(frozen=True)
class AnyPrecision:
    """Any-Precision's files: all widths from `seed` to `parent` bits; read at `parent`."""

    seed: int
    parent: int
    name: ClassVar[str] = "any-precision"
    main: ClassVar[str] = "qweight"
    optional: ClassVar[tuple[str, ...]] = ()
    transposes: ClassVar[bool] = False

    @classmethod
    def from_config(cls, given: dict[str, Any]) -> "AnyPrecision":
        """What `anyprec` says; ValueError for what is not supported."""
        widths = tuple(range(1, 9))
        parent = whole_number(given, "parent_precision", allowed=widths)
        seed = whole_number(given, "seed_precision", allowed=widths[:parent])
        check_fields("anyprec", given, {"sparse_numvals": null_or(OBJECT)})
        if given.get("group_count", 1) != 1 or given.get("sparse_numvals"):
            raise ValueError(
                "huggingface.load: anyprec must have one table a row and no sparse part, "
                f"got group_count={excerpt(given.get('group_count', 1))}, "
                f"sparse_numvals of {len(given.get('sparse_numvals') or ())} linears"
            )
        return cls(seed, parent)

    @classmethod
    def holding(cls, parts: Sequence[Weight]) -> "AnyPrecision":
        """The scheme of a linear in which these weights are stacked; ValueError for one that it cannot hold.

        A table of one width is seed and parent in one.
        """
        widths = set()
        for w in parts:
            match w:
                case BitPlanes():
                    widths.add((w.seed_bits, w.parent_bits))
                case Codebook():
                    widths.add((w.codes.bits, w.codes.bits))
                case DenseAndSparse():
                    raise ValueError(
                        "its layout has no sparse part: weights must be tables alone (outliers=None), "
                        f"got {type(w).__name__}"
                    )
                case _:
                    raise ValueError(
                        "weights must be tables, as of SqueezeLlm, Lnq and AnyPrecision, "
                        f"got {type(w).__name__}"
                    )
        if len(widths) > 1:
            raise ValueError("parts of one of their linears must have the same widths")
        ((seed, parent),) = widths
        return cls(seed, parent)

    @classmethod
    def round(cls, w: Weight) -> Codebook | BitPlanes:
        """The weight in tables of even steps from each output's least weight to its greatest.

        Tables around which weights were kept apart stay, and each of these takes its nearest level.
        """
        if isinstance(w, DenseAndSparse) and isinstance(w.base, Codebook | BitPlanes):
            return _without_kept(w, w.base)
        bits, rows = bits_of(innermost(w)), read_rows(w)
        steps = jnp.linspace(0.0, 1.0, 2**bits)[None]
        low, high = rows.min(1, keepdims=True), rows.max(1, keepdims=True)
        return codebook.encode(rows, low + (high - low) * steps, bits=bits, dtype=w.dtype)

    @classmethod
    def to_config(cls, ways: dict[str, "AnyPrecision"], dense: Sequence[str]) -> dict[str, Any]:
        """The `anyprec` of linears stored so and of dense ones, by their names.

        The authors' loader puts the same modules in every layer, knows one pair of widths, and needs
        `sparse_numvals` (of whose linears weights are added to the tables' levels) also where it is empty.
        """
        linears = layers_by_linear(ways)
        if "" in linears:
            raise ValueError(f"linears must be of layers, got {min(linears[''])} in tables")
        everywhere = layers_by_linear((*ways, *dense))
        everywhere.pop("", None)
        layers = set().union(*everywhere.values())
        places = {tuple(layer.rsplit(".", 2)[:2]) for layer in layers}  # "model", "layers"
        widths = {(way.seed, way.parent) for way in ways.values()}
        if len(places) != 1 or len(widths) != 1 or any(having != layers for having in linears.values()):
            raise ValueError(
                "the same linears and widths must be in every layer, "
                f"got {len(ways)} linears of widths {sorted(widths)}"
            )
        ((outer, inner),) = places
        ((seed, parent),) = widths
        arch = {"model_name": outer, "layers_name": inner, "module_names": list(linears)}
        return {
            "seed_precision": seed,
            "parent_precision": parent,
            "group_count": 1,
            "arch_config": arch,
            "sparse_numvals": {},
        }

    def shapes(self, K: int, N: int) -> Shapes:
        shapes: Shapes = {"qweight": ((self.parent, N, words_of(K, 1)), ("I32",))}
        return shapes | {f"lut{b}": ((N, 2**b), ("F16",)) for b in range(self.seed, self.parent + 1)}

    def read(self, tensors: Tensors, K: int, N: int) -> Planes:
        tables = tuple(tensors[f"lut{b}"] for b in range(self.seed, self.parent + 1))
        return Planes(from_cuda_planes(tensors["qweight"], K), tables, self.seed)

    @property
    def written(self) -> tuple[str, ...]:
        """The last names of all tensors that are written."""
        return "qweight", *(f"lut{b}" for b in range(self.seed, self.parent + 1))

    def write(self, parts: Sequence[Weight], last: str) -> np.ndarray:
        """One tensor of the linear in which these weights are stacked: `read` turned around."""
        if last == "qweight":
            planes = np.concatenate([np.asarray(_planes(w)) for w in parts], axis=1)
            return to_cuda_planes(planes, parts[0].shape[0])
        table = int(last.removeprefix("lut")) - self.seed
        return np.concatenate([np.asarray(_tables(w)[table]) for w in parts])


def _without_kept(w: DenseAndSparse, base: Codebook | BitPlanes) -> Codebook | BitPlanes:
    widest = base if isinstance(base, Codebook) else base.at(base.parent_bits)
    codes, table = bit_planes.unpack(_planes(widest), w.shape[0]), _tables(widest)[-1]
    nearest = codebook.nearest(w.dequantize_rows(jnp.float32), table.astype(jnp.float32))
    codes = jnp.where(w.is_kept(), nearest.astype(codes.dtype), codes)
    if isinstance(base, Codebook):
        return codebook.from_codes(codes, table, bits=base.codes.bits, dtype=w.dtype)
    return bit_planes.from_codes(codes, base.tables, bits=base.bits, dtype=w.dtype)


def _planes(w: Any) -> Any:
    return bit_planes.pack(codes_of(w.codes), w.codes.bits) if isinstance(w, Codebook) else w.planes


def _tables(w: Any) -> Any:
    return (w.table,) if isinstance(w, Codebook) else w.tables


def to_cuda_planes(planes: UInt32[Array | np.ndarray, "B N W"], K: int) -> Int32[np.ndarray, "B N W"]:
    """The planes as the authors' `qweight`; on the host."""
    there, mirrored = _cuda_bytes(K), _mirror()
    out = np.empty((*planes.shape[:2], K // 8), np.uint8)
    out[..., there] = mirrored[np.ascontiguousarray(planes).astype("<u4").view(np.uint8)]
    return out.view("<i4").astype(np.int32)


def from_cuda_planes(qweight: Int32[Array | np.ndarray, "B N W"], K: int) -> UInt32[np.ndarray, "B N W"]:
    """The inverse of `to_cuda_planes`."""
    there, mirrored = _cuda_bytes(K), _mirror()
    found = np.ascontiguousarray(qweight).astype("<i4").view(np.uint8)
    return np.ascontiguousarray(mirrored[found[..., there]]).view("<u4").astype(np.uint32)


def _cuda_bytes(K: int) -> np.ndarray:
    """Where the byte of columns 8 q .. 8 q + 7 lies in a row of theirs, for each q.

    In a tile of 1,024 columns (32 T in a short last one), word t holds columns 8 (t + j T) .. + 7 as its byte
    j = 0 .. 3 from the high end, each byte mirrored.
    """
    if K % CODES_PER_WORD:
        raise ValueError(f"any_precision: the CUDA layout needs K divisible by {CODES_PER_WORD}, got {K=}")
    q = np.arange(K // 8)
    tile = q // 128
    T = np.minimum(32, (K - 1024 * tile) // 32)
    j, t = (q - 128 * tile) // T, (q - 128 * tile) % T
    return 4 * (32 * tile + t) + 3 - j


def _mirror() -> np.ndarray:
    return np.packbits(
        np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1), axis=1, bitorder="little"
    )[:, 0]
