"""Does a GPU's compiler hold quantized weights unpacked during decoding? Answered without a GPU.

    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 JAX_PLATFORMS= python benchmarks/gpu_decode_memory.py --out results/

The decoding loop of `jl.generate` is compiled ahead of time for an H100 that need not be there, for every
weight format at two depths, and its temporary memory is given in float32 blocks (one block's linears
unpacked). Memory that grows with the depth is a model that is unpacked as a whole. Needs the wheels
jax-cuda13-plugin and jax-cuda13-pjrt of jax's version, and nvidia-cuda-nvcc and nvidia-nvvm. What is compiled
without a device is not autotuned: bytes are those of this compilation, not of a measured run.
"""

import argparse
import dataclasses
import datetime
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies

import jaxllm as jl
from jaxllm.decoding import loop
from jaxllm.decoding.run import _keys
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.quant.statistics import Stats
from jaxllm.weights import affine, codebook

WIDTH, FFN = 1024, 2816
H100 = """
gpu_device_info {
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.7
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 device_memory_size: 85899345920
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 patch: 0 } runtime_version { major: 13 minor: 0 patch: 0 }
"""


def ones(K: int) -> Stats:
    """Statistics of inputs that are all alike."""
    return Stats(hessian_diag=jnp.ones(K), thresholds=jnp.linspace(3.0, 0.01, K), tokens=64)


def solved(method: Any) -> Callable[[jax.Array], Any]:
    """The format that a method gives."""
    return lambda rows: method.solve(rows, ones(rows.shape[1]), name="w", dtype=jnp.bfloat16)


FORMATS: dict[str, Callable[[jax.Array], Any]] = {
    "affine, 4 bits": solved(jl.Rtn(bits=4, group=128)),
    "affine, 3 bits": solved(jl.Rtn(bits=3, group=128, zero_code=False)),
    "affine, 8 bits, a scale an output": lambda rows: affine.quantize(
        rows.T, bits=8, group=rows.shape[1], symmetric=True
    ),
    "codebook, 3 bits": lambda rows: codebook.encode(
        rows, jnp.linspace(-0.3, 0.3, 8)[None] * jnp.ones((rows.shape[0], 1)), bits=3, dtype=jnp.bfloat16
    ),
    "2/4/16 bits": solved(jl.MixedTwoBit()),
    "NestedFP, fp16": solved(jl.NestedFp()),
    "NestedFP, fp8": solved(jl.NestedFp(mode="fp8")),
    "DecDEC on 3 bits": solved(jl.DecDec(base=jl.Rtn(bits=3, group=128), k_chunk=32)),
}


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A method that is only a format, made once a shape."""

    made: dict[tuple[int, int], Any]
    wants = frozenset[str]()

    def solve(self, rows, stats, *, name, dtype):
        return self.made[rows.shape]


def temporary(make: Callable[[jax.Array], Any], layers: int, device) -> int:
    """Bytes that the compiled decoding loop of a model in this format holds beside its arguments."""
    config = dataclasses.replace(
        TINY, layers=layers, width=WIDTH, heads=16, kv_heads=16, head_dim=64, ffn=FFN, vocab=1024
    )
    model = Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    shapes = ((WIDTH, WIDTH), (FFN, WIDTH), (WIDTH, FFN))
    model = jl.quantize(model, Fixed({s: make(jnp.full(s, 0.01)) for s in shapes}), progress=False)
    request, state = jax.eval_shape(started, model)
    step = jax.ShapeDtypeStruct((), jnp.int32)

    def abstract(x):
        kind = getattr(getattr(x, "sharding", None), "memory_kind", None)
        place = jax.sharding.SingleDeviceSharding(
            device, memory_kind="pinned_host" if kind == "pinned_host" else None
        )
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    arguments = jax.tree.map(abstract, (model, request, state, step))
    with jax.default_device(device):
        program = loop._decode.lower(*arguments).compile()
    return program.memory_analysis().temp_size_in_bytes


def started(model):
    """A run of one request about to enter the loop."""
    request = loop._Request(
        budgets=jnp.ones((1,), jnp.int32),
        keys=_keys(0, 1),
        stop_tokens=jnp.zeros((1,), jnp.int32),
        plan=jl.Sampler().plan(),
        memory=None,
    )
    tokens, lengths = jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32)
    logits, cache = model(tokens, model.make_cache(1, 16), lengths=lengths, logits="last")
    return request, loop._first(model, request, tokens, lengths, logits, cache, N=8, logprobs=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 6])
    parser.add_argument("--only", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    args = parser.parse_args()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
    )
    block = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * FFN)
    rows = []
    for name in args.only:
        found = [temporary(FORMATS[name], layers, topology.devices[0]) / block for layers in args.layers]
        rows.append({"format": name, "blocks": found})
        print(name, [round(x, 3) for x in found], flush=True)
    run = {
        "date": datetime.date.today().isoformat(),
        "compiled_for": "H100 (ahead of time, no device)",
        "jax": version("jax"),
        "layers": args.layers,
        "block_bytes": block,
        "results": rows,
    }
    few, many = args.layers
    lines = [
        "# Temporary memory of the decoding loop, in blocks of float32",
        "",
        f"{run['date']}, jax {run['jax']}, compiled for {run['compiled_for']}; width {WIDTH}, ffn {FFN}.",
        "",
        f"| format | {few} layers | {many} layers |",
        "|---|---|---|",
        *(f"| {r['format']} | {r['blocks'][0]:.3f} | {r['blocks'][1]:.3f} |" for r in rows),
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu_decode_memory.json").write_text(json.dumps(run, indent=1) + "\n")
    (args.out / "gpu_decode_memory.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
