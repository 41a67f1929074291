"""One function that turns a model into one whose weights are stored by any method, layer by layer.

    small = quantize(model, DashQ(bits=2), tokens)          # tokens [S, T], or rows, to calibrate on
    small = quantize("path/to/safetensors", DashQ(bits=2), tokens)            # never whole in memory
    small = quantize(model, [(r"mlp\\.down", Rtn(bits=8)), (r".*", Gptq(bits=4))], tokens)

A recipe is a list of (pattern, method): the first pattern that is found (re.search) in a linear's name, such
as "layers.3.mlp.down", decides; None leaves it as it is; a name that no pattern matches is an error. One
method alone takes every linear of the blocks. What lies outside of blocks stays as it is unless a pattern
spells its name, as "head" or "^embedding$" do and ".*" does not, and gives it a method that needs no
calibration. A quantized embedding is read row by row; tied, it is the head as well. Norms always stay, and so
do routers. "layers.3.mlp.up" is that linear of all experts of a layer: each is quantized by what its own
tokens said, and all are stored alike.

In memory at a time: the model, what is finished, one block's statistics and the hidden states of the text.
With `consume` what is finished takes the model's place; from the path of a safetensors directory, only what
is finished, one block, its statistics and the states are there. Other checkpoints are read whole.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxllm.models.layers import Embedding
from jaxllm.models.linears import block_of, in_memory, linear_variables, linear_weights, replace_weights
from jaxllm.quant.checkpoint import BlockCheckpoint
from jaxllm.quant.recipe import Recipe, methods_by_linear
from jaxllm.quant.source import CalibrationStream
from jaxllm.quant.statistics import Allocator, Method, Stats, output_groups_of
from jaxllm.weights.affine import all_finite
from jaxllm.weights.experts import Experts, members, parts, stack
from jaxllm.weights.matmul import can_gather_rows


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
        from jaxllm.files import load

        (model, _), consume = load(model, mapped=True), True
    weights = linear_weights(model)
    plan = methods_by_linear(method, weights)
    source = CalibrationStream(
        model,
        {own: chosen.required_stats for name, chosen in plan.items() for own in members(name, weights[name])},
        sequences,
        output_groups=output_groups_of(*plan.values()),
        sequential=sequential,
        batch=batch,
        sample=sample,
        progress=progress,
    )
    masks = _allocate(plan, weights, source)
    kept = None if checkpoint is None else BlockCheckpoint(checkpoint, model, repr(method), source.identity())
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
                found[name] = _solve(plan[name], weights[name], stats, name, **more)
                if name in tables and not can_gather_rows(found[name]):
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


def _solve(method: Method, w: Any, stats: Mapping[str, Stats], name: str, **more: Any) -> Any:
    """The weight by a method; experts one by one, with what is random the same, for they are stored alike."""
    made = []
    for own, one in zip(members(name, w), parts(w), strict=True):
        rows = in_memory(one).rows.astype(jnp.float32)
        if not all_finite(rows):
            raise ValueError(f"quantize: weights must be finite, got NaN or infinity in {own}")
        made.append(method.quantize(rows, stats.get(own, Stats()), name=name, dtype=w.dtype, **more))
    return stack(made) if isinstance(w, Experts) else made[0]


def _allocate(plan: dict[str, Method], weights: dict[str, Any], source: CalibrationStream) -> dict[str, Any]:
    """What a method that spends its bits across layers gives each of them; each expert has the same."""
    shared: dict[Any, dict[str, Any]] = {}
    for name, method in plan.items():
        if isinstance(method, Allocator) and not isinstance(weights[name], Experts):  # these are stored alike
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
