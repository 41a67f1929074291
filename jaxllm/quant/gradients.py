"""What needs the loss: one pass backwards through a model, block by block.

Of each linear's outputs only the mean square of the gradient per token and group is kept (arXiv:2505.07004,
Algorithm 1), and gradients of weights ("gradient") and their squares ("fisher") are summed in files.
Letters: B sequences at once, T tokens, K inputs, N outputs, g groups of consecutive outputs.
"""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxllm.models.stages import Batch, State, first_readers, without_experts
from jaxllm.models.taps import linear_io
from jaxllm.quant.stages import LinearInfo
from jaxllm.quant.text import Text
from jaxllm.storage import checksums
from jaxllm.storage.arrays import write_npz

OF_WEIGHTS = frozenset({"fisher", "gradient"})
LOSS_SCALE = 1e3  # gradients are small: keeps 16-bit ones away from the least numbers


def gradients(
    model,
    blocks: dict[str, dict[str, LinearInfo]],
    text: Text,
    folder: Path,
    *,
    output_groups: int,
    want: frozenset[str],
    bar,
) -> None:
    """One pass backwards: each linear's saliency a token, and sums of its weights' gradients [N, K].

    blocks: their linears, as `linears_by_block` gives them.
    """
    place = folder / "gradients"
    if (place / "done").is_file():
        checksums.verify("calibrate", place, _results(place), required=False)  # 0.1.0 wrote none
        return
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    chain = model.stages()
    of_weights, sums = sorted(want & OF_WEIGHTS), dict[tuple[str, str], np.ndarray]()
    for i, batch in enumerate(bar(list(text.batches()), desc="gradients", unit="batch")):
        states: list[State] = [{}]
        for stage in chain:
            states.append(stage(states[-1], batch))
        g = loss_gradient(without_experts(model), states.pop(), batch)
        for stage in reversed(chain[1:]):  # nothing is asked of what embeds
            g, found = backward_block(stage.operand, stage.shared, states.pop(), batch, g, run=stage.run)
            if not stage.name:
                continue
            readers = {one.stack_name(name): one.reader for name, one in blocks[stage.name].items()}
            saliency: dict[str, np.ndarray] = {}
            for name, gz in found.outputs.items():
                x, assigned = (read.get(readers[name]) for read in (found.inputs, found.assigned))
                if "guided_hessian" in want:
                    saliency[name] = np.asarray(_saliency(gz, groups=output_groups))
                for kind in of_weights:
                    for linear, part in _by_linear(name, _sum_over_sequences(gz, x, assigned, kind=kind)):
                        key = f"{stage.name}.{linear}", kind
                        if key not in sums:
                            file = place / "{}.{}.npy".format(*key)
                            sums[key] = np.lib.format.open_memmap(file, "w+", np.float32, part.shape)
                        sums[key] += np.asarray(part)
            if saliency:
                write_npz(place, f"{stage.name}.{i}.npz", saliency, checked=False)  # all are, at the end
    for array in sums.values():
        array.flush()  # type: ignore[attr-defined]
    checksums.write(place, _results(place))
    (place / "done").touch()


def _by_linear(name: str, found: jax.Array) -> Iterator[tuple[str, jax.Array]]:
    """A linear's sum [N, K], or each expert's by itself."""
    if found.ndim == 2:
        yield name, found
    else:
        yield from ((f"{name}.{e}", one) for e, one in enumerate(found))


def _results(place: Path) -> list[str]:
    """The files of a whole backward pass."""
    return [file.name for pattern in ("*.npz", "*.npy") for file in place.glob(pattern)]


def weight_gradients(folder: Path, name: str) -> dict[str, np.ndarray]:
    """What a backward pass left in a folder of the gradients of a linear's weights, {} where nothing is."""
    files = {kind: folder / "gradients" / f"{name}.{kind}.npy" for kind in sorted(OF_WEIGHTS)}
    return {kind: np.load(file) for kind, file in files.items() if file.is_file()}


def output_saliency(folder: Path, prefix: str, batch: int) -> dict[str, np.ndarray]:
    """The saliency of a block's linears in one batch, {} where there is none."""
    file = folder / "gradients" / f"{prefix}.{batch}.npz"
    if not file.is_file():
        return {}
    with np.load(file) as arrays:
        return dict(arrays)


