"""What a model's linear layers see on sample text, measured layer by layer and kept on disk.

    stats = calibrate(model, tokens, want={"hessian"})       # tokens [S, T], or rows of different lengths
    stats["layers.0.attention.q"].hessian                    # one layer's, read when asked for

Text goes through the model one block at a time: all sequences through block 0, whose sums are finished and
written, then through block 1. So no more than one block's statistics are in memory beside the model and the
hidden states (S x T x width, on the host). Statistics that need the loss ("guided_hessian", "fisher") take
one pass backwards before, block by block as well: of each linear's outputs only the mean square of the
gradient per token and group is kept (arXiv:2505.07004, Algorithm 1), and the squared gradients of weights
("fisher") are summed in files. Linears that read the same input (q, k and v) share one copy of what depends
on it alone.

What each statistic is: `stats.py`. Sums are float32 at highest matmul precision. Letters: S sequences, T
tokens, K inputs, N outputs, g groups of consecutive outputs.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxllm.measure.perplexity import as_tokens, refuse_encoder
from jaxllm.quant.stats import WANTS, Stats

META = "calibration.json"
OF_OUTPUT = frozenset({"guided_hessian", "fisher"})
HELD_OUT_EVERY = 4
LOSS_SCALE = 1e3  # gradients are small: keeps 16-bit ones away from the least numbers


class Calibration(Mapping[str, Stats]):
    """Statistics by the linear's name ("layers.0.attention.q"), in a directory; read one at a time."""

    def __init__(self, path: str | Path, *, temporary: bool = False):
        self.path = Path(path)
        file = self.path / META
        if not file.is_file():
            raise FileNotFoundError(f"calibration: {META} must be in the directory, got path={self.path}")
        meta = json.loads(file.read_text())
        self.want, self.fingerprint, self.text = frozenset(meta["want"]), meta["fingerprint"], meta["text"]
        self.tokens, self.groups, self._inputs = meta["tokens"], meta["groups"], meta["inputs"]
        if temporary:  # the directory goes with the handle
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def __getitem__(self, name: str) -> Stats:
        found: dict[str, Any] = {}
        for file in (f"{self._inputs[name]}.in.npz", f"{name}.out.npz"):
            if (self.path / file).is_file():
                with np.load(self.path / file) as arrays:
                    found |= {key: jnp.asarray(arrays[key]) for key in arrays}
        return Stats(**found, tokens=self.tokens)

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)


