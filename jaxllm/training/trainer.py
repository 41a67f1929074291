"""Minimises any `loss(params, batch)` over any pytree, and resumes bit for bit after a kill.

What makes the resume exact: batches are a pure function of the step, the optimizer's state is saved
with the weights (`checkpoints.py`: each step appears whole or not at all), and the same compiled
step runs before and after. Exact on one machine with one version of jax; the last bits may differ
elsewhere.

The optimizer sees a flat dict {path: array} of the trained leaves, for instance
".layers[0].attention.q.w.rows"; what is not trained (integers, or not chosen by `trainable`) never
reaches `jax.grad` nor the optimizer's state.

    trained = train(loss, model, batches, optimizer=optax.adamw(1e-3), steps=100)
    plot_losses({"train": trained.losses}, "loss.png")
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxllm.training.checkpoints import Checkpoints

Loss = Callable[[Any, Any], Any]  # (params, batch) -> scalar, or (scalar, dict of scalars)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run leaves behind."""

    params: Any
    opt_state: Any
    losses: np.ndarray  # float32 [steps], those before a resume included
    aux: dict[str, float]  # of the last step
    seconds: float  # of training, over all resumes
    tokens: int  # in the batches' "tokens", over all resumes


def paths(params: Any) -> dict[str, Any]:
    """The leaves of a pytree by path, as the optimizer and `trainable` see them."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def is_float(path: str, leaf: Any) -> bool:
    """Whether a leaf can be trained at all."""
    return jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)


def _microbatches(batch: Any, accumulate: int) -> Any:
    """Leaves [B, ...] as [accumulate, B / accumulate, ...]."""

    def cut(x):
        if x.ndim == 0 or x.shape[0] % accumulate:
            raise ValueError(
                f"train: accumulate must divide each batch leaf's rows, got {accumulate=}, {x.shape=}"
            )
        return x.reshape(accumulate, x.shape[0] // accumulate, *x.shape[1:])

    return jax.tree.map(cut, batch)


def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, rebuild: Callable, accumulate: int
) -> Callable:
    """The compiled step (trained, opt_state, frozen, batch) -> (trained, opt_state, loss, aux).

    `trained` and `opt_state` are donated. Gradients are the mean over `accumulate` microbatches, of
    which one at a time is in memory.
    """

    def objective(trained, frozen, micro):
        out = loss(rebuild(trained, frozen), micro)
        value, aux = out if isinstance(out, tuple) else (out, {})
        return value.astype(jnp.float32), aux

    gradient = jax.value_and_grad(objective, has_aux=True)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained, opt_state, frozen, batch):
        if accumulate == 1:
            (value, aux), grads = gradient(trained, frozen, batch)
        else:

            def one(total, micro):
                return jax.tree.map(jnp.add, total, gradient(trained, frozen, micro)), None

            micros = _microbatches(batch, accumulate)
            shapes = jax.eval_shape(gradient, trained, frozen, jax.tree.map(lambda x: x[0], micros))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            total, _ = jax.lax.scan(one, zeros, micros)
            mean = jax.tree.map(lambda x: x / jnp.asarray(accumulate, x.dtype), total)
            (value, aux), grads = mean
        # subtle: optax's Muon and Adam mix int32 counters with floats, so strict promotion ends here
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, opt_state = optimizer.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, value, aux

    return step


def train(
    loss: Loss,
    params: Any,
    batches: Callable[[int], Any],
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    accumulate: int = 1,
    checkpoint: str | Path | None = None,
    save_every: int = 100,
    log_every: int = 10,
    progress: bool = True,
    trainable: Callable[[str, Any], bool] | None = None,
) -> Trained:
    """Runs `steps` steps, starting from the newest checkpoint in the directory `checkpoint` if any.

    loss: scalar, or (scalar, dict of scalars); means over the rows of the batch it is given.
    batches: pure function of the step; leaves have the batch's rows as first axis. An entry
      "tokens" is counted for the progress bar's tokens/s. Called one step ahead in a thread.
    accumulate: microbatches a step; divides the rows of a batch.
    trainable: chooses among the float leaves by path and value; None trains them all.
    """
    if steps < 1 or accumulate < 1 or save_every < 1 or log_every < 1:
        raise ValueError(
            "train: steps, accumulate, save_every, log_every must be at least 1, got "
            f"{steps=}, {accumulate=}, {save_every=}, {log_every=}"
        )
    trained, frozen, rebuild = _split(params, trainable)
    opt_state = _beside(jax.jit(optimizer.init)(trained), trained)
    log = _Log(steps, progress)
    saved = None if checkpoint is None else Checkpoints(checkpoint)
    if saved is not None and saved.newest() is not None:
        state, history = saved.read({"trained": trained, "opt_state": opt_state})
        trained, opt_state = state["trained"], state["opt_state"]
        log.resume(history)

    step_fn = make_step(loss, optimizer, rebuild, accumulate)
    for step, batch in _ahead(batches, log.step, steps):
        trained, opt_state, value, aux = step_fn(trained, opt_state, frozen, batch)
        log.add(value, aux, batch)
        last = step + 1 == steps
        if last or (step + 1) % log_every == 0:
            log.show(log_every)
        if saved is not None and (last or (step + 1) % save_every == 0):
            saved.write(step + 1, {"trained": trained, "opt_state": opt_state}, log.history())
    log.close()
    return Trained(
        params=rebuild(trained, frozen),
        opt_state=opt_state,
        losses=np.asarray(log.losses, np.float32),
        aux={k: float(v) for k, v in log.aux.items()},
        seconds=log.seconds(),
        tokens=log.tokens,
    )


def _split(params: Any, trainable: Callable[[str, Any], bool] | None) -> tuple[dict, dict, Callable]:
    """Copies of the leaves to train, the other leaves, and what puts both together again."""
    treedef = jax.tree.structure(params)
    every = paths(params)
    chosen = [n for n, x in every.items() if is_float(n, x) and (not trainable or trainable(n, x))]
    if not chosen:
        raise ValueError("train: at least one float leaf must be trainable, got none")
    frozen = {n: x for n, x in every.items() if n not in set(chosen)}
    trained = {n: jnp.array(every[n], copy=True) for n in chosen}  # ours to donate

    def rebuild(trained, frozen):
        return treedef.unflatten([trained[n] if n in trained else frozen[n] for n in every])

    return trained, frozen, rebuild


def _beside(opt_state: Any, trained: dict[str, jax.Array]) -> Any:
    """The state placed as the weights are, where these lie on one device.

    Zeros that depend on nothing lie nowhere in particular, and after the first step they do: that step would
    be compiled twice.
    """
    places = {x.sharding for x in trained.values()}
    one = len(places) == 1 and all(x.committed for x in trained.values())
    return jax.device_put(opt_state, places.pop()) if one else opt_state


def _ahead(batches: Callable[[int], Any], first: int, steps: int) -> Iterator[tuple[int, Any]]:
    """(step, its batch), the next batch being made in a thread meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(batches, first) if first < steps else None
        for step in range(first, steps):
            assert coming is not None
            batch = coming.result()
            coming = thread.submit(batches, step + 1) if step + 1 < steps else None
            yield step, batch