@jax.jit
def loss_gradient(model, state: State, batch: Batch) -> State:
    """The gradient of the loss, a sequence's mean negative log-likelihood, at what the last block left."""

    def loss(state):
        logp = jax.nn.log_softmax(model.unembed(state["target"])[:, :-1])
        came = jnp.take_along_axis(logp, batch.tokens["target"][:, 1:, None], axis=2)[..., 0]
        real = (batch.part["target"][:, 1:] != 0).astype(jnp.float32)
        means = jnp.sum(came * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1.0)
        return -LOSS_SCALE * jnp.sum(means)  # sequences do not meet: each has its own gradient

    return jax.grad(loss)(state)


class Backward(NamedTuple):
    """What a pass backwards saw in a block, by linear."""

    inputs: dict[str, Float[Array, "*B K"]]  # by the first that reads it
    outputs: dict[str, Float[Array, "*B N"]]  # the loss differentiated by it
    assigned: dict[str, Bool[Array, "B T S X"]]  # the expert of each row of `inputs`


@partial(jax.jit, static_argnames="run")
def backward_block(
    block: Any, shared: Any, state: State, batch: Batch, g: State, *, run: Callable[..., State]
) -> tuple[State, Backward]:
    """The gradient before a stage by side, and by each of its linears' outputs.

    A zero is added to each linear's output, and the loss differentiated by it. What is made of it is left to
    programs of their own: linears of one shape share one, and XLA would compile it again for each in here.
    """

    def through(state, zeros):
        inputs: dict[str, jax.Array] = {}
        assigned: dict[str, jax.Array] = {}

        def add_zero(name, array):
            return array + zeros[name]

        y = state | run(block, shared, state, batch, linear_io(inputs, add_zero, assigned))
        return y, (first_readers(inputs), assigned)

    def shapes(state):
        outputs = {}

        def note(name, array):
            outputs[name] = array
            return array

        run(block, shared, state, batch, linear_io({}, note))
        return outputs

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(shapes, state))
    _, pull, (inputs, assigned) = jax.vjp(through, state, zeros, has_aux=True)
    before, outputs = pull(g)
    first = {name: rows for name, rows in assigned.items() if name in inputs}
    return before, Backward(inputs, outputs, first)


# Square first, sum later: the saliency squares a token's gradient, the Fisher a sequence's (arXiv:2505.07004
# against arXiv:2306.07629).
@partial(jax.jit, static_argnames="groups")
def _saliency(gz: Float[Array, "*B N"], *, groups: int) -> Float[Array, "*B g"]:
    """The mean square of the gradient of each group of consecutive outputs."""
    gz = gz.astype(jnp.float32)
    return jnp.mean(jnp.square(gz.reshape(*gz.shape[:-1], groups, -1)), axis=-1)


@partial(jax.jit, static_argnames="kind")
def _sum_over_sequences(
    gz: Float[Array, "*B N"], x: Float[Array, "*B K"], assigned: Bool[Array, "B T S X"] | None, *, kind: str
) -> Float[Array, "*X N K"]:
    """The gradients of a linear's weights, or of each expert's, or their squares ("fisher")."""
    gz, x = gz.astype(jnp.float32), x.astype(jnp.float32)
    one = partial(_sum, squared=kind == "fisher")
    return one(gz, x) if assigned is None else _by_expert(one, gz, x, assigned)


def _sum(gz: Float[Array, "B T N"], x: Float[Array, "B T K"], *, squared: bool) -> Float[Array, "N K"]:
    """sum_b of sum_t gz[b, t, n] x[b, t, k], or of its square, a sequence at a time."""

    def one(total, pair):
        grad = jnp.matmul(pair[0].T, pair[1], precision=jax.lax.Precision.HIGHEST)
        return total + (grad * grad if squared else grad), None

    zeros = jnp.zeros((gz.shape[-1], x.shape[-1]), jnp.float32)
    return jax.lax.scan(one, zeros, (gz, x))[0]


def _by_expert(
    of_rows: Callable[[jax.Array, jax.Array], jax.Array],
    gz: Float[Array, "B T S N"],
    x: Float[Array, "B T S K"],
    assigned: Bool[Array, "B T S X"],
) -> Float[Array, "X N K"]:
    """The same of each expert's own rows."""

    def rows(a):
        return a.reshape(a.shape[0], -1, a.shape[-1])

    def one(own):
        return of_rows(jnp.where(own[..., None], rows(gz), 0.0), rows(x))

    return jax.lax.map(one, jnp.moveaxis(rows(assigned), -1, 0))
