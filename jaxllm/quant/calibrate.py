"""What a model's linear layers see on sample text, measured layer by layer and kept on disk.

    stats = calibrate(model, tokens, want={"hessian"})       # tokens [S, T], or rows of different lengths
    stats["layers.0.attention.q"].hessian                    # one layer's, read when asked for

Text goes through the model one block at a time (`stages.py`): all sequences through block 0, whose sums are
finished and written, then through block 1. So no more than one block's statistics are in memory beside the
model and the hidden states (S x T x width, on the host). Statistics that need the loss ("guided_hessian",
"fisher") take one pass backwards before, block by block as well: of each linear's outputs only the mean
square of the gradient per token and group is kept (arXiv:2505.07004, Algorithm 1), and the squared gradients
of weights ("fisher") are summed in files. Linears that read the same input (q, k and v) share one copy of
what depends on it alone.

What each statistic is: `stats.py`. Sums are float32 at highest matmul precision. Letters: S sequences, T
tokens, K inputs, N outputs, g groups of consecutive outputs.
"""

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

from jaxllm.quant.stages import Batch, LinearInfo, Stage, State, Text, linears_by_name, linears_of, side_of
from jaxllm.quant.stages import stages as stages_of
from jaxllm.quant.stats import WANTS, Stats

META = "calibration.json"
OF_OUTPUT = frozenset({"guided_hessian", "fisher"})
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
        self.groups, self._inputs, self._tokens = meta["groups"], meta["inputs"], meta["tokens"]
        if temporary:  # the directory goes with the handle
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def __getitem__(self, name: str) -> Stats:
        found: dict[str, Any] = {}
        for file in (f"{self._inputs[name]}.in.npz", f"{name}.out.npz"):
            if (self.path / file).is_file():
                with np.load(self.path / file) as arrays:
                    found |= {key: jnp.asarray(arrays[key]) for key in arrays}
        return Stats(**found, tokens=self._tokens[name])

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

    sequences: token ids, [S, T] or rows of different lengths, each at most the model's context; for a T5,
      pairs of a source's and a target's, as it is trained on (`T5` puts `decoder_start` in front itself).
    path: a directory for the results, kept; a run that was stopped goes on after the last finished block
      when called again with the same arguments. None: a temporary one that goes with the handle.
    groups: of consecutive outputs, for "guided_hessian"; must divide every linear's N.
    batch: sequences that go through the model at once. sample: rows kept for "sample".

    Warns where fewer tokens were seen than a Hessian has columns. Raises ValueError for no text, or for a
    directory that another model, text or wish has begun.
    """
    want = frozenset(want)
    if not want or want - frozenset(WANTS):
        raise ValueError(f"calibrate: want must name some of {', '.join(WANTS)}, got {sorted(want)}")
    text = Text.of(model, sequences, batch)
    linears = linears_by_name(model)
    check(linears, want, groups, text)
    meta = {
        "fingerprint": fingerprint(model),
        "text": text.digest(),
        "want": sorted(want),
        "groups": groups,
        "sample": sample,
        "tokens": {name: text.counts[linear.side] for name, linear in linears.items()},
        "inputs": {name: linear.source for name, linear in linears.items()},
    }
    bar = partial(tqdm, disable=not progress, file=sys.stderr)
    if path is not None:
        _fill(Path(path), model, text, meta, bar)
        return Calibration(path)
    folder = Path(tempfile.mkdtemp())
    try:
        _fill(folder, model, text, meta, bar)
        return Calibration(folder, temporary=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _fill(folder: Path, model, text: Text, meta: dict[str, Any], bar) -> None:
    """Measures block by block what the directory does not hold yet."""
    if _claim(folder, meta):
        return
    want = frozenset(meta["want"])
    if want & OF_OUTPUT:
        gradients(model, text, folder, groups=meta["groups"], want=want, bar=bar)
    states = text.begun()
    for stage in bar(stages_of(model), desc="calibrate", unit="block"):
        prefix = stage.name
        if not prefix or (folder / f"{prefix}.done").is_file():
            states = text.through(stage, states)
            continue
        sums, stage = Sums(want, meta["sample"]), stage.here()
        states = sums.take(stage, text, states, folder)
        for name, linear in linears_of(model, stage).items():
            arrays = sums.arrays(name, linear) | _fisher(folder, f"{prefix}.{name}")
            for end, keys in (("in", arrays.keys() - OF_OUTPUT), ("out", arrays.keys() & OF_OUTPUT)):
                if keys:
                    np.savez(folder / f"{prefix}.{name}.{end}.npz", **{key: arrays[key] for key in keys})
        (folder / f"{prefix}.done").touch()
    for file in folder.glob("*.done"):
        file.unlink()
    shutil.rmtree(folder / "gradients", ignore_errors=True)
    (folder / f"{META}.begun").replace(folder / META)


def fingerprint(model) -> str:
    """Tells a model from another: shapes, types and some numbers of every weight."""
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_flatten_with_path(model)[0]:
        digest.update(f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype}".encode())
        digest.update(np.asarray(x.ravel()[:16]).tobytes())
    return digest.hexdigest()


def check(linears: dict[str, LinearInfo], want: frozenset[str], groups: int, text: Text) -> None:
    """Raises ValueError for groups that do not divide, warns of too little text."""
    uneven = [name for name, linear in linears.items() if groups < 1 or linear.N % groups]
    if "guided_hessian" in want and uneven:
        N = linears[uneven[0]].N
        raise ValueError(f"calibrate: groups must divide the outputs of {uneven[0]}, got {groups=}, {N=}")
    short = [name for name, linear in linears.items() if text.counts[linear.side] < linear.K]
    if short and want & {"hessian", "guided_hessian"}:
        names = ", ".join(short[:3]) + (", ..." if short[3:] else "")
        tokens = text.counts[linears[short[0]].side]
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


class Sums:
    """The statistics of one block, summed batch by batch."""

    def __init__(self, want: frozenset[str], sample: int):
        self.want, self.sample = want, sample
        self.sums: dict[str, dict[str, jax.Array]] = {}
        self.rows: dict[str, list[np.ndarray]] = {}
        self.tokens: dict[str, int] = {}  # by side

    def take(self, stage: Stage, text: Text, states: list[State], folder: Path) -> list[State]:
        """Takes in all batches that a block reads; gives what it leaves for the next."""
        batches = enumerate(zip(states, text.batches(), strict=True))
        return [
            self.add(stage, state, batch, _saliency(folder, stage.name, i)) for i, (state, batch) in batches
        ]

    def add(self, stage: Stage, state: State, batch: Batch, saliency: dict[str, np.ndarray]) -> State:
        """Takes in one batch; gives what the next block reads."""
        y, new, inputs = _measure(
            stage.block, stage.shared, state, batch, saliency, run=stage.run, side=stage.side, want=self.want
        )
        for name, stats in new.items():
            old = self.sums.get(name)
            self.sums[name] = stats if old is None else _add(old, stats)
        for name, (rows, part) in inputs.items():
            have = sum(len(r) for r in self.rows.get(name, []))
            real = np.asarray(rows)[np.asarray(part) != 0][: self.sample - have]
            self.rows.setdefault(name, []).append(np.asarray(real, np.float32))
        for side, part in batch.part.items():
            self.tokens[side] = self.tokens.get(side, 0) + int(np.count_nonzero(part))
        return state | {side: np.asarray(x) for side, x in y.items()}

    def stats(self, model, stage: Stage, folder: Path) -> dict[str, Stats]:
        """What was measured, by the linears' full names."""
        found = {}
        for name, linear in linears_of(model, stage).items():
            full = f"{stage.name}.{name}"
            arrays = self.arrays(linear.source, linear) | self.arrays(name, linear) | _fisher(folder, full)
            found[full] = Stats(
                **{key: jnp.asarray(x) for key, x in arrays.items()}, tokens=self.tokens[linear.side]
            )
        return found

    def arrays(self, name: str, linear: LinearInfo) -> dict[str, Any]:
        """What was measured under a linear's name, without what another speaks for."""
        found: dict[str, Any] = dict(self.sums.get(name, {}))
        if "mean" in found:
            found["mean"] = found["mean"] / self.tokens[linear.side]
        if name in self.rows:
            found["sample"] = np.concatenate(self.rows[name])
        return found