class _Log:
    """What a run remembers of itself: losses, tokens, seconds; and its progress bar."""

    def __init__(self, steps: int, progress: bool):
        self.losses: list[float] = []
        self.pending: list[jax.Array] = []  # losses still on the device
        self.aux: dict[str, jax.Array] = {}
        self.step, self.tokens, self.before = 0, 0, 0.0
        self.clock = self.mark = time.monotonic()
        self.mark_tokens = 0
        self.bar = None
        if progress:
            from tqdm import tqdm

            self.bar = tqdm(total=steps, unit="step", file=sys.stderr, dynamic_ncols=True)

    def resume(self, history: dict) -> None:
        """Goes on from what `history` gave."""
        self.step, self.losses = history["step"], history["losses"]
        self.before, self.tokens = history["seconds"], history["tokens"]
        self.mark_tokens = self.tokens
        if self.bar is not None:
            self.bar.initial = self.bar.n = self.step

    def history(self) -> dict:
        """What a checkpoint keeps."""
        self.flush()
        return {"step": self.step, "losses": self.losses, "seconds": self.seconds(), "tokens": self.tokens}

    def seconds(self) -> float:
        """How long the run has taken, earlier parts included."""
        return self.before + time.monotonic() - self.clock

    def add(self, value: jax.Array, aux: dict[str, jax.Array], batch: Any) -> None:
        """One more step."""
        self.pending.append(value)
        self.aux = aux
        self.step += 1
        if isinstance(batch, Mapping) and "tokens" in batch:
            self.tokens += int(np.size(batch["tokens"]))
        if self.bar is not None:
            self.bar.update(1)

    def flush(self) -> None:
        """Fetches the losses; raises FloatingPointError when the last is not finite."""
        self.losses.extend(float(x) for x in self.pending)
        self.pending.clear()
        if self.losses and not np.isfinite(self.losses[-1]):
            raise FloatingPointError(
                f"train: the loss must be finite, got {self.losses[-1]} by step {len(self.losses)}"
            )

    def show(self, steps: int) -> None:
        """Tells the bar of the last `steps` steps."""
        self.flush()
        now = time.monotonic()
        if self.bar is not None:
            shown = {"loss": f"{np.mean(self.losses[-steps:]):.3f}"}
            shown |= {k: f"{float(v):.3f}" for k, v in self.aux.items()}
            if self.tokens > self.mark_tokens:
                shown["tokens/s"] = f"{(self.tokens - self.mark_tokens) / max(now - self.mark, 1e-9):.0f}"
            self.bar.set_postfix(shown)
        self.mark, self.mark_tokens = now, self.tokens

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            self.bar.close()


def plot_losses(
    curves: Mapping[str, np.ndarray], path: str | Path, *, smooth: int = 50, title: str = ""
) -> None:
    """Draws loss curves (nats against steps; thin as logged, thick a running mean) to a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, losses in curves.items():
        losses = np.asarray(losses, np.float64)
        window = max(1, min(smooth, len(losses) // 4))
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        (line,) = axes.plot(np.arange(window - 1, len(losses)), mean, linewidth=1.6, label=name)
        axes.plot(losses, linewidth=0.4, alpha=0.35, color=line.get_color())
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, format="png")
