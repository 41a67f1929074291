"""Models from files and into files: one `load` for every source, one `save` for every layout.

    model, tokenizer = load()                          # the small model that ships
    model, tokenizer = load("org/name", dtype="bfloat16")
    save(model, "out/", tokenizer)
    model, tokenizer = load("out/")

Saving and loading a native directory (`native.py`) is lossless, for any weight format.

This is the only file that names `checkpoints_convert`, and only inside functions.
"""

import dataclasses
import importlib.resources
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from jaxllm.native import MANIFEST, load_native, save_native


def load(
    path_or_id=None,
    *,
    dtype=None,
    mesh=None,
    mapped: bool = False,
    verify: bool = True,
    context: int | None = None,
    revision=None,
    local_files_only: bool = False,
    unsafe_format: Literal["pickle"] | None = None,
):
    """A model and its tokenizer (None if it has none).

    path_or_id: a native directory, a Hugging Face directory, a GGUF file, a llama2.c `.bin` file, or an id
      on the Hugging Face hub; None is the model that ships.
    dtype: what weights are cast to, such as "bfloat16"; None keeps theirs. Only plain weights can
      be cast.
    mesh: where the model is sharded by its own table (`sharding.make_mesh`).
    mapped: what needs no cast and lies in safetensors files stays there as views, and is read whenever it is
      used: for `quantize`, which then never holds the whole. The files must stay as they are meanwhile.
    verify: compares the files of a native directory with their checksums before they are read.
    context: the longest text in tokens, in place of what the files say, longer or shorter. Models whose
      positions are a table have no more rows than they have, and only say so.
    revision, local_files_only: for hub ids.
    unsafe_format: "pickle" reads a directory's `pytorch_model.bin`, of which nothing is run and nothing but
      tensors is accepted; None never opens one.

    Errors are one line: FileNotFoundError where nothing is found, ValueError where what is found
    cannot be read.
    """
    dtype = None if dtype is None else float_type(dtype)
    if mapped and mesh is not None:
        raise ValueError("load: mapped weights lie in files, on no mesh: give one of mapped and mesh")
    if path_or_id is None:
        path_or_id = Path(str(importlib.resources.files("jaxllm") / "pico" / "target"))
        if not path_or_id.is_dir():
            raise FileNotFoundError("load: the model that ships is missing from this installation")
    path = Path(path_or_id)
    if unsafe_format is not None and ((path / MANIFEST).is_file() or path.is_file()):
        raise ValueError(f"load: unsafe_format is for directories of Hugging Face, got {str(path)!r}")
    if (path / MANIFEST).is_file():
        model, tokenizer = load_native(path, dtype=dtype, mesh=mesh, verify=verify)
    elif path.is_file():
        model, tokenizer = _load_file(path, dtype=dtype, mesh=mesh)
    else:
        from checkpoints_convert import huggingface

        model, tokenizer = huggingface.load(
            path_or_id,
            dtype=dtype,
            mesh=mesh,
            mapped=mapped,
            revision=revision,
            local_files_only=local_files_only,
            unsafe_format=unsafe_format,
        )
    if context is not None:
        _set_context(model, context)
    return model, tokenizer


def _set_context(model: Any, context: int) -> None:
    """Gives a model another longest text."""
    if type(context) is not int or not 1 <= context < 2**31:
        raise ValueError(f"load: context must be a number of tokens, at least 1, got {context=}")
    if hasattr(model, "positions") and context != model.config.context:
        raise ValueError(
            f"load: the positions of this model are a table of {model.config.context} rows, got {context=}"
        )
    model.config = dataclasses.replace(model.config, context=context)


def float_type(dtype):
    """A float type from its name or itself."""
    try:
        made = jnp.dtype(dtype)
    except TypeError:
        made = None
    if made not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"load: dtype must be float32, bfloat16 or float16, got {dtype=}")
    return made


def _load_file(path: Path, *, dtype, mesh):
    """A GGUF, llama2.c or minGPT file; anything else is refused with what to do."""
    with path.open("rb") as file:
        head = file.read(4)
    if path.suffix in (".pt", ".pth", ".ckpt", ".pkl") or head[:2] == b"PK" or head[:1] == b"\x80":
        raise ValueError(
            "load: a pickle can run code when opened: give the directory that it and its config.json lie in, "
            f"and unsafe_format='pickle' to read nothing but tensors, got {str(path)!r}"
        )
    if path.suffix == ".gguf" or head == b"GGUF":
        from checkpoints_convert.gguf import checkpoint

        return checkpoint.load(path, dtype=dtype, mesh=mesh)
    if path.suffix == ".json":
        from checkpoints_convert import mingpt

        return mingpt.load(path, dtype=dtype, mesh=mesh)
    if path.suffix != ".bin":
        raise ValueError(
            f"load: must be a directory, a hub id, a .gguf file or a llama2.c .bin file, got {str(path)!r}"
        )
    from checkpoints_convert import llama2c

    return llama2c.load(path, dtype=dtype, mesh=mesh)


Layout = Literal["native", "huggingface", "gptq", "awq", "compressed-tensors", "any-precision", "gguf"]


def save(
    model: nnx.Module,
    path,
    tokenizer=None,
    *,
    to: Layout = "native",
    model_type: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory, or the one file of gguf, whole or not at all.

    to: "native" for any weights; "huggingface" for dense ones and a directory that transformers loads; the
      other names for quantized ones, whose codes are written as other tools serve them: exactly, or it is a
      ValueError that says what the layout can hold (`requantize` rounds). `model_type` is the family to write
      (None: the first that can say the model's config), `max_shard_bytes` the most weights in one file.

    Raises FileExistsError where `path` exists, OSError when the disk is full.
    """
    if to == "native":
        save_native(model, path, tokenizer)
        return
    if to == "gguf":
        from checkpoints_convert.gguf import checkpoint

        checkpoint.save(model, tokenizer, path, model_type=model_type)
        return
    from checkpoints_convert import huggingface

    huggingface.save(
        model,
        tokenizer,
        path,
        model_type=model_type,
        scheme=None if to == "huggingface" else to,
        max_shard_bytes=max_shard_bytes,
    )


def requantize(model: nnx.Module, to: Layout) -> tuple[nnx.Module, dict[str, float]]:
    """The model with the quantized weights that a layout cannot hold rounded to what it can.

    Plain rounding in the groups that there were, at the least width that holds the codes. With it comes, by
    the name of each weight that was rounded, mean |w - w'| / mean |w|. ValueError for a dense model, and for
    a layout that nothing is rounded to.
    """
    from checkpoints_convert.quantized import export

    return export.requantize(model, to)


def convert(
    src,
    dst,
    to: Layout = "native",
    *,
    dtype=None,
    unsafe_format: Literal["pickle"] | None = None,
    change: Callable[[nnx.Module, Any], nnx.Module] | None = None,
):
    """Reads a checkpoint and writes it as another directory or file; returns the model and its tokenizer.

    dtype, unsafe_format: as in `load`. change: what is done between, of the model and its tokenizer.
    A Hugging Face directory is written as the family it was read as.
    """
    if Path(dst).exists():
        raise FileExistsError(f"convert: the output must not exist yet, got {str(dst)!r}")
    model, tokenizer = load(src, dtype=dtype, unsafe_format=unsafe_format)
    model = model if change is None else change(model, tokenizer)
    model_type = None
    if to != "native":
        from checkpoints_convert import huggingface

        model_type = huggingface.model_type_of(src)
    save(model, dst, tokenizer, to=to, model_type=model_type)
    return model, tokenizer
