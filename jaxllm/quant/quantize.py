"""One function that turns a model into one whose weights are stored by any method, layer by layer.

    small = quantize(model, DashQ(bits=2), tokens)          # tokens [S, T], or rows, to calibrate on
    small = quantize(model, [(r"mlp\\.down", Rtn(bits=8)), (r".*", Gptq(bits=4))], tokens)

A recipe is a list of (pattern, method): the first pattern that is found (re.search) in a linear's name, such
as "layers.3.mlp.down", decides; None leaves it as it is; a name that no pattern matches is an error. One
method alone takes every linear of the blocks. Embeddings, norms and the head stay as they are; the head is
quantized only by a pattern of yours that matches "head" and a method that needs no calibration.

In memory at a time: the model, what is finished, one block's statistics and the hidden states of the text.
"""

import json
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from jaxllm.quant import calibrate as measure
from jaxllm.quant.calibrate import Calibration
from jaxllm.quant.dense import Dense
from jaxllm.quant.matmul import num_bytes
from jaxllm.quant.stats import Method, Stats

Recipe = Method | Sequence[tuple[str, Method | None]]


def quantize(
    model,
    method: Recipe,
    sequences: Any = None,
    *,
    sequential: bool = False,
    batch: int = 8,
    sample: int = 512,
    checkpoint: str | Path | None = None,
    progress: bool = True,
):
    """The model with the weights of its linears stored by `method`, or by the methods of a recipe.

    sequences: what methods that need statistics are calibrated on: token ids [S, T] or rows of different
      lengths, or a finished `Calibration` of this model.
    sequential: each block is calibrated on what the quantized blocks before it give, not the given model's.
    checkpoint: a directory where finished blocks are kept, so that a run that was stopped goes on there.
    batch, sample: as for `calibrate`.

    The given model is not changed; what is not quantized is shared. Raises ValueError before anything is run
    for a pattern that matches nothing, a linear that none matches, a weight that is not dense, sizes that do
    not fit, or statistics that are missing or another model's.
    """
    weights = linear_weights(model)
    plan = _plan(method, weights)
    source = _Source(
        model, weights, sequences, plan, sequential=sequential, batch=batch, sample=sample, progress=progress
    )
    masks = _allocate(plan, weights, source)
    kept = None if checkpoint is None else _Kept(checkpoint, [repr(method), *source.identity()])
    new: dict[str, Any] = {}
    for prefix, stats in source.layers(new):
        names = [name for name in plan if name.startswith(prefix + ".") or name == prefix]
        found = None if kept is None else kept.read(prefix)
        if found is None:
            found = {}
            for name in names:
                rows = weights[name].rows.astype(jnp.float32)
                if not bool(jnp.isfinite(rows).all()):
                    raise ValueError(f"quantize: weights must be finite, got NaN or infinity in {name}")
                more = {"mask": masks[name]} if name in masks else {}
                dtype = weights[name].dtype
                found[name] = plan[name].solve(rows, stats(name), name=name, dtype=dtype, **more)
            if kept is not None:
                kept.write(prefix, found)
        new |= found
        del stats  # before the next block is measured
    return replace_weights(model, new)


