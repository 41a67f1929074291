"""Hugging Face directories to our models and back: config.json, safetensors, tokenizer.

    model, tokenizer = load("path/to/Llama-3.2-1B")
    save(model, tokenizer, "out")                          # transformers reads it
    save(small, tokenizer, "out", scheme="gptq")           # what serves GPTQ reads it

Reading goes tensor by tensor from the mapped files straight to each leaf's sharding, so the host
holds at most the model and one tensor; numbers keep their type (float64 becomes float32). Writing
gives the tensors back byte for byte. Pickled files are opened only where asked. Which tensor is which leaf is
told by tables (`families/`); one loop serves all (`build_model.py`). Linears that another tool quantized stay
so, and are written so where asked (`quantized/`).
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert import pickle_files, tensor_files
from checkpoints_convert.build_model import build_model
from checkpoints_convert.families import experts, gpt, llama_line, t5
from checkpoints_convert.families.family import Family, Tensor, stem, tensors_of
from checkpoints_convert.json_fields import TOKENS, check_fields, read_object
from checkpoints_convert.materialize import named_weights
from checkpoints_convert.quantized import export
from checkpoints_convert.quantized import scheme as quantized
from jaxllm.storage.directory import new_directory
from jaxllm.storage.metadata import excerpt
from jaxllm.storage.tokenizer import load_tokenizer

FAMILIES: tuple[Family, ...] = (*llama_line.FAMILIES, *experts.FAMILIES, *gpt.FAMILIES, *t5.FAMILIES)

# What is fetched from the hub.
PATTERNS = ["*.json", "*.safetensors", "*.model", "merges.txt", "*.jinja"]
NOT_FETCHED = ["*/*", "consolidated*"]  # folders of other formats, Mistral's second copy

UnsafeFormat = Literal["pickle"]


def load(
    path_or_id,
    *,
    dtype=None,
    mesh=None,
    mapped=False,
    revision=None,
    local_files_only=False,
    unsafe_format: UnsafeFormat | None = None,
):
    """The model of a Hugging Face directory or hub id, and its tokenizer (None if it has none).

    dtype: what all weights are cast to; None keeps the file's types. Quantized ones stay as they are.
    mesh: the model is sharded over it. mapped: weights that need no cast stay in the files (`jaxllm.files`).
    revision, local_files_only: for hub ids.
    unsafe_format: "pickle" reads `pytorch_model.bin` in place of safetensors, running nothing of it
      (`pickle_files`).

    Raises FileNotFoundError where nothing is found, ValueError where files cannot be read or contradict each
    other, in one line. Warns where they contradict each other and transformers has a rule.

    The tokenizer is the checkpoint's own: whether `encode` puts a begin token in front is its
    policy, and `apply_chat_template` has its chat template. End tokens (generation_config.json,
    else config.json) are in `model.config.stop_tokens`.
    """
    patterns = [*PATTERNS, "*.bin"] if unsafe_format else PATTERNS
    path = directory(path_or_id, revision=revision, local_files_only=local_files_only, patterns=patterns)
    family, raw = read_config(path)
    scheme = quantized.scheme_of(raw)
    found = open_tensors(path, unsafe_format)
    found = found if family.usual is None else family.usual(found)
    check_layers(family, raw, len(found))
    config = translate(family, raw, path)
    model = build_model(family, config, found, dtype=dtype, mesh=mesh, mapped=mapped, scheme=scheme)
    return model, load_tokenizer(path)


def open_tensors(path: Path, unsafe_format: UnsafeFormat | None) -> dict[str, np.ndarray]:
    """Each tensor of a directory: of its safetensors, or, only where it is asked for, of its pickles."""
    if unsafe_format is None:
        return tensor_files.open_directory(path)
    if unsafe_format != "pickle":
        raise ValueError(f"huggingface.load: unsafe_format must be 'pickle' or None, got {unsafe_format!r}")
    return pickle_files.open_directory(path)


def directory(path_or_id, *, revision=None, local_files_only=False, patterns=PATTERNS) -> Path:
    """The local directory of a checkpoint; of a hub id, the files of these patterns are fetched first."""
    path = Path(path_or_id)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path_or_id)):
        raise FileNotFoundError(f"huggingface.load: no such directory or hub id, got {str(path_or_id)!r}")
    from huggingface_hub import snapshot_download

    try:
        local = snapshot_download(
            str(path_or_id),
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=patterns,
            ignore_patterns=NOT_FETCHED,
        )
    except Exception as error:  # offline, unknown, gated: many types, one meaning
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            "huggingface.load: no such directory, and the hub did not give it, "
            f"got {str(path_or_id)!r}: {reason}"
        ) from error
    return Path(local)


def read_config(path: Path) -> tuple[Family, dict[str, Any]]:
    """The family of a directory and its config.json, defaults filled in and all keys checked."""
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"huggingface.load: no config.json in {str(path)!r}")
    raw = read_object(file)
    kind = raw.get("model_type")
    family = next((family for family in FAMILIES if family.model_type == kind), None)
    if family is None:
        supported = ", ".join(family.model_type for family in FAMILIES)
        raise ValueError(f"huggingface.load: model_type must be one of {supported}, got {excerpt(kind)}")
    raw = family.defaults | (raw if family.flat is None else family.flat(raw))
    check_fields(f"config.json of {family.model_type}", raw, family.fields)
    return family, raw


def check_layers(family: Family, raw: dict[str, Any], tensors: int) -> None:
    """Raises ValueError where config.json has more layers, or experts, than the files have tensors.

    Said before anything is made for each: a number in a file must not fill the memory.
    """
    for name in family.layers:
        if (raw[name] or 0) > tensors:
            raise ValueError(
                f"huggingface.load: {name} must be at most the number of tensors in the files, "
                f"got {raw[name]}, {tensors} tensors"
            )


def model_type_of(path_or_id) -> str | None:
    """What a directory or hub id already read is written as again; None for any other source."""
    path = Path(path_or_id)
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        return None
    family, _ = read_config(directory(path_or_id, local_files_only=True))
    return "gemma3_text" if family.model_type == "gemma3" else family.model_type


def translate(family: Family, raw: dict[str, Any], path: Path):
    """Our config, end tokens included."""
    config = family.config(raw)
    end = raw.get("eos_token_id")
    file = path / "generation_config.json"
    if file.is_file():
        generation = read_object(file)
        check_fields(file.name, generation, {"eos_token_id": TOKENS})
        end = generation.get("eos_token_id", end)
    ends = () if end is None else tuple(end) if isinstance(end, list) else (end,)
    return dataclasses.replace(config, stop_tokens=ends)


def family_of(model, model_type: str | None = None) -> Family:
    """The family a model is written as: the one named, else the first that can say its config."""
    config = dataclasses.replace(model.config, stop_tokens=())
    named = [f for f in FAMILIES if model_type in (None, f.model_type)]
    for family in named:
        if isinstance(model, family.model) and _says(family, config):
            return family
    names = ", ".join(family.model_type for family in named) or model_type
    raise ValueError(f"huggingface.save: no family can describe this config: tried {names}")


def _says(family: Family, config) -> bool:
    """Whether writing the config as this family and reading it again gives it back."""
    try:
        read = family.config(family.defaults | family.to_hf_config(config))
    except (ValueError, KeyError):
        return False
    # one may load a model for longer texts than its files say, and those of yarn say it by their factor
    return dataclasses.replace(read, context=config.context) == config


def save(
    model,
    tokenizer,
    path,
    *,
    model_type: str | None = None,
    scheme: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory that transformers (and `load`) reads: config, weights, tokenizer.

    model_type: the family to write; None takes the first that can say the model's config ("llama"
      for most). A model loaded as phi3 is written with phi3's fused tensors only when this says so.
    scheme: how quantized linears are written, "gptq" (its second version), "awq", "compressed-tensors" or
      "any-precision" (`quantized/scheme.py`), exactly or not at all. None is for dense models, and writes
      bit planes and codebooks as any-precision.
    max_shard_bytes: of weights in one file; more go to several files and an index.

    Any-Precision's weights are written with all their widths; read again, they are at the widest.

    Raises ValueError for weights that the scheme cannot hold, with the nearest setting that it can, or a
    config that no family can say; FileExistsError for a `path` that exists.
    """
    family = family_of(model, model_type)
    weights = named_weights(model)
    tensors = tensors_of(family, weights)
    if scheme is None and any(quantized.AnyPrecision.is_of_tables(w) for w in weights.values()):
        scheme = quantized.AnyPrecision.name
    if not family.coded_experts:
        _check_experts(family, tensors, weights)
    head = next(row.theirs for row in family.rows if row.ours == ("head.w",)).removesuffix(".weight")
    block, ways = ({}, {}) if scheme is None else export.plan(scheme, tensors, weights, head)
    entries = [entry for tensor in tensors for entry in _entries(tensor, weights, ways)]
    entries = entries if family.as_written is None else family.as_written(entries)
    dtype = model.dtype
    size = sum(tensor_files.num_bytes(shape, kind) for _, shape, kind, _ in entries)
    with new_directory(path, who="huggingface.save", num_bytes=size) as out:
        raw = config_json(family, model.config, tokenizer, jnp.dtype(dtype).name) | block
        _write_json(out / "config.json", raw)
        ends = {key: raw[key] for key in ("bos_token_id", "eos_token_id") if raw[key] is not None}
        _write_json(out / "generation_config.json", ends)
        tensor_files.write_directory(out, entries, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(out))


