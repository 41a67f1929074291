"""llama2.c's files of weights to a `Decoder`: float and int8 (version 2) `.bin`.

Everything is little-endian; matrices are rows of outputs, as ours. Short names: V tokens, d width,
L layers, h feed-forward width, H query heads, K key heads, e = d / H head size, S longest context.

    float   seven int32 (d, h, L, H, K, V, S; V negative: the head is a matrix of its own), then
            float32: embedding, attention norms, wq, wk, wv, wo, ffn norms, w1, w2, w3, final norm,
            cos and sin tables [S, e/2] each (skipped), head
    int8    256 bytes: magic 0x616b3432, version 2, the seven int32, tied flag (uint8), group size
            (int32); then float32 norms (attention, ffn, final), then embedding, wq, wk, wv, wo, w1,
            w2, w3, head; each layer's matrix is its int8 values, then one float32 scale for each
            `group_size` consecutive values

llama2.c turns neighbouring elements of a head, our `rope.py` the pair (i, i + e/2): rows of wq and
wk are put in that order here. Converting is lossless for float files; int8 files become float32.
"""

import struct
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np

from checkpoints_convert.llama2c_tokenizer import load_tokenizer
from checkpoints_convert.materialize import materialize
from jaxllm.models.decoder import Config, Decoder
from jaxllm.models.rope import Rope

MAGIC = 0x616B3432

# Our name under layers.i of each layered tensor.
LAYERED = {
    "attention_norm": "attention_norm.scale",
    "wq": "attention.q.w",
    "wk": "attention.k.w",
    "wv": "attention.v.w",
    "wo": "attention.o.w",
    "ffn_norm": "mlp_norm.scale",
    "w1": "mlp.gate.w",
    "w2": "mlp.down.w",
    "w3": "mlp.up.w",
}
FLOAT_ORDER = "attention_norm wq wk wv wo ffn_norm w1 w2 w3".split()
INT8_ORDER = "wq wk wv wo w1 w2 w3".split()


def load(path, *, tokenizer=None, dtype=None, mesh=None):
    """The model of a llama2.c `.bin` file and its tokenizer.

    tokenizer: path of the tokenizer file; None takes `tok<V>.bin`, `tokenizer.bin` or the only
      `tok*.bin` that lies beside, and gives no tokenizer (None) where there is none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"llama2c.load: no such file, got path={str(path)!r}")
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    if data.size < 28:
        raise ValueError(f"llama2c.load: {path.name} ends inside its header, got {data.size} bytes")
    quantized = int(data[:4].view("<u4")[0]) == MAGIC
    config, tensors = (_int8 if quantized else _float)(path.name, data)
    model = materialize(
        Decoder(config, rngs=None),
        lambda name, shape: tensors[name](),
        dtype=dtype,
        mesh=mesh,
    )
    file = _beside(path, config.vocab) if tokenizer is None else Path(tokenizer)
    return model, None if file is None else load_tokenizer(file, config.vocab)


def _beside(path: Path, vocab: int) -> Path | None:
    """The tokenizer file in the model's folder, if there is one."""
    for name in (f"tok{vocab}.bin", "tokenizer.bin"):
        if (path.parent / name).is_file():
            return path.parent / name
    found = sorted(path.parent.glob("tok*.bin"))
    return found[0] if len(found) == 1 else None


def _config(who: str, header, tied: bool) -> Config:
    d, h, L, H, K, V, S = (int(n) for n in header)
    # The bound keeps a file of something else from being read as sizes.
    if not all(0 < n < 1 << 24 for n in (d, h, L, H, K, V, S)) or d % (2 * H) or H % K:
        raise ValueError(f"llama2c.load: {who} has no llama2.c header, got {d, h, L, H, K, V, S}")
    return Config(
        layers=L,
        width=d,
        heads=H,
        kv_heads=K,
        head_dim=d // H,
        ffn=h,
        vocab=V,
        context=S,
        tied=tied,
        rope=Rope(theta=10_000.0),
        norm_eps=1e-5,
        stop_tokens=(1, 2),  # a new begin token ends a text too: so texts are separated in training
    )


