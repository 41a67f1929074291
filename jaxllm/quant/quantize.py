"""One function that turns a model into one whose weights are stored by any method, layer by layer.

    small = quantize(model, DashQ(bits=2), tokens)          # tokens [S, T], or rows, to calibrate on
    small = quantize("path/to/safetensors", DashQ(bits=2), tokens)            # never whole in memory
    small = quantize(model, [(r"mlp\\.down", Rtn(bits=8)), (r".*", Gptq(bits=4))], tokens)

A recipe is a list of (pattern, method): the first pattern that is found (re.search) in a linear's name, such
as "layers.3.mlp.down", decides; None leaves it as it is; a name that no pattern matches is an error. One
method alone takes every linear of the blocks. What lies outside of blocks stays as it is unless a pattern
spells its name, as "head" or "^embedding$" do and ".*" does not, and gives it a method that needs no
calibration. A quantized embedding is read row by row; tied, it is the head as well. Norms always stay.

In memory at a time: the model, what is finished, one block's statistics and the hidden states of the text.
With `consume` what is finished takes the model's place; from the path of a safetensors directory, only what
is finished, one block, its statistics and the states are there. Other checkpoints are read whole.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.models.layers import Embedding
from jaxllm.quant.dense import Dense
from jaxllm.quant.matmul import has_rows, num_bytes
from jaxllm.quant.source import Source, block_of, linear_variables, linear_weights, replace_weights
from jaxllm.quant.stages import in_memory
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
    consume: bool = False,
    checkpoint: str | Path | None = None,
    progress: bool = True,
):
    """The model with the weights of its linears stored by `method`, or by the methods of a recipe.

    model: a model, or what `load` takes; then it is loaded as `load(model, mapped=True)` and consumed.
    sequences: what methods that need statistics are calibrated on: token ids [S, T] or rows of different
      lengths, or a finished `Calibration` of this model.
    sequential: each block is calibrated on what the quantized blocks before it give, not the given model's.
    consume: the given model is quantized in place and returned, so that each old weight is freed as soon as
      its new one is there. A run that fails leaves it quantized in part.
    checkpoint: a directory where finished blocks are kept, so that a run that was stopped goes on there.
    batch, sample: as for `calibrate`.

    Without `consume` the given model is not changed; what is not quantized is shared. Raises ValueError
    before anything is run for a pattern that matches nothing, a linear that none matches, a weight that is
    not dense, sizes that do not fit, or statistics that are missing or another model's.
    """
    if isinstance(model, str | Path):
        from jaxllm.load import load

        (model, _), consume = load(model, mapped=True), True
    weights = linear_weights(model)
    plan = _plan(method, weights)
    source = Source(
        model,
        {name: [chosen] for name, chosen in plan.items()},
        sequences,
        sequential=sequential,
        batch=batch,
        sample=sample,
        progress=progress,
    )
    masks = _allocate(plan, weights, source)
    kept = None if checkpoint is None else _Kept(checkpoint, [repr(method), *source.identity()])
    variables = linear_variables(model) if consume else {}
    tables = {".".join(map(str, path)) for path, m in nnx.iter_modules(model) if isinstance(m, Embedding)}
    new: dict[str, Any] = {}
    for block, stats in source.blocks(new, skip=lambda block: kept is not None and kept.has(block)):
        names = [name for name in plan if block_of(name) == block]
        if kept is not None and kept.has(block):
            found = kept.read(block)
        else:
            found = {}
            for name in names:
                more = {"mask": masks[name]} if name in masks else {}
                found[name] = _solve(plan[name], weights[name], stats.get(name, Stats()), name, **more)
                if name in tables and not has_rows(found[name]):
                    made = type(found[name]).__name__
                    raise ValueError(f"quantize: {name} must be stored in rows that stand alone, got {made}")
            if kept is not None:
                kept.write(block, found)
        new |= found
        if consume:
            for name in names:
                del weights[name]
                variables[name].set_value(new[name])
        del stats  # before the next block is measured
    made = model if consume else replace_weights(model, new)
    for _, variable in nnx.to_flat_state(nnx.state(made)):  # what was mapped and is not quantized
        variable.set_value(in_memory(variable.get_value(), copy=True))
    return made


def _solve(method: Method, w: Dense, stats: Stats, name: str, **more: Any) -> Any:
    rows = in_memory(w).rows.astype(jnp.float32)
    if not bool(jnp.isfinite(rows).all()):
        raise ValueError(f"quantize: weights must be finite, got NaN or infinity in {name}")
    return method.solve(rows, stats, name=name, dtype=w.dtype, **more)


def linear_bits(model) -> float:
    """Stored bits over the number of weights, of the linears of the blocks alone."""
    weights = [w for name, w in linear_weights(model).items() if "." in name]
    return 8 * sum(map(num_bytes, weights)) / sum(w.shape[0] * w.shape[1] for w in weights)


def _plan(method: Recipe, weights: dict[str, Any]) -> dict[str, Method]:
    """What each linear is quantized by, in the model's order."""
    recipe = list(method) if isinstance(method, Sequence) else [(r"\.", method)]
    used = [False] * len(recipe)
    plan: dict[str, Method] = {}
    for name, w in weights.items():
        i = next((i for i, (pattern, _) in enumerate(recipe) if _is_of(pattern, name)), None)
        if i is None:
            if "." not in name:  # an embedding or the head, which nobody asked for
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


