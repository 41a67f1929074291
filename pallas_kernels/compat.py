"""What differs between the versions of Pallas that are supported: the one file that asks.

Mosaic GPU's interpreter of jax 0.10 knows neither layouts nor `plgpu.load`; there, `layout_cast` is the
identity and a load is an index. Both forms give the same numbers.
"""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams  # type: ignore[attr-defined]  # 0.11 on
except ImportError:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

JAX = tuple(int(part) for part in jax.__version__.split(".")[:2])
INTERPRETER_KNOWS_LAYOUTS = JAX >= (0, 11)
LANE = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def mosaic_options(interpret: bool) -> dict[str, Any]:
    """Arguments of `plgpu.kernel`: compiled by explicit layouts, or interpreted with a look out for races."""
    return {"interpret": InterpretGPUParams(detect_races=True)} if interpret else {"compiler_params": LANE}


def lay(x: jax.Array, layout: Any, *, interpret: bool) -> jax.Array:
    """A value in this layout."""
    return x if interpret and not INTERPRETER_KNOWS_LAYOUTS else plgpu.layout_cast(x, layout)


def load(ref: Any, index: Any, layout: Any, *, interpret: bool, optimized: bool = True) -> jax.Array:
    """`ref[index]` in this layout."""
    if interpret and not INTERPRETER_KNOWS_LAYOUTS:
        return ref[index]
    where = (ref.at[index],) if JAX >= (0, 12) else (ref, index)
    return plgpu.load(*where, layout=layout, optimized=optimized)


def iota(shape: tuple[int, ...], axis: int, layout: Any, *, interpret: bool) -> jax.Array:
    """int32 numbers along an axis, in this layout."""
    if interpret and not INTERPRETER_KNOWS_LAYOUTS:
        return jax.lax.broadcasted_iota(jax.numpy.int32, shape, axis)
    return plgpu.broadcasted_iota(jax.numpy.int32, shape, axis, layout=layout)


def transposed(ref: Any) -> Any:
    """A reference [M, N] seen as [N, M]."""
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def output(shape: tuple[int, ...], dtype: Any, *inputs: Any) -> jax.ShapeDtypeStruct:
    """What a kernel gives, which within `shard_map` varies over the mesh's axes that its inputs vary over."""
    types = [jax.typeof(x).manual_axis_type for x in jax.tree.leaves(inputs)]
    varying = frozenset[Any]().union(*(t.varying for t in types))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=types[0].update(varying=varying))