def _add(old, new):
    top = {key: jnp.maximum(old[key], new[key]) for key in old if key == "thresholds"}
    return {key: old[key] + new[key] for key in old if key != "thresholds"} | top


@partial(jax.jit, static_argnames=("run", "side", "want"))
def _measure(block, shared, state, batch, saliency, *, run, side: str, want: frozenset[str]):
    """A batch's part of each statistic, by linear; and what linears read, for the sample."""
    seen: dict[str, jax.Array] = {}

    def tap(name, array):
        if name.endswith(".in"):
            seen[name[: -len(".in")]] = array
        return array

    y = run(block, shared, state, batch, tap)
    sums: dict[str, dict[str, jax.Array]] = {}
    inputs: dict[str, tuple[jax.Array, jax.Array]] = {}
    for name, array in seen.items():
        part = batch.part[side_of(array, state, side)]
        flat = array.astype(jnp.float32).reshape(-1, array.shape[-1])
        if not any(array is seen[other] for other in inputs):  # the first that reads it speaks for the others
            inputs[name] = array, part
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


def gradients(model, text: Text, folder: Path, *, groups: int, want: frozenset[str], bar) -> None:
    """One pass backwards: each linear's saliency a token, and the sums of squared weight gradients."""
    place = folder / "gradients"
    if (place / "done").is_file():
        return
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    chain = stages_of(model)
    fisher: dict[str, np.ndarray] = {}
    for i, batch in enumerate(bar(list(text.batches()), desc="gradients", unit="batch")):
        states: list[State] = [{}]
        for stage in chain:
            states.append(stage(states[-1], batch))
        g = _top(model, states.pop(), batch)
        for stage in reversed(chain[1:]):  # nothing is asked of what embeds
            g, saliency, squares = _pull(
                stage.block,
                stage.shared,
                states.pop(),
                batch,
                g,
                run=stage.run,
                groups=groups if stage.name else 1,
                fisher="fisher" in want,
            )
            if not stage.name:
                continue
            prefix = stage.name
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
def _top(model, state, batch):
    """The gradient of the loss, a sequence's mean negative log-likelihood, at what the last block left."""

    def loss(state):
        logp = jax.nn.log_softmax(model.unembed(state["target"])[:, :-1])
        came = jnp.take_along_axis(logp, batch.tokens["target"][:, 1:, None], axis=2)[..., 0]
        real = (batch.part["target"][:, 1:] != 0).astype(jnp.float32)
        means = jnp.sum(came * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1.0)
        return -LOSS_SCALE * jnp.sum(means)  # sequences do not meet: each has its own gradient

    return jax.grad(loss)(state)


