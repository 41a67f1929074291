"""Does a GPU's compiler hold quantized weights unpacked during decoding? Answered without a GPU.

    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 JAX_PLATFORMS= \\
        python benchmarks/gpu_decode_memory.py --results docs/results

A greedy decoding loop is compiled ahead of time for an H100 that need not be there, for every weight format
at two depths, and its temporary memory is given in float32 blocks (one block's linears
unpacked). Memory that grows with the depth is a model that is unpacked as a whole. Needs the wheels
jax-cuda13-plugin and jax-cuda13-pjrt of jax's version, and nvidia-cuda-nvcc and nvidia-nvvm. What is compiled
without a device is not autotuned: bytes are those of this compilation, not of a measured run. --tiny compiles
small models for the CPU at hand, which needs none of that.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from parts import common
from parts.common import Page, Run, Table, begin, parse, parser, save
from tqdm import tqdm

import jaxllm as jl
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.quant.statistics import Stats
from jaxllm.weights import affine, codebook
from pallas_kernels.gpus import GPUS


def ones(K: int) -> Stats:
    """Statistics of inputs that are all alike."""
    return Stats(hessian_diag=jnp.ones(K), thresholds=jnp.linspace(3.0, 0.01, K), tokens=64)


def solved(method: Any) -> Callable[[jax.Array], Any]:
    """The format that a method gives."""
    return lambda rows: method.quantize(rows, ones(rows.shape[1]), name="w", dtype=jnp.bfloat16)


FORMATS: dict[str, Callable[[jax.Array], Any]] = {
    "affine, 4 bits": solved(jl.Rtn(bits=4, group_size=128)),
    "affine, 3 bits": solved(jl.Rtn(bits=3, group_size=128, integer_zero_point=False)),
    "affine, 8 bits, a scale an output": lambda rows: affine.quantize(
        rows.T, bits=8, group_size=rows.shape[1], symmetric=True
    ),
    "codebook, 3 bits": lambda rows: codebook.encode(
        rows, jnp.linspace(-0.3, 0.3, 8)[None] * jnp.ones((rows.shape[0], 1)), bits=3, dtype=jnp.bfloat16
    ),
    "2/4/16 bits": solved(jl.MixedTwoBit()),
    "NestedFP, fp16": solved(jl.NestedFp()),
    "NestedFP, fp8": solved(jl.NestedFp(mode="fp8")),
    "DecDEC on 3 bits": solved(jl.DecDec(base=jl.Rtn(bits=3, group_size=128), k_chunk=32)),
}


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A method that is only a format, made once a shape."""

    made: dict[tuple[int, int], Any]
    required_stats = frozenset[str]()

    def quantize(self, rows, stats, *, name, dtype):
        return self.made[rows.shape]


@jax.jit
def decode(model, cache, token, steps):
    """Greedy tokens after `token` [B]."""

    def step(_, state):
        token, cache = state
        logits, cache = model(token[:, None], cache, logits="last")
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, steps, step, (token, cache))


def temporary(make: Callable[[jax.Array], Any], layers: int, device, args) -> int:
    """Bytes that the compiled decoding loop of a model in this format holds beside its arguments."""
    D, F = args.width, args.ffn
    config = dataclasses.replace(
        TINY, layers=layers, width=D, heads=D // 64, kv_heads=D // 64, head_dim=64, ffn=F, vocab=1024
    )
    model = Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    shapes = ((D, D), (F, D), (D, F))
    model = jl.quantize(model, Fixed({s: make(jnp.full(s, 0.01)) for s in shapes}), progress=False)
    begun = jax.eval_shape(lambda m: m(jnp.zeros((1, 1), jnp.int32), m.make_cache(1, 16))[1], model)

    def abstract(x):
        kind = getattr(getattr(x, "sharding", None), "memory_kind", None)
        place = jax.sharding.SingleDeviceSharding(
            device, memory_kind="pinned_host" if kind == "pinned_host" else None
        )
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    given = (model, begun, jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32))
    with jax.default_device(device):
        program = decode.lower(*jax.tree.map(abstract, given)).compile()
    return program.memory_analysis().temp_size_in_bytes


def measure(args: argparse.Namespace) -> Run:
    """All formats at both depths."""
    device = jax.devices("cpu")[0] if args.tiny else h100()
    block = 4 * (4 * args.width**2 + 3 * args.width * args.ffn)
    settings = {"width": args.width, "ffn": args.ffn, "layers": args.layers, "block_bytes": block}
    settings["compiled_for"] = "the CPU at hand" if args.tiny else "an H100 (ahead of time, no device)"
    run = begin(args, settings) | {"results": []}
    for name in tqdm(args.only, "formats", file=sys.stderr):
        found = [temporary(FORMATS[name], layers, device, args) / block for layers in args.layers]
        run["results"].append({"format": name, "blocks": found})
        save(args, run)
    return run


def h100() -> Any:
    """A device that is compiled for and need not be there."""
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="h100",
            topology="1x1x1",
            target_config=GPUS["h100"].target_config(),
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SystemExit(
            "gpu_decode_memory.py: jax's CUDA plugin must be there and JAX_PLATFORMS empty, got "
            f"JAX_PLATFORMS={jax.config.jax_platforms!r}: {reason}"
        ) from error
    return topology.devices[0]


def page(run: Run) -> Page:
    """A table of formats."""
    settings = run["settings"]
    columns = {"format": "how the linears of all blocks are stored"}
    held = "bytes beside the arguments, in blocks of float32; where they grow, a model is unpacked whole"
    columns |= {f"{layers} layers": held for layers in settings["layers"]}
    rows = [(r["format"], *(f"{x:.3f}" for x in r["blocks"])) for r in run["results"]]
    text = (
        f"Temporary memory of a greedy decoding loop compiled for {settings['compiled_for']}; width "
        f"{settings['width']}, feed-forward {settings['ffn']}."
    )
    return Page("Memory of decoding on a GPU", text, [Table("Temporary memory", columns, rows)])


def main(argv: Sequence[str] | None = None) -> None:
    made = parser("gpu_decode_memory", __doc__)
    add = made.add_argument
    add("--layers", type=int, nargs=2, default=[2, 6], help="two depths")
    add("--width", type=int, default=1024)
    add("--ffn", type=int, default=2816)
    add("--only", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    tiny = {"layers": [1, 2], "width": 128, "ffn": 256, "only": ["affine, 4 bits", "codebook, 3 bits"]}
    common.main(parse(made, argv, tiny=tiny), measure, page)


if __name__ == "__main__":
    main()
