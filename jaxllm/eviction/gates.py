"""Gates: small networks that tell a row's worth from what its layer reads, so that no text is read twice.

    gates = load_gates("gates/")                                       # or jaxllm.training.gates.train_gates
    cache, scores = prefill_with_scores(model, [ids], gates)                # one pass
    small = evict(cache, scores, ratio=0.3)
    budget = CacheBudget(gates=gates, tokens=256)
    outs = generate(model, tokenizer, prompts, cache=CacheOptions(budget=budget))

Two published forms. `FastGate` (Fast KVzip) compares queries and a key of few numbers, both made of the
hidden state x, with learned sinks z as attention does; it learns KVzip's scores by binary cross entropy:

    q_g = norm(x W_q + b_q)    k = norm(x W_k)    a_g = q_g . k / sqrt(d) + b_g
    score = mean_g 1 / (1 + sum_s exp(q_g . z_s / sqrt(d) - a_g))                    in (0, 1)

`ZapGate` (KVzap, arXiv:2601.07891) is linear, or an MLP with one hidden layer; it learns the logarithm of
KVzip+'s scores by squared error, so that a threshold says how much stays (`evict(threshold=-4)`). Lossy: both
guess another method's scores.

Letters: L layers without a window, B requests, T tokens, D width, K key heads, G queries a key head, d
numbers of a gate's key, S sinks, F width of the MLP.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm.cache.dense import global_layers
from jaxllm.models.taps import Tap, layer_tap
from jaxllm.pytree import pytree
from jaxllm.storage import checksums
from jaxllm.storage.directory import new_directory
from jaxllm.storage.metadata import excerpt, one_line, read_meta, write_meta
from pallas_kernels.decode_attention.partial_softmax import FLOAT32

GATES_JSON, GATES_ARRAYS = "gates.json", "gates.safetensors"
FORMAT, VERSIONS = "jaxllm gates", (1, 2)  # from 2 on with checksums
SHIPPED = Path(__file__).parents[1] / "pico" / "gates"
MIN_SCORE = 1e-8  # the least score that a logarithm is taken of


class Gate:
    """What both forms share: stacked weights, a layer each, and how they watch a model read."""

    def sizes(self) -> tuple[int, int, int]:
        """Layers, width and key heads of the model that they belong to."""
        raise NotImplementedError

    def __call__(self, layer: int, x: Float[Array, "B T D"]) -> Float[Array, "B K T"]:
        """Scores of the rows that a layer makes of what it reads."""
        raise NotImplementedError

    def scores(self, inputs: Sequence[Float[Array, "B T D"]]) -> Float[Array, "L B K T"]:
        """Scores of all layers' rows, from what `capture_inputs` notes."""
        return jnp.stack([self(layer, x) for layer, x in enumerate(inputs)])

    def loss(
        self, layer: int, x: Float[Array, "B T D"], scores: Float[Array, "B K T"]
    ) -> Float[Array, "B K T"]:
        """How far the scores are from those to be learnt."""
        raise NotImplementedError

    def layers(self, model) -> list[int]:
        """The layers with a gate: those without a window. Raises ValueError for a model of other sizes."""
        layers = global_layers(model.windows)
        want = (len(layers), model.config.width, model.config.kv_heads)
        if self.sizes() != want:
            raise ValueError(
                f"gates: layers without a window, width and key heads must be {want}, got {self.sizes()}"
            )
        return layers

    def capture_inputs(self, model) -> tuple[Tap, list[jax.Array]]:
        """A tap, and the list that it fills with what each layer with a gate reads [B, T, D]."""
        layers = self.layers(model)
        found: list[jax.Array] = []

        def note(layer: int, x: jax.Array) -> None:
            found.append(x)

        return layer_tap(note, ("attention.q.in",), layers), found


@pytree
class FastGate(Gate):
    """Fast KVzip's gates."""

    queries: jax.Array  # [L, D, K, G, d]
    query_bias: jax.Array  # [L, K, G, d]
    query_norm: jax.Array  # [L, d]
    keys: jax.Array  # [L, D, K, d]
    key_norm: jax.Array  # [L, d]
    sinks: jax.Array  # [L, K, S, d]
    bias: jax.Array  # [L, K, G]

    def sizes(self) -> tuple[int, int, int]:
        return self.keys.shape[0], self.keys.shape[1], self.keys.shape[2]

    def __call__(self, layer: int, x: Float[Array, "B T D"]) -> Float[Array, "B K T"]:
        """Scores in (0, 1)."""
        return jax.nn.sigmoid(self.margins(layer, x)).mean(2)

    def margins(self, layer: int, x: Float[Array, "B T D"]) -> Float[Array, "B K G T"]:
        """log(p / (1 - p)) of each query's part p of the score."""
        g, x = jax.tree.map(lambda w: w[layer], self), x.astype(jnp.float32)
        q = jnp.einsum("btd,dkge->btkge", x, g.queries, **FLOAT32) + g.query_bias[None, None]
        q = _normed(q, g.query_norm) * q.shape[-1] ** -0.5
        k = _normed(jnp.einsum("btd,dke->btke", x, g.keys, **FLOAT32), g.key_norm)
        own = jnp.einsum("btke,btkge->bkgt", k, q, **FLOAT32) + g.bias[None, :, :, None]
        sinks = jnp.einsum("kse,btkge->bkgts", g.sinks, q, **FLOAT32)
        return own - jax.nn.logsumexp(sinks, axis=-1)

    def loss(self, layer: int, x, scores: Float[Array, "B K T"]) -> Float[Array, "B K T"]:
        """Binary cross entropy of the score."""
        margins = self.margins(layer, x)
        return -(scores * _log_mean(margins) + (1 - scores) * _log_mean(-margins))