def _shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, one layer of the layered ones."""
    d, k = c.width, c.kv_heads * c.head_dim
    matrices = {"wq": (d, d), "wk": (k, d), "wv": (k, d), "wo": (d, d)}
    matrices |= {"w1": (c.ffn, d), "w2": (d, c.ffn), "w3": (c.ffn, d)}
    return matrices | {
        "attention_norm": (d,),
        "ffn_norm": (d,),
        "norm": (d,),
        "embedding": (c.vocab, d),
        "head": (c.vocab, d),
    }


def _pairs_to_halves(w: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows (0, 1, 2, 3, ...) of each head in the order (0, 2, ..., 1, 3, ...)."""
    rows, columns = w.shape
    return w.reshape(-1, head_dim // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


class _Reader:
    """Walks through a file and notes where each tensor lies; each is read when asked for."""

    def __init__(self, who: str, data: np.ndarray, config: Config, start: int):
        self.who, self.data, self.config, self.at = who, data, config, start
        self.shapes = _shapes(config)
        self.tensors: dict[str, Callable[[], np.ndarray]] = {}

    def take(self, name: str, tensor: str, group_size: int | None = None):
        """Notes that `name` is the next `tensor` of the file: float32, or int8 by groups."""
        shape = self.shapes[tensor]
        count = prod(shape)
        if group_size is not None and count % group_size:
            raise ValueError(
                f"llama2c.load: the group size must divide {tensor}, got {group_size=}, {shape=}"
            )
        start = self.at
        self.skip(4 * count if group_size is None else count + 4 * (count // group_size))

        def read() -> np.ndarray:
            part = self.data[start : start + (4 * count if group_size is None else count)]
            if group_size is None:
                value = part.view("<f4")
            else:
                scales = self.data[start + count : start + count + 4 * (count // group_size)].view("<f4")
                codes = part.view(np.int8).reshape(-1, group_size)
                value = codes.astype(np.float32) * scales[:, None]
            value = value.reshape(shape)
            rotated = tensor in ("wq", "wk")
            return _pairs_to_halves(value, self.config.head_dim) if rotated else value

        self.tensors[name] = read

    def skip(self, num_bytes: int):
        """Goes on behind so many bytes; the first that the file has not end the walk, however long."""
        self.at += num_bytes
        if self.at > self.data.size:
            raise ValueError(
                f"llama2c.load: {self.who} must have {self.at} bytes or more by its header, "
                f"got {self.data.size}"
            )

    def take_layers(self, tensor: str, group_size: int | None = None):
        for i in range(self.config.layers):
            self.take(f"layers.{i}.{LAYERED[tensor]}", tensor, group_size)

    def finish(self) -> dict[str, Callable[[], np.ndarray]]:
        """What was noted, if the file is just as long."""
        if self.at != self.data.size:
            raise ValueError(
                f"llama2c.load: {self.who} must have {self.at} bytes by its header, got {self.data.size}"
            )
        return self.tensors


def _float(who: str, data: np.ndarray):
    header = data[:28].view("<i4")
    tied = int(header[5]) > 0
    config = _config(who, [*header[:5], abs(int(header[5])), header[6]], tied)
    reader = _Reader(who, data, config, 28)
    reader.take("embedding.table", "embedding")
    for tensor in FLOAT_ORDER:
        reader.take_layers(tensor)
    reader.take("norm.scale", "norm")
    reader.skip(4 * config.context * config.head_dim)  # the tables of cos and sin
    if not tied:
        reader.take("head.w", "head")
    return config, reader.finish()


def _int8(who: str, data: np.ndarray):
    if data.size < 256:
        raise ValueError(f"llama2c.load: {who} ends inside its header, got {data.size} bytes")
    version = int(data[4:8].view("<i4")[0])
    if version != 2:
        raise ValueError(f"llama2c.load: {who} must be of version 2, got {version=}")
    header, tied = data[8:36].view("<i4"), bool(data[36])
    (group_size,) = struct.unpack("<i", data[37:41].tobytes())
    if group_size < 1:
        raise ValueError(f"llama2c.load: the group size must be positive, got {group_size=}")
    config = _config(who, header, tied)
    reader = _Reader(who, data, config, 256)
    reader.take_layers("attention_norm")
    reader.take_layers("ffn_norm")
    reader.take("norm.scale", "norm")
    reader.take("embedding.table", "embedding", group_size)
    for tensor in INT8_ORDER:
        reader.take_layers(tensor, group_size)
    if not tied:
        reader.take("head.w", "head", group_size)
    return config, reader.finish()