def linear_weights(model) -> dict[str, Any]:
    """The weight of every linear by the linear's name, as "layers.0.attention.q"."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path))
        if name.endswith(".w"):
            found[name.removesuffix(".w")] = variable.get_value()
    return found


def linear_bits(model) -> float:
    """Stored bits over the number of weights, of the linears of the blocks alone."""
    weights = [w for name, w in linear_weights(model).items() if "." in name]
    return 8 * sum(map(num_bytes, weights)) / sum(w.shape[0] * w.shape[1] for w in weights)


def replace_weights(model, weights: dict[str, Any]):
    """The model, or a block, with other weights in the linears named; all else is shared."""
    graph, state = nnx.split(model)
    left = dict(weights)

    def one(path, variable):
        name = ".".join(map(str, path)).removesuffix(".w")
        return variable.replace(left.pop(name)) if name in left else variable

    flat = [(path, one(path, variable)) for path, variable in nnx.to_flat_state(state)]
    if left:
        raise ValueError(f"replace_weights: names must be linears of the model, got {next(iter(left))!r}")
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _plan(method: Recipe, weights: dict[str, Any]) -> dict[str, Method]:
    """What each linear is quantized by, in the model's order."""
    recipe = list(method) if isinstance(method, Sequence) else [(r"\.", method)]
    used = [False] * len(recipe)
    plan: dict[str, Method] = {}
    for name, w in weights.items():
        i = next((i for i, (pattern, _) in enumerate(recipe) if re.search(pattern, name)), None)
        if i is None:
            if "." not in name:  # the head, which nobody asked for
                continue
            raise ValueError(f"quantize: the recipe must match every linear, got none for {name}")
        used[i] = True
        chosen = recipe[i][1]
        if chosen is None:
            continue
        if not isinstance(w, Dense):
            raise ValueError(f"quantize: {name} must be dense, got {type(w).__name__}")
        _check_sizes(name, chosen, *w.shape)
        plan[name] = chosen
    if not all(used):
        raise ValueError(f"quantize: every pattern must match a linear, got {recipe[used.index(False)][0]!r}")
    return plan


def _block_of(name: str) -> str:
    """The block that a linear belongs to: its name up to the first number, or else its first word."""
    found = re.match(r"(\w+\.)*?\d+(?=\.)|\w+", name)
    assert found is not None
    return found[0]


def _check_sizes(name: str, method: Method, K: int, N: int) -> None:
    group, groups = getattr(method, "group", None), getattr(method, "groups", None)
    if group is not None and group > K:
        raise ValueError(f"quantize: group must be at most K of {name}, got {group=}, {K=}")
    if groups is not None and N % groups:
        raise ValueError(f"quantize: groups must divide N of {name}, got {groups=}, {N=}")


def _allocate(plan: dict[str, Method], weights: dict[str, Any], source: "_Source") -> dict[str, Any]:
    """What a method that spends its bits across layers gives each of them."""
    shared: dict[Any, dict[str, Any]] = {}
    for name, method in plan.items():
        if hasattr(method, "allocate"):
            shared.setdefault(method, {})[name] = None
    if not shared:
        return {}
    for _, stats in source.layers({}):
        for method, gains in shared.items():
            for name in gains.keys() & stats.names:
                gains[name] = method.gains(weights[name].rows.astype(jnp.float32), stats(name), name=name)
        del stats
    masks: dict[str, Any] = {}
    for method, gains in shared.items():
        masks |= method.allocate(gains, {name: weights[name].shape for name in gains})
    return masks


class _Lookup:
    """The statistics of one block's linears."""

    def __init__(self, found: dict[str, Stats]):
        self.found, self.names = found, found.keys()

    def __call__(self, name: str) -> Stats:
        return self.found.get(name, Stats())