def calibrate(
    model,
    sequences: Any,
    *,
    want: Iterable[str],
    path: str | Path | None = None,
    groups: int = 1,
    batch: int = 8,
    sample: int = 512,
    progress: bool = True,
) -> Calibration:
    """Measures what `want` names (`stats.WANTS`) for every linear of the model's blocks.

    sequences: token ids, [S, T] or rows of different lengths, each at most the model's context.
    path: a directory for the results, kept; a run that was stopped goes on after the last finished block
      when called again with the same arguments. None: a temporary one that goes with the handle.
    groups: of consecutive outputs, for "guided_hessian"; must divide every linear's N.
    batch: sequences that go through the model at once. sample: rows kept for "sample".

    Warns where fewer tokens were seen than a Hessian has columns. Raises ValueError for a model that is no
    decoder alone, for no text, or for a directory that another model, text or wish has begun.
    """
    want = frozenset(want)
    if not want or want - frozenset(WANTS):
        raise ValueError(f"calibrate: want must name some of {', '.join(WANTS)}, got {sorted(want)}")
    text = Text.of(model, sequences, batch)
    blocks = {f"layers.{i}": block for i, block in enumerate(model.layers)}
    linears = {
        f"{p}.{n}": x.below(p) for p, block in blocks.items() for n, x in linears_of(model, block).items()
    }
    check(linears, want, groups, text.count)
    meta = {
        "fingerprint": fingerprint(model),
        "text": text.digest(),
        "want": sorted(want),
        "groups": groups,
        "sample": sample,
        "tokens": text.count,
        "inputs": {name: linear.source for name, linear in linears.items()},
    }
    bar = partial(tqdm, disable=not progress, file=sys.stderr)
    if path is not None:
        _fill(Path(path), model, blocks, text, meta, bar)
        return Calibration(path)
    folder = Path(tempfile.mkdtemp())
    try:
        _fill(folder, model, blocks, text, meta, bar)
        return Calibration(folder, temporary=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _fill(folder: Path, model, blocks, text: "Text", meta: dict[str, Any], bar) -> None:
    """Measures block by block what the directory does not hold yet."""
    if _claim(folder, meta):
        return
    want = frozenset(meta["want"])
    if want & OF_OUTPUT:
        gradients(model, blocks, text, folder, groups=meta["groups"], want=want, bar=bar)
    states = text.embedded(model)
    for prefix, block in bar(blocks.items(), desc="calibrate", unit="block"):
        if (folder / f"{prefix}.done").is_file():
            states = [np.asarray(forward(block, x, n)) for x, n, _ in text.parts(states)]
            continue
        sums = Sums(want, meta["sample"])
        states = sums.take(block, text, states, folder, prefix)
        for name in linears_of(model, block):
            arrays = sums.arrays(name) | _fisher(folder, f"{prefix}.{name}")
            for end, keys in (("in", arrays.keys() - OF_OUTPUT), ("out", arrays.keys() & OF_OUTPUT)):
                if keys:
                    np.savez(folder / f"{prefix}.{name}.{end}.npz", **{key: arrays[key] for key in keys})
        (folder / f"{prefix}.done").touch()
    for file in folder.glob("*.done"):
        file.unlink()
    shutil.rmtree(folder / "gradients", ignore_errors=True)
    (folder / f"{META}.begun").replace(folder / META)


def text_sequences(
    model, tokenizer, text: str, *, length: int = 512, limit: int | None = None
) -> list[list[int]]:
    """A text as calibration sequences: `length` tokens each, side by side, the shorter rest left out.

    Where the tokenizer begins texts with a token, so does every sequence. length is cut to the context.
    """
    if tokenizer is None:
        raise ValueError("calibrate: text needs a tokenizer, this model has none: give token ids")
    ids = tokenizer.encode(text)
    begin = ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
    ids, size = ids[len(begin) :], min(length, model.config.context) - len(begin)
    if size < 1 or len(ids) < size:
        raise ValueError(
            f"calibrate: the text must have at least one piece of {length=} tokens, got {len(ids)}"
        )
    rows = [begin + ids[at : at + size] for at in range(0, len(ids) - size + 1, size)]
    return rows[:limit]


@dataclasses.dataclass(frozen=True)
class Text:
    """Calibration sequences, padded on the right to one length and to whole batches."""

    tokens: np.ndarray  # int32 [S', T]
    lengths: np.ndarray  # int32 [S'], 1 for a row that only fills up the last batch
    real: np.ndarray  # bool [S']
    batch: int

    @classmethod
    def of(cls, model, sequences: Any, batch: int) -> "Text":
        """Checked against the model's vocabulary and context."""
        refuse_encoder("calibrate", model)
        rows = [as_tokens("calibrate", row, model.config.vocab) for row in sequences]
        sizes = [len(row) for row in rows]
        if not rows or not 2 <= min(sizes) <= max(sizes) <= model.config.context:
            got = f"{min(sizes)} to {max(sizes)}" if rows else "none"
            raise ValueError(f"calibrate: sequences must have 2 to {model.config.context} tokens, got {got}")
        if batch < 1:
            raise ValueError(f"calibrate: batch must be positive, got {batch=}")
        batch = min(batch, len(rows))
        S = -(-len(rows) // batch) * batch
        tokens, lengths = np.zeros((S, max(sizes)), np.int32), np.ones((S,), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], lengths[i] = row, len(row)
        return cls(tokens, lengths, np.arange(S) < len(rows), batch)

    @property
    def count(self) -> int:
        """How many tokens are real."""
        return int(self.lengths[self.real].sum())

    def digest(self) -> str:
        """Tells this text from another."""
        return hashlib.sha256(self.tokens.tobytes() + self.lengths.tobytes()).hexdigest()

    def embedded(self, model) -> list[np.ndarray]:
        """What the first block reads, a batch each, on the host."""
        embed = jax.jit(lambda model, tokens: model.embed(tokens))
        starts = range(0, len(self.tokens), self.batch)
        return [np.asarray(embed(model, self.tokens[i : i + self.batch])) for i in starts]

    def parts(self, states: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each batch its states, its lengths, and each token's part: 1 real, -1 held out, 0 none."""
        for i, x in enumerate(states):
            at = slice(i * self.batch, (i + 1) * self.batch)
            held = np.arange(at.start, at.stop) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            real = (np.arange(x.shape[1])[None] < self.lengths[at, None]) & self.real[at, None]
            yield x, self.lengths[at], real * np.where(held, -1, 1)[:, None].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class LinearInfo:
    """A linear of a block: whose input it shares, and its shape."""

    source: str  # the first linear that reads the same input
    K: int
    N: int

    def below(self, prefix: str) -> "LinearInfo":
        """As seen from the whole model."""
        return dataclasses.replace(self, source=f"{prefix}.{self.source}")


def linears_of(model, block) -> dict[str, LinearInfo]:
    """The linears of a block, by name in the order in which they run; nothing is computed."""
    seen: dict[str, jax.Array] = {}
    found: dict[str, LinearInfo] = {}

    def tap(name, array):
        end = name.rpartition(".")[2]
        if end == "in":
            seen[name[: -len(".in")]] = array
        elif end == "out" and name[: -len(".out")] in seen:
            own = name[: -len(".out")]
            source = next(other for other, x in seen.items() if x is seen[own])
            found[own] = LinearInfo(source, seen[own].shape[-1], array.shape[-1])
        return array

    x = jax.ShapeDtypeStruct((1, 2, model.config.width), model.dtype)
    jax.eval_shape(lambda block, x: block(x, tap=tap)[0], block, x)
    return found


def fingerprint(model) -> str:
    """Tells a model from another: shapes, types and some numbers of every weight."""
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_flatten_with_path(model)[0]:
        digest.update(f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype}".encode())
        digest.update(np.asarray(x.ravel()[:16]).tobytes())
    return digest.hexdigest()


def check(linears: dict[str, LinearInfo], want: frozenset[str], groups: int, tokens: int) -> None:
    """Raises ValueError for groups that do not divide, warns of too little text."""
    uneven = [name for name, linear in linears.items() if groups < 1 or linear.N % groups]
    if "guided_hessian" in want and uneven:
        N = linears[uneven[0]].N
        raise ValueError(f"calibrate: groups must divide the outputs of {uneven[0]}, got {groups=}, {N=}")
    short = [name for name, linear in linears.items() if tokens < linear.K]
    if short and want & {"hessian", "guided_hessian"}:
        names = ", ".join(short[:3]) + (", ..." if short[3:] else "")
        warnings.warn(
            f"calibrate: a Hessian should see more tokens than it has columns, got {tokens} for {names}",
            stacklevel=3,
        )


def _claim(folder: Path, meta: dict[str, Any]) -> bool:
    """Whether the directory is complete; raises ValueError when it belongs to another run."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (META, f"{META}.begun"):
        if (folder / name).is_file():
            if json.loads((folder / name).read_text()) != meta:
                raise ValueError(
                    "calibrate: path must be new or hold the same model, text and wishes, "
                    f"got path={str(folder)!r}"
                )
            return name == META
    if any(folder.iterdir()):
        raise ValueError(f"calibrate: path must be new or empty, got path={str(folder)!r}")
    (folder / f"{META}.begun").write_text(json.dumps(meta))
    return False


@jax.jit
def forward(block, x, lengths):
    """What a block gives."""
    return block(x, lengths=lengths)[0]


class Sums:
    """The statistics of one block, summed batch by batch."""

    def __init__(self, want: frozenset[str], sample: int):
        self.want, self.sample = want, sample
        self.sums: dict[str, dict[str, jax.Array]] = {}
        self.rows: dict[str, list[np.ndarray]] = {}
        self.tokens = 0

    def take(
        self, block, text: Text, states: list[np.ndarray], folder: Path, prefix: str
    ) -> list[np.ndarray]:
        """Takes in all batches that a block reads; gives what it leaves for the next."""
        parts = enumerate(text.parts(states))
        return [self.add(block, *part, _saliency(folder, prefix, i)) for i, part in parts]

    def add(self, block, x, lengths, part, saliency: dict[str, np.ndarray]) -> np.ndarray:
        """Takes in one batch; gives what the next block reads."""
        y, new, inputs = _measure(block, x, lengths, part, saliency, want=self.want)
        for name, stats in new.items():
            old = self.sums.get(name)
            self.sums[name] = stats if old is None else _add(old, stats)
        if "sample" in self.want:
            for name, rows in inputs.items():
                have = sum(len(r) for r in self.rows.get(name, []))
                real = np.asarray(rows)[np.asarray(part) != 0][: self.sample - have]
                self.rows.setdefault(name, []).append(np.asarray(real, np.float32))
        self.tokens += int(np.count_nonzero(part))
        return np.asarray(y)

    def stats(self, model, block, folder: Path, prefix: str) -> dict[str, Stats]:
        """What was measured, by the linears' full names."""
        found = {}
        for name, linear in linears_of(model, block).items():
            arrays = self.arrays(linear.source) | self.arrays(name) | _fisher(folder, f"{prefix}.{name}")
            found[f"{prefix}.{name}"] = Stats(
                **{key: jnp.asarray(x) for key, x in arrays.items()}, tokens=self.tokens
            )
        return found

    def arrays(self, name: str) -> dict[str, Any]:
        """What was measured for one linear, without what another speaks for."""
        found: dict[str, Any] = dict(self.sums.get(name, {}))
        if "mean" in found:
            found["mean"] = found["mean"] / self.tokens
        if name in self.rows:
            found["sample"] = np.concatenate(self.rows[name])
        return found


def _add(old, new):
    top = {key: jnp.maximum(old[key], new[key]) for key in old if key == "thresholds"}
    return {key: old[key] + new[key] for key in old if key != "thresholds"} | top


@partial(jax.jit, static_argnames="want")
def _measure(block, x, lengths, part, saliency, *, want: frozenset[str]):
    """A batch's part of each statistic, by linear; and what linears read, for the sample."""
    seen: dict[str, jax.Array] = {}

    def tap(name, array):
        if name.endswith(".in"):
            seen[name[: -len(".in")]] = array
        return array

    y, _ = block(x, lengths=lengths, tap=tap)
    sums: dict[str, dict[str, jax.Array]] = {}
    inputs: dict[str, jax.Array] = {}
    for name, array in seen.items():
        flat = array.astype(jnp.float32).reshape(-1, array.shape[-1])
        if not any(array is seen[other] for other in inputs):  # the first that reads it speaks for the others
            inputs[name] = array
            sums[name] = _of_input(flat, part.ravel(), want)
        if name in saliency:
            s = saliency[name].astype(jnp.float32) * (part != 0).astype(jnp.float32)[..., None]
            sums[name] = sums.get(name, {}) | {"guided_hessian": _guided(flat, s.reshape(-1, s.shape[-1]))}
    return y, sums, inputs if "sample" in want else {}


def _of_input(x, part, want: frozenset[str]) -> dict[str, jax.Array]:
    """What depends on a linear's inputs [n, K] alone."""
    x = jnp.where(part[:, None] != 0, x, 0.0)
    kept = x if "held_out" not in want else jnp.where(part[:, None] > 0, x, 0.0)
    all = {
        "hessian_diag": lambda: jnp.sum(x * x, axis=0),
        "mean": lambda: jnp.sum(jnp.abs(x), axis=0),
        "hessian": lambda: _gram(kept),
        "held_out": lambda: _gram(jnp.where(part[:, None] < 0, x, 0.0)),
        "thresholds": lambda: jnp.max(jnp.sort(jnp.abs(x), axis=1)[:, ::-1], axis=0),
    }
    return {name: make() for name, make in all.items() if name in want}


def _guided(x, s):
    """sum_t s[t, j] x[t] x[t]^T of inputs [n, K] and saliencies [n, g], a group at a time."""
    return jax.lax.map(lambda root: _gram(x * root[:, None]), jnp.sqrt(s).T)


def _gram(x):
    return jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)


def gradients(model, blocks, text: Text, folder: Path, *, groups: int, want: frozenset[str], bar) -> None:
    """One pass backwards: each linear's saliency a token, and the sums of squared weight gradients."""
    place = folder / "gradients"
    if (place / "done").is_file():
        return
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    fisher: dict[str, np.ndarray] = {}
    for i, (x, lengths, part) in enumerate(
        bar(list(text.parts(text.embedded(model))), desc="gradients", unit="batch")
    ):
        states = [x]
        for block in blocks.values():
            states.append(np.asarray(forward(block, states[-1], lengths)))
        tokens = text.tokens[i * text.batch : (i + 1) * text.batch]
        g = _top(model, states.pop(), tokens, part)
        for prefix, block in reversed(blocks.items()):
            g, saliency, squares = _pull(
                block, states.pop(), lengths, g, groups=groups, fisher="fisher" in want
            )
            if "guided_hessian" in want:
                np.savez(place / f"{prefix}.{i}.npz", **{n: np.asarray(s) for n, s in saliency.items()})  # type: ignore[arg-type]
            for name, square in squares.items():
                key = f"{prefix}.{name}"
                if key not in fisher:
                    file = place / f"{key}.fisher.npy"
                    fisher[key] = np.lib.format.open_memmap(file, "w+", np.float32, square.shape)
                fisher[key] += np.asarray(square)
    for array in fisher.values():
        array.flush()  # type: ignore[attr-defined]
    (place / "done").touch()


def _fisher(folder: Path, name: str) -> dict[str, np.ndarray]:
    file = folder / "gradients" / f"{name}.fisher.npy"
    return {"fisher": np.load(file)} if file.is_file() else {}


def _saliency(folder: Path, prefix: str, batch: int) -> dict[str, np.ndarray]:
    file = folder / "gradients" / f"{prefix}.{batch}.npz"
    if not file.is_file():
        return {}
    with np.load(file) as arrays:
        return dict(arrays)


@jax.jit
def _top(model, x, tokens, part):
    """The gradient of the loss, a sequence's mean negative log-likelihood, at the last block's output."""

    def loss(x):
        logp = jax.nn.log_softmax(model.unembed(x)[:, :-1])
        came = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=2)[..., 0]
        real = (part[:, 1:] != 0).astype(jnp.float32)
        means = jnp.sum(came * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1.0)
        return -LOSS_SCALE * jnp.sum(means)  # sequences do not meet: each has its own gradient

    return jax.grad(loss)(x)


@partial(jax.jit, static_argnames=("groups", "fisher"))
def _pull(block, x, lengths, g, *, groups: int, fisher: bool):
    """The gradient at a block's input, each linear's saliency [B, T, g], and its squared weight gradients.

    A zero is added to each linear's output, and the loss differentiated by it. Square first, sum later: the
    saliency squares a token's gradient, the Fisher a sequence's (arXiv:2505.07004 against arXiv:2306.07629).
    """
    inputs: dict[str, jax.Array] = {}

    def run(x, zeros):
        def tap(name, array):
            end = name.rpartition(".")[2]
            own = name[: -len(end) - 1]
            if end == "in":
                inputs[own] = array
            elif end == "out" and own in zeros:
                array = array + zeros[own]
            return array

        y, _ = block(x, lengths=lengths, tap=tap)
        return y, dict(inputs)

    def shapes(x):
        found = {}

        def tap(name, array):
            end = name.rpartition(".")[2]
            if end == "in":
                found[name[: -len(".in")]] = None
            elif end == "out" and name[: -len(".out")] in found:
                found[name[: -len(".out")]] = array
            return array

        block(x, lengths=lengths, tap=tap)
        return found

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(shapes, x))
    _, pull, inputs = jax.vjp(run, x, zeros, has_aux=True)
    g_x, g_out = pull(g)
    saliency, squares = {}, {}
    for name, gz in g_out.items():
        gz = gz.astype(jnp.float32)
        saliency[name] = jnp.mean(jnp.square(gz.reshape(*gz.shape[:2], groups, -1)), axis=-1)
        if fisher:
            squares[name] = _sum_of_squares(gz, inputs[name].astype(jnp.float32))
    return g_x, saliency, squares


def _sum_of_squares(gz, x):
    """sum_b (sum_t gz[b, t, n] x[b, t, k])^2, a sequence at a time."""

    def one(total, pair):
        grad = jnp.matmul(pair[0].T, pair[1], precision=jax.lax.Precision.HIGHEST)
        return total + grad * grad, None

    zeros = jnp.zeros((gz.shape[-1], x.shape[-1]), jnp.float32)
    return jax.lax.scan(one, zeros, (gz, x))[0]
