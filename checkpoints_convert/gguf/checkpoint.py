"""GGUF files, which llama.cpp reads and writes, to our models and back.

    model, tokenizer = load("Llama-3.2-1B-Q4_K_M.gguf")
    save(model, tokenizer, "out.gguf")                     # llama.cpp and transformers read it

Reading keeps the codes: block types become weights in affine codes (`blocks.py`), and no float matrix is
made. Writing rounds nothing either: what a block type can hold bit for bit is written in the smallest that
does (`encode.py`), plain weights in their own float type (norms and biases in float32, as llama.cpp demands);
all else is refused. The keys of the file are config.json in other words (`architectures.py`), so that the
families' tables serve here too.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert import huggingface
from checkpoints_convert.build_model import check_names, described, reader
from checkpoints_convert.families.family import Tensor, tensors_of
from checkpoints_convert.gguf import blocks
from checkpoints_convert.gguf.architectures import (
    ARCHITECTURES,
    FREQS,
    LONG,
    SHORT,
    Architecture,
    architecture_of,
    config_of,
    metadata_of,
    names_of,
    rows_in_order,
)
from checkpoints_convert.gguf.container import Blocks, Entry, File, open_file, write_file
from checkpoints_convert.gguf.encode import entry_of
from checkpoints_convert.gguf.tokenizer import read_tokenizer, stop_tokens_of, tokenizer_metadata
from checkpoints_convert.json_fields import check_fields
from checkpoints_convert.materialize import materialize, named_weights
from jaxllm.storage.directory import new_file
from jaxllm.storage.metadata import excerpt

FACTORS = (FREQS, LONG, SHORT)
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9}
FILE_TYPES |= {"Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18}  # what most weights are of


def load(path, *, dtype=None, mesh=None):
    """The model of a GGUF file and its tokenizer (None if it has none).

    dtype: what plain weights are cast to and coded ones stand for; None keeps the file's types, of coded ones
      float32. mesh: the model is sharded over it.

    Raises FileNotFoundError where there is no file, ValueError, in one line, for what cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"gguf.load: no such file, got path={str(path)!r}")
    require_package("gguf.load")
    file = open_file(path)
    arch = architecture_of(file.metadata)
    config = read_config(arch, file)
    model, leaves, wanted = described(arch.family, config)
    name_of = names_of(arch, config.layers)
    wanted = [Tensor(name_of(one.theirs), one.ours, False) for one in wanted]
    found: dict[str, Any] = {name: value for name, value in file.tensors.items() if name not in FACTORS}
    check_names(arch.family, found, wanted)
    coded = [one for one in wanted if isinstance(found[one.theirs], Blocks)]
    plain = reader(found, [one for one in wanted if one not in coded], leaves)
    formats, stands_for = {}, np.float32 if dtype is None else dtype
    for one in coded:
        formats |= _coded(arch, config, one, found[one.theirs], leaves, stands_for)
    model = materialize(model, partial(_plain, arch, config, plain), dtype=dtype, mesh=mesh, formats=formats)
    return model, read_tokenizer(file.metadata, config.vocab)


def require_package(who: str) -> None:
    """Raises ModuleNotFoundError, in one line, where the `gguf` package is not installed."""
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{who}: the gguf package must be installed: pip install 'jaxllm[gguf]'"
        ) from error


def read_config(arch: Architecture, file: File) -> Any:
    """Our config of a file, end tokens included."""
    parts = file.metadata.get("split.count", 1)
    if type(parts) is not int or parts != 1:
        raise ValueError(
            "gguf.load: a model must be in one file (llama-gguf-split --merge joins them), "
            f"got split.count={excerpt(parts)}"
        )
    factors: dict[str, np.ndarray] = {}
    for name in FACTORS:
        value = file.tensors.get(name)
        if isinstance(value, Blocks):
            raise ValueError(f"gguf.load: {name} must be of F32, got {value.kind.name}")
        if value is not None:
            factors[name] = value
    shapes = {name: value.shape for name, value in file.tensors.items()}
    raw = config_of(arch, file.metadata, shapes, factors)
    raw = arch.family.defaults | raw | {"eos_token_id": None}
    try:
        check_fields("the config", raw, arch.family.fields)
        huggingface.check_layers(arch.family, raw, len(shapes))
        config = arch.family.config(raw)
    except ValueError as error:  # said in the words of config.json
        why = str(error).removeprefix("huggingface.load: ")
        raise ValueError(f"gguf.load: the keys of {file.name} must make a config: {why}") from error
    return dataclasses.replace(config, stop_tokens=stop_tokens_of(file.metadata))