def config_json(family: Family, config, tokenizer, dtype: str) -> dict[str, Any]:
    """The config.json of a model."""
    ends = config.stop_tokens
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "pad_token_id": None if tokenizer is None else tokenizer.pad_token_id,
        **family.to_hf_config(config),
        "bos_token_id": None if tokenizer is None else tokenizer.bos_token_id,
        "eos_token_id": None if not ends else ends[0] if len(ends) == 1 else list(ends),
        "dtype": dtype,
    }


def _check_experts(family: Family, tensors: list[Tensor], weights: dict[str, Any]) -> None:
    """Raises ValueError for experts in codes."""
    for tensor in tensors:
        coded = [name for name in tensor.ours if not isinstance(weights[name], jax.Array)]
        if coded and ".experts." in tensor.theirs:
            raise ValueError(
                f"huggingface.save: experts of {family.model_type} must be dense, in codes (MXFP4) they are "
                f"read and not written: leave them so, or write the native layout, got "
                f"{type(weights[coded[0]]).__name__} at {coded[0]}"
            )


def _entries(
    tensor: Tensor, weights: dict[str, Any], ways: dict[str, quantized.WritableScheme]
) -> list[tensor_files.Tensor]:
    """How a tensor of theirs is written: name, shape, type, and what makes it in its turn."""
    parts = [weights[name] for name in tensor.ours]
    if (linear := stem(tensor)) in ways:
        return export.entries(linear, ways[linear], parts)
    for name, part in zip(tensor.ours, parts, strict=True):
        if not isinstance(part, jax.Array):
            schemes = ", ".join(quantized.SCHEMES)
            raise ValueError(
                "huggingface.save: only dense weights can be written as they are, and codes of linears by a "
                f"scheme ({schemes}), got {type(part).__name__} at {name}"
            )
    rows = sum(part.shape[0] for part in parts)
    shape = (rows, *parts[0].shape[1:])

    def read() -> np.ndarray:
        arrays = [np.asarray(part) for part in parts]
        value = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return value.T if tensor.transposed else value

    dtype = np.dtype(parts[0].dtype)
    if dtype not in tensor_files.FLOATS.values() or any(part.dtype != dtype for part in parts):
        raise ValueError(f"huggingface.save: {tensor.theirs} must be of one float type, got {dtype}")
    return [(tensor.theirs, shape[::-1] if tensor.transposed else shape, dtype, read)]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
