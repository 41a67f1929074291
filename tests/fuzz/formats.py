"""A good sample of each format that is read: small, with every kind of part it may have."""

import base64
import functools
import json
import shutil
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import optax
from flax import nnx
from quantized_files import checkpoint as quantized_checkpoint
from quantized_files import gptq, gptq_block, sparse_checkpoint
from tiny_llama import write_checkpoint

from checkpoints_convert import huggingface, llama2c, mingpt, tensor_files
from checkpoints_convert.gguf import checkpoint as gguf_checkpoint
from fuzz.outcome import Sample
from jaxllm import cache as kv
from jaxllm.eviction.gates import load_gates, save_gates
from jaxllm.eviction.heads import load_heads, save_heads
from jaxllm.models.linears import linear_weights
from jaxllm.native import load_native, save_native
from jaxllm.quant.calibrate import META, VERSION, Calibration
from jaxllm.quant.checkpoint import BlockCheckpoint
from jaxllm.storage import checksums
from jaxllm.training.checkpoints import Checkpoints

OLD = Path(__file__).parents[1] / "files_of_0_1_0"


@functools.cache
def old_decoder():
    """A small model with a weight in every format."""
    return load_native(OLD / "decoder")[0]


def safetensors(folder: Path) -> Sample:
    rng, file = np.random.default_rng(0), folder / "model.safetensors"
    tensors = {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b": rng.normal(size=5).astype(ml_dtypes.bfloat16),
        "c": np.ones((2, 0), np.float16),
        "mask": np.tril(np.ones((4, 4), bool)),
        "bytes": np.arange(7, dtype=np.uint8),
        "scalar": np.array(3, np.int64),
    }
    entries = [(name, x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()]
    tensor_files.write_file(file, entries)
    return Sample(folder, lambda: tensor_files.open_file(file), stored=False)


def config(folder: Path) -> Sample:
    write_checkpoint(folder / "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "tiny" / name).unlink()
    sample = Sample(folder / "tiny", lambda: nnx.state(huggingface.load(folder / "tiny")[0]), stored=False)
    sample.files.pop(folder / "tiny" / "model.safetensors")  # of the format "safetensors"
    return sample


def quantized(folder: Path) -> Sample:
    quantized_checkpoint(folder, gptq, gptq_block())
    sample = Sample(folder, lambda: nnx.state(huggingface.load(folder)[0]), stored=False)
    sample.files.pop(folder / "config.json")  # of the format "config"
    return sample


def sparse_rows(folder: Path) -> Sample:
    """Any-Precision's files, with weights that are added to tables."""
    sparse_checkpoint(folder)
    sample = Sample(folder, lambda: nnx.state(huggingface.load(folder)[0]), stored=False)
    sample.files.pop(folder / "config.json")
    return sample


def native(folder: Path) -> Sample:
    save_native(old_decoder(), folder / "model")
    return Sample(folder / "model", lambda: nnx.state(load_native(folder / "model")[0]), stored=True)


def native_of_0_1_0(folder: Path) -> Sample:
    shutil.copytree(OLD / "gpt", folder / "model")
    return Sample(folder / "model", lambda: nnx.state(load_native(folder / "model")[0]), stored=False)


def cache(folder: Path) -> Sample:
    model = old_decoder()
    kv.save(kv.load(OLD / "caches" / "paged_4_bits", model), folder / "cache", model)
    return Sample(folder / "cache", lambda: kv.load(folder / "cache", model), stored=True)


def gates(folder: Path) -> Sample:
    save_gates(load_gates(OLD / "gates"), folder / "gates", note="x")
    return Sample(folder / "gates", lambda: load_gates(folder / "gates"), stored=True)


def heads(folder: Path) -> Sample:
    model = old_decoder()
    save_heads(load_heads(OLD / "heads", model=model), folder / "heads", model)
    return Sample(folder / "heads", lambda: load_heads(folder / "heads", model=model), stored=True)


def calibration(folder: Path) -> Sample:
    path = shutil.copytree(OLD / "calibration", folder / "calibration")
    meta = json.loads((path / META).read_text())
    names = {"groups": "output_groups"}
    meta = {"format": "jaxllm calibration", "version": VERSION} | {
        names.get(k, k): v for k, v in meta.items()
    }
    (path / META).write_text(json.dumps(meta))
    checksums.write(path, [file.name for file in path.iterdir()])

    def opened():
        return dict(Calibration(path).items())

    return Sample(path, opened, stored=True)


def blocks(folder: Path) -> Sample:
    model = old_decoder()
    weights = {name: w for name, w in linear_weights(model).items() if name.startswith("layers.0")}
    BlockCheckpoint(folder / "run", model, "method", []).write("layers.0", weights)

    def opened():
        run = BlockCheckpoint(folder / "run", model, "method", [])
        if not run.has("layers.0"):
            raise FileNotFoundError("a block that is not there is made again")
        return run.read("layers.0")

    return Sample(folder / "run", opened, stored=True)


def training(folder: Path) -> Sample:
    w = {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}
    state = {"trained": w, "opt_state": optax.adam(0.1).init(w)}
    Checkpoints(folder).write(
        3, state, {"step": 3, "losses": [0.5, 0.25, 0.125], "seconds": 1.5, "tokens": 9}
    )

    def opened():
        return Checkpoints(folder).read(state)

    return Sample(folder / "3", opened, stored=True)


def llama(folder: Path) -> Sample:
    d, h, L, H, K, V, S = 8, 6, 2, 2, 1, 262, 4
    count = V * d + L * (2 * d + 2 * d * d + 2 * d * d // 2 + 3 * d * h) + d + S * d // H
    numbers = np.random.default_rng(0).normal(size=count).astype("<f4")
    (folder / "model.bin").write_bytes(struct.pack("<7i", d, h, L, H, K, V, S) + numbers.tobytes())
    words = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256)), b"a", b"b", b"ab"]
    entries = b"".join(struct.pack("<fi", -i, len(word)) + word for i, word in enumerate(words))
    (folder / "tokenizer.bin").write_bytes(struct.pack("<i", 6) + entries)

    def opened():
        model, tokenizer = llama2c.load(folder / "model.bin")
        return nnx.state(model), np.array(0 if tokenizer is None else tokenizer.encode("ab"))

    return Sample(folder, opened, stored=False)


