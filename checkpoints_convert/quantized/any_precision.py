"""Any-Precision's checkpoints (SNU-ARC/any-precision-llm), read and written; the order of their bits."""

import dataclasses
import functools
import re
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Int32, UInt32

from checkpoints_convert import tensor_files
from checkpoints_convert.families.family import Tensor, stem
from checkpoints_convert.json_fields import OBJECT, check_fields, null_or
from checkpoints_convert.quantized.config import whole_number
from checkpoints_convert.quantized.words import Shapes, Tensors, on_host, words_of
from jaxllm.storage.metadata import excerpt
from jaxllm.weights.bit_planes import CODES_PER_WORD, BitPlanes


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

    def shapes(self, K: int, N: int) -> Shapes:
        shapes: Shapes = {"qweight": ((self.parent, N, words_of(K, 1)), ("I32",))}
        return shapes | {f"lut{b}": ((N, 2**b), ("F16",)) for b in range(self.seed, self.parent + 1)}

    def read(self, tensors: Tensors, K: int, N: int) -> Planes:
        tables = tuple(tensors[f"lut{b}"] for b in range(self.seed, self.parent + 1))
        return Planes(from_cuda_planes(tensors["qweight"], K), tables, self.seed)


def any_precision_entries(tensor: Tensor, parts: list[BitPlanes]) -> list[tensor_files.Tensor]:
    """The tensors of a linear, of which `parts` are stacked along the outputs."""
    w, K = parts[0], parts[0].shape[0]
    if tensor.transposed:
        raise ValueError(f"huggingface.save: any-precision has no [in, out] matrices, got {tensor.theirs}")
    if K % 32:
        raise ValueError(
            f"huggingface.save: any-precision needs K divisible by 32, got {tensor.theirs} of {K=}"
        )
    if any(p.parent_bits != w.parent_bits or p.seed_bits != w.seed_bits for p in parts):
        raise ValueError(f"huggingface.save: all parts of {tensor.theirs} must have the same widths")
    N = sum(part.shape[1] for part in parts)

    def planes() -> np.ndarray:
        return to_cuda_planes(np.concatenate([np.asarray(part.planes) for part in parts], axis=1), K)

    def table(i: int) -> np.ndarray:
        return np.concatenate([np.asarray(part.tables[i]) for part in parts])

    B, dtype = w.parent_bits, np.dtype("<f2")
    entries: list[tensor_files.Tensor] = [
        (f"{stem(tensor)}.qweight", (B, N, K // 32), np.dtype("<i4"), planes)
    ]
    for i, b in enumerate(range(w.seed_bits, B + 1)):
        entries.append((f"{stem(tensor)}.lut{b}", (N, 2**b), dtype, functools.partial(table, i)))
    return entries


def any_precision_config(quantized: dict[str, BitPlanes], names: list[str]) -> dict[str, Any]:
    """The `anyprec` of config.json, from their names of the linears in bit planes and of all tensors.

    The authors' loader puts the same modules in every layer and knows one pair of widths.
    """
    pattern = re.compile(r"(.+?)\.(\w+)\.(\d+)\.(.+)\.weight")
    modules: dict[str, set[str]] = {}  # the layers that have each
    for name in quantized:
        match = pattern.fullmatch(name)
        if match is None:
            raise ValueError(f"huggingface.save: any-precision quantizes linears of layers, got {name}")
        modules.setdefault(match[4], set()).add(f"{match[1]}.{match[2]}.{match[3]}")
    layers = {f"{match[1]}.{match[2]}.{match[3]}" for match in map(pattern.fullmatch, names) if match}
    places = {layer.rpartition(".")[0].rpartition(".")[::2] for layer in layers}
    widths = {(w.seed_bits, w.parent_bits) for w in quantized.values()}
    if len(places) != 1 or len(widths) != 1 or any(having != layers for having in modules.values()):
        raise ValueError(
            "huggingface.save: any-precision needs the same linears and widths in every layer, "
            f"got {len(quantized)} linears of widths {sorted(widths)}"
        )
    ((outer, inner),) = places
    ((seed, parent),) = widths
    arch = {"model_name": outer, "layers_name": inner, "module_names": list(modules)}
    return {"seed_precision": seed, "parent_precision": parent, "group_count": 1, "arch_config": arch}


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