def _plain(arch: Architecture, config: Any, read: Callable, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A leaf as we have it, of what the file has."""
    value = rows_in_order(arch, config, name, read(name, shape))
    if arch.norm_offset and name.endswith("norm.scale"):
        return value.astype(np.float32) - arch.norm_offset
    return value


def _coded(
    arch: Architecture, config: Any, tensor: Tensor, given: Blocks, leaves: dict[str, Any], dtype
) -> dict[str, Any]:
    """Our weight for each leaf that is in a quantized tensor, on the host."""
    sizes = [leaves[name].shape for name in tensor.ours]
    must = (sum(size[0] for size in sizes), *sizes[0][1:])
    if given.shape != must:
        raise ValueError(f"gguf.load: {tensor.theirs} must have shape {must}, got {given.shape}")
    if len(must) != 2:
        raise ValueError(f"gguf.load: {tensor.theirs} must be of F32, F16 or BF16, got {given.kind.name}")
    weights, start = {}, 0
    for name, size in zip(tensor.ours, sizes, strict=True):
        rows = rows_in_order(arch, config, name, given.data[start : start + size[0]])
        weights[name] = blocks.read(given.kind, rows, dtype)
        start += size[0]
    return weights


def save(model, tokenizer, path, *, model_type: str | None = None) -> None:
    """Writes one file that llama.cpp (and `load`) reads: config, weights, tokenizer.

    model_type: the family to write; None takes the first that can say the model's config.
    Weights: plain ones in their type, `BlockAffine` as it was read, `Affine` in the smallest of Q4_0, Q5_0
    and Q8_0 that holds it bit for bit: group_size a multiple of 32 or all inputs, scales of float16, and a
    symmetric grid or whole zero points.

    Raises ValueError, in one line, for a model, a weight or a tokenizer that the format cannot hold,
    FileExistsError for a `path` that exists, OSError when the disk is full.
    """
    require_package("gguf.save")
    family = huggingface.family_of(model, model_type)
    arch = next((one for one in ARCHITECTURES if family in one.families), None)
    if arch is None:
        known = ", ".join(one.name for one in ARCHITECTURES)
        raise ValueError(f"gguf.save: the model must be one of {known}, got {family.model_type}")
    config = model.config
    weights = named_weights(model)
    name_of = names_of(arch, config.layers)
    entries = [
        entry_of(arch, config, Tensor(name_of(one.theirs), one.ours, False), weights)
        for one in tensors_of(family, weights)
    ]
    metadata, factors = metadata_of(arch, config, family.to_hf_config(config))
    for name, value in factors.items():
        entries.insert(0, Entry(name, "F32", value.shape, 4 * value.size, partial(value.astype, np.float32)))
    coded = [entry.kind for entry in entries if entry.kind in blocks.TYPES]
    kinds = coded or [entry.kind for entry in entries if len(entry.shape) > 1]
    most = max(sorted(set(kinds)), key=kinds.count)
    metadata = {
        "general.architecture": arch.name,
        "general.file_type": FILE_TYPES[most],
        "general.quantization_version": 2,
        **metadata,
        **tokenizer_metadata(tokenizer, config),
    }
    _check_said(arch, config, metadata, entries, factors)
    with new_file(path, who="gguf.save", num_bytes=sum(entry.num_bytes for entry in entries)) as file:
        write_file(file, metadata, entries)


def _check_said(
    arch: Architecture,
    config: Any,
    metadata: dict[str, Any],
    entries: list[Entry],
    factors: dict[str, np.ndarray],
) -> None:
    """Raises ValueError for what the file would not say of a config: it is read back before it is written."""
    shapes = {entry.name: entry.shape for entry in entries}
    float32 = {key: float(np.float32(v)) if isinstance(v, float) else v for key, v in metadata.items()}
    try:
        raw = arch.family.defaults | config_of(arch, float32, shapes, factors) | {"eos_token_id": None}
    except ValueError as error:
        why = str(error).removeprefix("gguf.load: ")
        raise ValueError(f"gguf.save: {arch.name} of llama.cpp cannot hold this model: {why}") from error
    read = arch.family.config(raw)
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(read, field.name)
        # one may load a model for longer texts than its files say; the tokenizer's keys say what ends a text
        if field.name in ("context", "stop_tokens") or ours == theirs:
            continue
        if field.name in ("rope", "local_rope") and _same_rope(
            ours or config.rope, theirs or read.rope, config
        ):
            continue
        if isinstance(ours, float) and isinstance(theirs, float) and math.isclose(ours, theirs, rel_tol=1e-6):
            continue
        raise ValueError(
            f"gguf.save: {arch.name} of llama.cpp has no place for {field.name}={excerpt(ours)}, which would "
            f"be read as {excerpt(theirs)}"
        )


def _same_rope(a, b, config) -> bool:
    """Whether two rotations turn alike, however they are described."""
    if a.rotary(config.head_dim) != b.rotary(config.head_dim):
        return False
    same = np.allclose(a.frequencies(config.head_dim), b.frequencies(config.head_dim), rtol=1e-6, atol=0)
    return bool(same) and math.isclose(a.attention_factor, b.attention_factor, rel_tol=1e-6)