class _Source:
    """Where statistics come from: nowhere, a finished calibration, or text that goes through the blocks."""

    def __init__(self, model, weights, sequences, plan, *, sequential, batch, sample, progress):
        self.model, self.plan, self.sequential, self.sample = model, plan, sequential, sample
        self.want = frozenset().union(*(method.wants for method in plan.values()))
        self.groups = max([1, *(getattr(method, "groups", 1) for method in plan.values())])
        self.bar = partial(tqdm, disable=not progress, file=sys.stderr)
        self.given = sequences if isinstance(sequences, Calibration) else None
        self.text = self.folder = None
        if not self.want:
            return
        calibrated = [name for name, method in plan.items() if method.wants]
        outside = [name for name in calibrated if not name.startswith("layers.")]
        if outside:
            raise ValueError(f"quantize: only linears of blocks are calibrated, got {outside[0]}")
        if sequences is None:
            raise ValueError(f"quantize: {', '.join(sorted(self.want))} need calibration text, got none")
        if self.given is not None:
            self._check_given()
            return
        self.text = measure.Text.of(model, sequences, batch)
        self.blocks = {f"layers.{i}": block for i, block in enumerate(model.layers)}
        linears = {name: measure.LinearInfo(name, *weights[name].shape) for name in calibrated}
        measure.check(linears, self.want, self.groups, self.text.count)
        self.folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        if self.want & measure.OF_OUTPUT:
            measure.gradients(
                model, self.blocks, self.text, self.folder,
                groups=self.groups, want=self.want, bar=self.bar,
            )  # fmt: skip

    def identity(self) -> list[Any]:
        """What tells these statistics from others': the model, the text, and how it goes through."""
        text = None if self.text is None else self.text.digest()
        given = None if self.given is None else self.given.text
        return [measure.fingerprint(self.model), text, given, self.sequential, self.sample]

    def _check_given(self) -> None:
        missing = self.want - self.given.want
        if missing:
            raise ValueError(f"quantize: the calibration must hold {', '.join(sorted(missing))}")
        if self.given.fingerprint != measure.fingerprint(self.model):
            raise ValueError("quantize: the calibration must be of this model, got another's")
        if "guided_hessian" in self.want and self.given.groups != self.groups:
            raise ValueError(
                f"quantize: groups must be the calibration's {self.given.groups}, got {self.groups}"
            )
        if self.sequential:
            raise ValueError("quantize: sequential needs text, got a finished calibration")

    def layers(self, done: dict[str, Any]) -> Iterator[tuple[str, _Lookup]]:
        """Each block's name and statistics; `done` tells what the consumer has made of the blocks so far."""
        prefixes = list(dict.fromkeys(map(_block_of, self.plan)))
        if self.text is None:
            for prefix in self.bar(prefixes, desc="quantize", unit="block"):
                names = [name for name in self.plan if name.startswith(prefix + ".")]
                found = {name: self.given[name] for name in names} if self.given is not None else {}
                yield prefix, _Lookup(found)
            return
        states = self.text.embedded(self.model)
        for prefix in self.bar(
            [*self.blocks, *(set(prefixes) - self.blocks.keys())], desc="quantize", unit="block"
        ):
            if prefix not in self.blocks:
                yield prefix, _Lookup({})
                continue
            block = self.blocks[prefix]
            sums = measure.Sums(self.want, self.sample)
            after = sums.take(block, self.text, states, self.folder, prefix)
            yield prefix, _Lookup(sums.stats(self.model, block, self.folder, prefix))
            if self.sequential:
                own = {n.removeprefix(prefix + "."): w for n, w in done.items() if n.startswith(prefix + ".")}
                block = replace_weights(block, own)
                after = [np.asarray(measure.forward(block, x, n)) for x, n, _ in self.text.parts(states)]
            states = after


class _Kept:
    """Finished blocks of a run, a file each."""

    def __init__(self, path: str | Path, run: list[Any]):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "run.json"
        if not file.is_file():
            if any(self.path.iterdir()):
                raise ValueError(f"quantize: checkpoint must be new or empty, got {str(path)!r}")
            file.write_text(json.dumps(run))
        elif json.loads(file.read_text()) != run:
            raise ValueError(
                f"quantize: checkpoint must hold the same model, method and text, got {str(path)!r}"
            )

    def read(self, prefix: str) -> dict[str, Any] | None:
        """The weights of a block by name, or None."""
        from jaxllm.load import build

        file = self.path / f"{prefix}.npz"
        if not file.is_file():
            return None
        with np.load(file) as stored:
            described = json.loads(str(stored["described"]))
            get = lambda key, shape, dtype: jnp.asarray(stored[key].view(dtype).reshape(shape))  # noqa: E731
            return {name: build(what, name, get) for name, what in described.items()}

    def write(self, prefix: str, weights: dict[str, Any]) -> None:
        """Keeps a block; the file appears whole."""
        from jaxllm.load import arrays_of, describe

        described = {name: describe(w, name) for name, w in weights.items()}
        raw = {key: np.asarray(x) for name, w in weights.items() for key, x in arrays_of(w, name)}
        raw = {key: x.reshape(-1).view(np.uint8) for key, x in raw.items()}  # npz knows no bfloat16
        part = self.path / f"{prefix}.part.npz"
        np.savez(part, described=np.asarray(json.dumps(described)), **raw)  # type: ignore[arg-type]
        part.rename(self.path / f"{prefix}.npz")