@pytree
class ZapGate(Gate):
    """KVzap's gates; the linear ones have neither `up` nor `up_bias`."""

    up: jax.Array | None  # [L, D, F]
    up_bias: jax.Array | None  # [L, F]
    down: jax.Array  # [L, F or D, K]
    down_bias: jax.Array  # [L, K]

    def sizes(self) -> tuple[int, int, int]:
        width = (self.down if self.up is None else self.up).shape[1]
        return self.down.shape[0], width, self.down.shape[2]

    def __call__(self, layer: int, x: Float[Array, "B T D"]) -> Float[Array, "B K T"]:
        """Logarithms of scores."""
        x = x.astype(jnp.float32)
        if self.up is not None and self.up_bias is not None:
            h = jnp.einsum("btd,df->btf", x, self.up[layer], **FLOAT32)
            x = jax.nn.gelu(h + self.up_bias[layer][None, None], approximate=False)
        y = jnp.einsum("btf,fk->bkt", x, self.down[layer], **FLOAT32)
        return y + self.down_bias[layer][None, :, None]

    def loss(self, layer: int, x, scores: Float[Array, "B K T"]) -> Float[Array, "B K T"]:
        """Squared error of the logarithm."""
        return jnp.square(self(layer, x) - jnp.log(jnp.maximum(scores, MIN_SCORE)))


def _log_mean(margins: Float[Array, "B K G T"]) -> Float[Array, "B K T"]:
    """Logarithm of the mean over queries of what margins are the log-odds of."""
    return jax.nn.logsumexp(jax.nn.log_sigmoid(margins), axis=2) - np.log(margins.shape[2])


def _normed(x: Float[Array, "*B d"], scale: Float[Array, " d"]) -> Float[Array, "*B d"]:
    y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return y * jnp.expand_dims(scale, range(y.ndim - 1))


FORMS = {"fast": FastGate, "zap": ZapGate}
SHAPES = {
    "queries": "LDKGd",
    "query_bias": "LKGd",
    "query_norm": "Ld",
    "keys": "LDKd",
    "key_norm": "Ld",
    "sinks": "LKSd",
    "bias": "LKG",
    "up": "LDF",
    "up_bias": "LF",
    "down": "LFK",
    "down_bias": "LK",
}


def save_gates(gates: Gate, path: str | Path, **notes: Any) -> None:
    """Writes gates to a new directory, whole or not at all. notes: what a person may want to know, as JSON.

    Raises FileExistsError where `path` exists, OSError when the disk is full.
    """
    from safetensors.numpy import save_file

    form = next(name for name, cls in FORMS.items() if isinstance(gates, cls))
    arrays = {f.name: getattr(gates, f.name) for f in dataclasses.fields(gates)}  # type: ignore[arg-type]
    arrays = {name: np.asarray(x) for name, x in arrays.items() if x is not None}
    size = sum(x.nbytes for x in arrays.values())
    with new_directory(path, who="save_gates", num_bytes=size) as out:
        write_meta(out / GATES_JSON, FORMAT, VERSIONS[-1], {"form": form, "notes": notes})
        save_file(arrays, out / GATES_ARRAYS)
        checksums.write(out, [GATES_JSON, GATES_ARRAYS])


def load_gates(path: str | Path, *, verify: bool = True) -> Gate:
    """The gates of a directory that `save_gates` wrote, in float32.

    verify: compares the files with their checksums first.

    Raises FileNotFoundError where there are none, ValueError for files that are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(path)
    meta = read_meta("load_gates", path / GATES_JSON, FORMAT, *VERSIONS)
    if verify:
        checksums.verify("load_gates", path, [GATES_JSON, GATES_ARRAYS], required=meta["version"] > 1)
    try:
        if meta.get("form") not in [*FORMS]:
            raise ValueError(f"form must be {' or '.join(FORMS)}, got form={excerpt(meta.get('form'))}")
        form, arrays = FORMS[meta["form"]], load_file(path / GATES_ARRAYS)
        names = [f.name for f in dataclasses.fields(form)]
        needed = {name for name in names if name not in ("up", "up_bias")}
        if not needed <= set(arrays) <= set(names) or ("up" in arrays) != ("up_bias" in arrays):
            raise ValueError(f"arrays must be {', '.join(names)}, got {', '.join(arrays)}")
        _check_arrays(arrays)
        return form(**{n: jnp.asarray(arrays[n], jnp.float32) if n in arrays else None for n in names})
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise ValueError(f"load_gates: {str(path)!r} cannot be opened: {one_line(error)}") from error


def _check_arrays(arrays: dict[str, np.ndarray]) -> None:
    """Raises ValueError unless the arrays of a gate are numbers and fit together."""
    sizes: dict[str, int] = {}
    shapes = SHAPES | ({} if "up" in arrays else {"down": "LDK"})
    for name, x in arrays.items():
        if x.ndim != len(shapes[name]) or 0 in x.shape:
            raise ValueError(f"{name} must be {list(shapes[name])}, got {list(x.shape)}")
        if not np.isfinite(x.astype(np.float32)).all():
            raise ValueError(f"{name} must be finite, got inf or NaN")
        for letter, size in zip(shapes[name], x.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"arrays must have one {letter}, got {sizes[letter]}, in {name} {size}")


def pico_gates(form: Literal["fast", "zap"] = "fast") -> Gate:
    """The gates that ship with pico's target."""
    if form not in FORMS:
        raise ValueError(f"pico_gates: form must be fast or zap, got {form!r}")
    return load_gates(SHIPPED / form)
