"""Any-Precision's checkpoints (SNU-ARC/any-precision-llm), read and written; the order of their bits."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt32

from checkpoints_convert.json_fields import COUNT, OBJECT, check_fields, null_or
from checkpoints_convert.quantized.affine import bits_of, innermost, read_rows
from checkpoints_convert.quantized.config import layers_by_linear, whole_number
from checkpoints_convert.quantized.sparse_rows import SparseRows
from checkpoints_convert.quantized.words import Shapes, Tensors, codes_of, on_host, words_of
from jaxllm.storage.metadata import excerpt
from jaxllm.weights import codebook, sparse
from jaxllm.weights.codebook import Codebook
from jaxllm.weights.planes import bit_planes
from jaxllm.weights.planes.bit_planes import CODES_PER_WORD, BitPlanes
from jaxllm.weights.sparse import DenseAndSparse
from jaxllm.weights.weight import Weight

SPARSE = ("rows", "cols", "vals")


@dataclasses.dataclass(frozen=True)
class Planes:
    """A linear in bit planes."""

    planes: np.ndarray  # uint32 [B, N, K / 32]
    tables: tuple[np.ndarray, ...]  # float16 [N, 2**b], narrowest first
    seed: int
    added: SparseRows | None = None

    def part(self, start: int, stop: int, dtype) -> BitPlanes | DenseAndSparse:
        B, _, words = self.planes.shape
        base = on_host(
            BitPlanes,
            planes=self.planes[:, start:stop],
            tables=tuple(table[start:stop] for table in self.tables),
            bits=B,
            seed_bits=self.seed,
            parent_bits=B,
            shape=(32 * words, stop - start),
            dtype=dtype,
        )
        return base if self.added is None else self.added.part(base, start, stop)


@dataclasses.dataclass(frozen=True)
class AnyPrecision:
    """Any-Precision's files: all widths from `seed` to `parent` bits; read at `parent`.

    added: how many single weights are added to the levels of a linear, None where files have no such part.
    """

    seed: int
    parent: int
    added: int | None = None
    name: ClassVar[str] = "any-precision"
    main: ClassVar[str] = "qweight"
    transposes: ClassVar[bool] = False

    @property
    def optional(self) -> tuple[str, ...]:
        """The last names of tensors that may be absent."""
        return SPARSE if self.added == 0 else ()

    @classmethod
    def from_config(cls, given: dict[str, Any]) -> "AnyPrecision | BySparse":
        """What `anyprec` says; ValueError for what is not supported."""
        widths = tuple(range(1, 9))
        parent = whole_number(given, "parent_precision", allowed=widths)
        seed = whole_number(given, "seed_precision", allowed=widths[:parent])
        check_fields("anyprec", given, {"sparse_numvals": null_or(OBJECT)})
        if given.get("group_count", 1) != 1:
            got = excerpt(given["group_count"])
            raise ValueError(f"huggingface.load: anyprec must have one table a row, got group_count={got}")
        counts = given.get("sparse_numvals") or {}
        check_fields("sparse_numvals", counts, dict.fromkeys(counts, COUNT))
        return BySparse(counts, cls(seed, parent)) if counts else cls(seed, parent)

    @staticmethod
    def is_of_tables(w: Any) -> bool:
        """Whether a weight is of tables, beside which single weights may be kept."""
        return isinstance(w.base if isinstance(w, DenseAndSparse) else w, BitPlanes | Codebook)

    @classmethod
    def holding(cls, parts: Sequence[Weight]) -> "AnyPrecision":
        """The scheme of a linear in which these weights are stacked; ValueError for one that it cannot hold.

        A table of one width is seed and parent in one.
        """
        widths, added = set(), None
        for w in parts:
            if isinstance(w, DenseAndSparse) and w.added:
                added = (added or 0) + SparseRows.of_weight(w).cols.size
                w = w.base
            match w:
                case BitPlanes():
                    widths.add((w.seed_bits, w.parent_bits))
                case Codebook():
                    widths.add((w.codes.bits, w.codes.bits))
                case DenseAndSparse():
                    raise ValueError(
                        "weights must be tables alone (outliers=None), as its layout adds single weights to "
                        f"levels and puts none in their place, got {type(w).__name__}"
                    )
                case _:
                    raise ValueError(
                        "weights must be tables, as of SqueezeLlm, Lnq and AnyPrecision, "
                        f"got {type(w).__name__}"
                    )
        if len(widths) > 1:
            raise ValueError("parts of one of their linears must have the same widths")
        ((seed, parent),) = widths
        return cls(seed, parent, added)

    @classmethod
    def round(cls, w: Weight) -> Codebook | DenseAndSparse:
        """The weight in tables of even steps from each output's least weight to its greatest.

        Tables beside which weights are kept stay; of these what the widest table lacks is added to it.
        """
        if isinstance(w, DenseAndSparse) and cls.is_of_tables(w):
            return _added_to(w.base, w)
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
            "sparse_numvals": {name: way.added for name, way in ways.items() if way.added},
        }

    def shapes(self, K: int, N: int) -> Shapes:
        shapes: Shapes = {"qweight": ((self.parent, N, words_of(K, 1)), ("I32",))}
        shapes |= {f"lut{b}": ((N, 2**b), ("F16",)) for b in range(self.seed, self.parent + 1)}
        if self.added is None:
            return shapes
        n = (self.added,)
        return shapes | {"rows": ((N + 1,), ("I32",)), "cols": (n, ("I32",)), "vals": (n, ("F16",))}

    def read(self, tensors: Tensors, K: int, N: int) -> Planes:
        tables = tuple(tensors[f"lut{b}"] for b in range(self.seed, self.parent + 1))
        added = SparseRows.of_tensors(tensors, K, N) if tensors.keys() >= set(SPARSE) else None
        return Planes(from_cuda_planes(tensors["qweight"], K), tables, self.seed, added)

    @property
    def written(self) -> tuple[str, ...]:
        """The last names of all tensors that are written."""
        return (
            "qweight",
            *(f"lut{b}" for b in range(self.seed, self.parent + 1)),
            *(SPARSE if self.added else ()),
        )

    def write(self, parts: Sequence[Weight], last: str) -> np.ndarray:
        """One tensor of the linear in which these weights are stacked: `read` turned around."""
        if last in SPARSE:
            return getattr(SparseRows.stacked([_sparse(w) for w in parts]), last)
        parts = [w.base if isinstance(w, DenseAndSparse) else w for w in parts]
        if last == "qweight":
            planes = np.concatenate([np.asarray(_planes(w)) for w in parts], axis=1)
            return to_cuda_planes(planes, parts[0].shape[0])
        table = int(last.removeprefix("lut")) - self.seed
        return np.concatenate([np.asarray(_tables(w)[table]) for w in parts])


@dataclasses.dataclass(frozen=True)
class BySparse:
    """Any-Precision's files in which single weights are added to the levels of some linears.

    counts: how many, by linear (`sparse_numvals`).
    """

    counts: dict[str, int]
    rest: AnyPrecision
    name: ClassVar[str] = AnyPrecision.name
    main: ClassVar[str] = AnyPrecision.main
    transposes: ClassVar[bool] = AnyPrecision.transposes

    @property
    def schemes(self) -> tuple[AnyPrecision, ...]:
        """All of them."""
        return self.rest, dataclasses.replace(self.rest, added=0)

    def scheme_of(self, linear: str) -> AnyPrecision:
        """How one linear is stored, which the files have as a quantized one."""
        return dataclasses.replace(self.rest, added=self.counts.get(linear))


def _added_to(base: Codebook | BitPlanes, w: DenseAndSparse) -> DenseAndSparse:
    """The weight, of which what the widest table lacks is added: there it has the levels nearest to 0."""
    kept, rows = w.is_kept(), w.dequantize_rows(jnp.float32)
    widest = base if isinstance(base, Codebook) else base.at(base.parent_bits)
    table = _tables(widest)[-1].astype(jnp.float32)
    codes = bit_planes.unpack(_planes(widest), w.shape[0]).astype(jnp.int32)
    codes = jnp.where(kept, codebook.nearest(jnp.zeros_like(rows), table), codes)
    lacks = jnp.where(kept, rows - codebook.look_up(table, codes), 0.0)
    if isinstance(base, Codebook):
        made: Any = codebook.from_codes(codes, table, bits=base.codes.bits, dtype=w.dtype)
    else:
        made = bit_planes.from_codes(codes, base.tables, bits=base.bits, dtype=w.dtype)
    values, places = sparse.pack(lacks, w.kept.shape[1])
    return DenseAndSparse(made, values, places, added=True)


def _sparse(w: Any) -> SparseRows:
    return SparseRows.of_weight(w) if isinstance(w, DenseAndSparse) else SparseRows.none(w.shape[1])


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