@partial(jax.jit, static_argnames=("run", "groups", "fisher"))
def _pull(block, shared, state, batch, g, *, run, groups: int, fisher: bool):
    """The gradient before a stage, each linear's saliency [B, T, g], and its squared weight gradients.

    A zero is added to each linear's output, and the loss differentiated by it. Square first, sum later: the
    saliency squares a token's gradient, the Fisher a sequence's (arXiv:2505.07004 against arXiv:2306.07629).
    """
    inputs: dict[str, jax.Array] = {}

    def through(state, zeros):
        def tap(name, array):
            own, _, end = name.rpartition(".")
            if end == "in":
                inputs[own] = array
            elif end == "out" and own in zeros:
                array = array + zeros[own]
            return array

        y = state | run(block, shared, state, batch, tap)
        return y, dict(inputs)

    def shapes(state):
        found = {}

        def tap(name, array):
            own, _, end = name.rpartition(".")
            if end == "in":
                found[own] = None
            elif end == "out" and own in found:
                found[own] = array
            return array

        run(block, shared, state, batch, tap)
        return found

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(shapes, state))
    _, pull, inputs = jax.vjp(through, state, zeros, has_aux=True)
    before, g_out = pull(g)
    saliency, squares = {}, {}
    for name, gz in g_out.items():
        gz = gz.astype(jnp.float32)
        saliency[name] = jnp.mean(jnp.square(gz.reshape(*gz.shape[:2], groups, -1)), axis=-1)
        if fisher:
            squares[name] = _sum_of_squares(gz, inputs[name].astype(jnp.float32))
    return before, saliency, squares


def _sum_of_squares(gz, x):
    """sum_b (sum_t gz[b, t, n] x[b, t, k])^2, a sequence at a time."""

    def one(total, pair):
        grad = jnp.matmul(pair[0].T, pair[1], precision=jax.lax.Precision.HIGHEST)
        return total + grad * grad, None

    zeros = jnp.zeros((gz.shape[-1], x.shape[-1]), jnp.float32)
    return jax.lax.scan(one, zeros, (gz, x))[0]