def _is_of(pattern: str, name: str) -> bool:
    """Whether a rule is about a linear; one outside of blocks must be called by its name."""
    return re.search(pattern, name) is not None and ("." in name or name in pattern)


def _check_sizes(name: str, method: Method, K: int, N: int) -> None:
    group, groups = getattr(method, "group", None), getattr(method, "groups", None)
    if group is not None and group > K:
        raise ValueError(f"quantize: group must be at most K of {name}, got {group=}, {K=}")
    if groups is not None and N % groups:
        raise ValueError(f"quantize: groups must divide N of {name}, got {groups=}, {N=}")


def _allocate(plan: dict[str, Method], weights: dict[str, Any], source: Source) -> dict[str, Any]:
    """What a method that spends its bits across layers gives each of them."""
    shared: dict[Any, dict[str, Any]] = {}
    for name, method in plan.items():
        if hasattr(method, "allocate"):
            shared.setdefault(method, {})[name] = None
    if not shared:
        return {}
    for block, stats in source.blocks():
        for method, gains in shared.items():
            for name in (n for n in gains if block_of(n) == block):
                known = stats.get(name, Stats())
                rows = in_memory(weights[name]).rows.astype(jnp.float32)
                gains[name] = method.gains(rows, known, name=name)
        del stats
    masks: dict[str, Any] = {}
    for method, gains in shared.items():
        masks |= method.allocate(gains, {name: weights[name].shape for name in gains})
    return masks


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

    def has(self, block: str) -> bool:
        """Whether a block is there."""
        return (self.path / f"{block}.npz").is_file()

    def read(self, block: str) -> dict[str, Any]:
        """The weights of a block by name."""
        from jaxllm.load import build

        with np.load(self.path / f"{block}.npz") as stored:
            described = json.loads(str(stored["described"]))
            get = lambda key, shape, dtype: jnp.asarray(stored[key].view(dtype).reshape(shape))  # noqa: E731
            return {name: build(what, name, get) for name, what in described.items()}

    def write(self, block: str, weights: dict[str, Any]) -> None:
        """Keeps a block; the file appears whole."""
        from jaxllm.load import arrays_of, describe

        described = {name: describe(w, name) for name, w in weights.items()}
        raw = {key: np.asarray(x) for name, w in weights.items() for key, x in arrays_of(w, name)}
        raw = {key: x.reshape(-1).view(np.uint8) for key, x in raw.items()}  # npz knows no bfloat16
        part = self.path / f"{block}.part.npz"
        np.savez(part, described=np.asarray(json.dumps(described)), **raw)  # type: ignore[arg-type]
        part.rename(self.path / f"{block}.npz")
