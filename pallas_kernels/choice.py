"""Which implementation of an operation runs: one context, one rule, and no silent change of a named one.

    with kernels("xla"): ...                # the definition in jnp, on every device
    with kernels("pallas"): ...             # a kernel, or NotImplementedError
    with kernels("triton"): ...             # that backend's kernel, or NotImplementedError; also "mosaic_gpu"
    with kernels("pallas", interpret=True): ...     # numbers of the kernel on a CPU, slowly

"auto", which holds outside, takes a kernel where the program is for one NVIDIA GPU of compute capability 8.0
or more and a kernel takes the shapes, and jnp everywhere else. Mosaic kernels, whose barriers are our own, it
takes only once they have run on a GPU (`Kernel.proven`): until then they must be named. The context is part
of what `jax.jit` keys its programs by: within another one a function is traced again.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax

Implementation = Literal["auto", "xla", "pallas", "triton", "mosaic_gpu"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `kernels` was given."""

    implementation: str = "auto"  # an Implementation
    interpret: bool = False


_context = jax.make_user_context(default_value=Choice())


def kernels(implementation: str, *, interpret: bool = False):
    """A context in which every operation here runs by this implementation (the module's docstring).

    interpret: kernels run in Pallas' interpreter, on any device.
    Raises ValueError for an unknown name; operations raise NotImplementedError in a context whose
    implementation does not take their shapes, or does not run on the device.
    """
    if implementation not in get_args(Implementation):
        names = ", ".join(get_args(Implementation))
        raise ValueError(f"kernels: implementation must be one of {names}, got {implementation=}")
    return _context(Choice(implementation, interpret))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One backend's kernel for an operation.

    run(*arrays, interpret=...) computes it; why_not(*arrays) says in a few words why it does not take them,
    None if it does, by shapes and types alone; capability is the least that it was made for. proven: it ran
    on a GPU, with the right numbers; without that "auto" takes Triton's only, which places barriers itself.
    """

    name: Literal["triton", "mosaic_gpu"]
    run: Callable[..., Any]
    why_not: Callable[..., str | None]
    capability: tuple[int, int] = (8, 0)
    below: tuple[int, int] = (99, 0)
    proven: bool = False


def run(
    who: str,
    arrays: Sequence[Any],
    *,
    reference: Callable[..., Any],
    backends: Sequence[Kernel],
    implementation: Implementation | None = None,
):
    """The operation on `arrays` by the implementation that is named, in the call or around it, or is best.

    reference: what it means, in jnp; also what is differentiated, whatever runs forwards.
    backends: kernels, the preferred first.
    arrays: operands, of which the first has the rows of an activation; None stands for one left out.
    """
    choice: Choice = _context.value
    name = choice.implementation if implementation is None else implementation
    if name == "xla":
        return reference(*arrays)
    gpu = target_capability()
    if name == "auto" and (gpu is None or not _is_whole()):
        return reference(*arrays)
    reasons = []
    for backend in backends:
        if name not in ("auto", "pallas", backend.name):
            continue
        if name == "auto" and backend.name != "triton" and not backend.proven:
            continue
        reason = _not_here(backend, gpu, choice.interpret) or backend.why_not(*arrays)
        if reason is None:
            kernel = differentiable(by_backend(backend, choice.interpret), reference)
            if name == "auto":  # of a program that is lowered for a CPU beside the GPU
                return jax.lax.platform_dependent(*arrays, cuda=kernel, default=reference)
            return kernel(*arrays)
        reasons.append(f"{backend.name} {reason}")
    if name == "auto":
        return reference(*arrays)
    raise NotImplementedError(f"{who}: no {name} kernel: {'; '.join(reasons) or 'none was written'}")


def target_capability() -> tuple[int, int] | None:
    """Compute capability of the GPU that programs are compiled for by default, None without an NVIDIA GPU."""
    device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    if device.platform not in ("gpu", "cuda"):
        return None
    try:
        major, minor = str(device.compute_capability).split(".")
        return int(major), int(minor)
    except (AttributeError, ValueError):  # a GPU of another maker
        return None


def _not_here(backend: Kernel, gpu: tuple[int, int] | None, interpret: bool) -> str | None:
    """Why a backend cannot run on the target, None if it can."""
    if interpret:
        return None
    if gpu is None:
        return "runs on NVIDIA GPUs only (elsewhere with interpret=True)"
    if not backend.capability <= gpu < backend.below:
        first, end, here = (".".join(map(str, c)) for c in (backend.capability, backend.below, gpu))
        return f"was made for compute capabilities from {first} to below {end}, got {here}"
    return None


def _is_whole() -> bool:
    """Whether arrays are whole: on one GPU, or cut up by `shard_map`.

    A kernel is one call to the partitioner of `jit`, which would gather its operands on every device.
    """
    if len(jax.local_devices()) == 1 and jax.process_count() == 1:
        return True
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.axis_names) and len(mesh.manual_axes) == len(mesh.axis_names)


def by_backend(backend: Kernel, interpret: bool) -> Callable[..., Any]:
    """The kernel as a function of arrays alone."""

    def kernel(*arrays):
        return backend.run(*arrays, interpret=interpret)

    return kernel


def differentiable(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, with the gradient of the reference: whole operands have none."""

    @jax.custom_vjp
    def f(*arrays):
        return kernel(*arrays)

    def forward(*arrays):
        return kernel(*arrays), arrays

    def backward(arrays, gradient):
        return jax.vjp(reference, *arrays)[1](gradient)

    f.defvjp(forward, backward)
    return f


def rows_together(kernel: Callable[..., Any], *, stacked: Callable[..., Any] | None = None):
    """`kernel(x, *operands)`, where `vmap` over x alone makes more rows of it: operands are read once.

    kernel: takes x with any leading axes. stacked: what `vmap` over operands runs, of arrays that all have
    the new axis in front; None maps the kernel over it, one call after the other.
    """
    f = jax.custom_batching.custom_vmap(kernel)

    @f.def_vmap
    def rule(axis_size, in_batched, x, *operands):
        batched = jax.tree.leaves(in_batched[1:])
        if in_batched[0] and not any(batched):
            return f(x, *operands), True
        whole = jax.tree.map(
            lambda is_batched, a: a if is_batched else jax.numpy.broadcast_to(a, (axis_size, *a.shape)),
            in_batched,
            [x, *operands],
        )
        if stacked is None:
            return jax.lax.map(lambda arrays: f(*arrays), whole), True
        return stacked(*whole), True

    return f