def mini(folder: Path) -> Sample:
    layers, width, vocab, context = 2, 4, 3, 5
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (vocab, width), "wpe.weight": (context, width)}
    for i in range(layers):
        for name, shape in {
            "ln_1": (width,), "attn.c_attn": (3 * width, width), "attn.c_proj": (width, width),
            "ln_2": (width,),
            "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width),
        }.items():  # fmt: skip
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[:1]}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    named = {f"transformer.{name}": shape for name, shape in shapes.items()}
    named["lm_head.weight"] = (vocab, width)
    sizes = {"n_layer": layers, "n_head": 2, "n_embd": width, "vocab_size": vocab, "block_size": context}
    saved: dict[str, Any] = {"config": sizes}
    for name, shape in named.items():
        data = np.arange(np.prod(shape), dtype="<f4").tobytes()
        saved[name] = {"shape": shape, "dtype": "torch.float32", "data": base64.b64encode(data).decode()}
    (folder / "model.json").write_text(json.dumps(saved))
    return Sample(folder, lambda: nnx.state(mingpt.load(folder / "model.json")[0]), stored=False)


def gguf(folder: Path) -> Sample:
    from gguf_files import write_gguf

    write_gguf(folder / "model.gguf", kind="Q8_0", width=32, ffn=32, heads=2, kv_heads=1)

    def opened():
        model, tokenizer = gguf_checkpoint.load(folder / "model.gguf")
        return nnx.state(model), np.array(0 if tokenizer is None else tokenizer.encode("the end"))

    return Sample(folder, opened, stored=False)


FORMATS: dict[str, Callable[[Path], Sample]] = {
    "safetensors": safetensors,
    "config": config,
    "quantized": quantized,
    "sparse_rows": sparse_rows,
    "native": native,
    "native_of_0_1_0": native_of_0_1_0,
    "cache": cache,
    "gates": gates,
    "heads": heads,
    "calibration": calibration,
    "blocks": blocks,
    "training": training,
    "llama2c": llama,
    "mingpt": mini,
}
if find_spec("gguf") is not None:  # an extra, which the tests install
    FORMATS["gguf"] = gguf
