"""Decoding on a CPU with weights in fewer bits: formats side by side, and what a user would take instead.

    python benchmarks/low_bits.py --results docs/results            a random Llama of 200 M parameters
    python benchmarks/low_bits.py --python OTHER --results ...      rivals from another environment (torchao)

    decode     greedy decoding of one random model in every format, against itself in float32
               and against transformers (float32, bfloat16; torchao's int8 weights where it can be imported)
    matrices   one row times a matrix: float32, our codes, onnxruntime's MatMulNBits where it can be imported

Formats are made by rounding to nearest, or of random codes: speed is measured, not quality. Rounds are
interleaved, their order alternates; medians (least to most), ratios within a round. The first call, which
compiles, is apart.
"""

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode import SHAPE, TINY, Remote
from parts import common
from parts.common import Page, Run, Table, begin, parse, parser, ratios, rounds, save, show, timed
from tqdm import tqdm

import jaxllm as jl
from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.weights import affine, codebook, nested_float
from jaxllm.weights.dense import Dense
from jaxllm.weights.matmul import dequantize, matmul
from jaxllm.weights.planes import bit_planes

GROUP = 128
MATRICES = ((1024, 1024), (1024, 2816), (2816, 1024), (4096, 4096))


# -- formats of a model


def by_rounding(bits: int, rows: jax.Array) -> Any:
    """Affine codes."""
    return affine.quantize(rows.T, bits=bits, group_size=min(GROUP, rows.shape[1]))


def by_table(bits: int, rows: jax.Array) -> Any:
    """Evenly spaced levels of each output."""
    return codebook.encode(rows, evenly(rows, bits), bits=bits)


def by_planes(bits: int, rows: jax.Array) -> Any:
    """Planes of 3 and 4 bits, to be read at one of them."""
    codes = codebook.nearest(rows, evenly(rows, 4))
    return bit_planes.from_codes(codes, (evenly(rows, 3), evenly(rows, 4)), bits=bits)


def evenly(rows: jax.Array, bits: int) -> jax.Array:
    """Levels from the least to the greatest weight of each row."""
    at = jnp.linspace(0.0, 1.0, 2**bits)[None]
    least, most = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    return least + (most - least) * at


def as_it_is(dtype: str, rows: jax.Array) -> Any:
    """Dense rows."""
    return Dense(rows.astype(dtype))


FORMATS: dict[str, Callable[[jax.Array], Any]] = {
    "float32": partial(as_it_is, "float32"),
    "bfloat16": partial(as_it_is, "bfloat16"),
    "affine, 4 bits": partial(by_rounding, 4),
    "affine, 3 bits": partial(by_rounding, 3),
    "codebook, 4 bits": partial(by_table, 4),
    "Any-Precision at 4": partial(by_planes, 4),
    "Any-Precision at 3": partial(by_planes, 3),
    "NestedFP, fp16": partial(nested_float.encode, mode="fp16"),
    "NestedFP, fp8": partial(nested_float.encode, mode="fp8"),
}


def in_format(model: Any, name: str) -> Any:
    """The model with its linears' weights in a format."""
    rows = {n: dequantize(w).T.astype(jnp.float32) for n, w in linear_weights(model).items()}
    return replace_weights(model, {n: FORMATS[name](w) for n, w in rows.items()})


# -- measuring


def ours(model: Any, prompts: Sequence[Sequence[int]], new: int) -> dict[str, float]:
    """Seconds of a call."""
    start = time.perf_counter()
    outs = jl.generate(model, None, prompts, max_new_tokens=new, stop_tokens=(), timings=True)
    total = time.perf_counter() - start
    return {"prefill": outs[0].timings.prefill_s, "total": total}


def theirs(remote: Remote, prompts: Sequence[Sequence[int]], new: int) -> dict[str, float]:
    """Seconds of a call."""
    return remote("run", prompts=prompts, new=new)


def measure(args: argparse.Namespace) -> Run:
    """The parts asked for."""
    shape = TINY if args.tiny else SHAPE
    settings = {"model": shape, "prompt": args.prompt, "new": args.new, "rounds": args.rounds}
    run = begin(args, settings, ("transformers", "torch") if importlib.util.find_spec("torch") else ())
    if "decode" in args.what:
        run["decode"] = decode(args, shape, run)
    if "matrices" in args.what:
        run["matrices"] = matrices(args)
    save(args, run)
    return run


def decode(args: argparse.Namespace, shape: dict[str, int], run: Run) -> list[dict[str, Any]]:
    """Seconds of each format and rival at each batch."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        remotes = {}
        if importlib.util.find_spec("torch"):
            maker = Remote("transformers", args.python)
            maker("make", shape=shape, directory=folder)
            remotes["transformers, float32"] = maker
            maker("load", directory=folder, dtype="float32")
            for name, options in (("bfloat16", {}), ("torchao int8", {"int8": True})):
                remote = Remote("transformers", args.python)
                try:
                    remote("load", directory=folder, dtype="bfloat16", **options)
                    remotes[f"transformers, {name}"] = remote
                except SystemExit as error:
                    run.setdefault("left_out", {})[name] = str(error)
                    remote.close()
            model, _ = jl.load(folder, dtype="float32")
        else:
            model = random_model(shape)
        works: dict[str, Callable[..., dict[str, float]]] = {
            name: partial(theirs, remote) for name, remote in remotes.items()
        }
        made = {name: in_format(model, name) for name in args.formats}
        bits = {name: jl.report_bytes(m).bits_per_weight for name, m in made.items()}
        works |= {name: partial(ours, m) for name, m in made.items()}
        try:
            for batch in args.batch:
                seconds, first = one_batch(works, batch, shape["vocab_size"], args)
                for name in works:
                    entry = {
                        "batch": batch,
                        "what": name,
                        "seconds": seconds[name],
                        "first_call_s": first[name],
                    }
                    found.append(entry | {"bits": bits.get(name)})
        finally:
            for remote in remotes.values():
                remote.close()
    return found


def random_model(shape: dict[str, int]) -> Any:
    """Of the shape, where transformers cannot write one."""
    from flax import nnx

    from jaxllm.models.decoder import Config, Decoder

    heads = shape["num_attention_heads"]
    return Decoder(
        Config(
            layers=shape["num_hidden_layers"],
            width=shape["hidden_size"],
            heads=heads,
            kv_heads=shape["num_key_value_heads"],
            head_dim=shape["hidden_size"] // heads,
            ffn=shape["intermediate_size"],
            vocab=shape["vocab_size"],
            context=2048,
            tied=False,
        ),
        rngs=nnx.Rngs(0),
    )


def one_batch(
    works: dict[str, Callable[..., dict[str, float]]], batch: int, vocab: int, args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of decoding by round, and of the first call."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    first: dict[str, float] = {}
    bar = tqdm(total=len(works) * (args.rounds + 1), desc=f"batch {batch}", disable=not sys.stderr.isatty())
    for turn, name in rounds(works, args.rounds):
        prompts = np.random.default_rng(turn).integers(3, vocab, (batch, args.prompt)).tolist()
        got = works[name](prompts, args.new)
        bar.update(1)
        if turn == 0:
            first[name] = got["total"]
        else:
            seconds[name].append(got["total"] - got["prefill"])
    return seconds, first


def matrices(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of one row times a matrix."""
    found = []
    for K, N in ((64, 96),) if args.tiny else MATRICES:
        rng = np.random.default_rng(0)
        rows = jnp.asarray(0.02 * rng.standard_normal((N, K)), jnp.float32)
        x = jnp.asarray(rng.standard_normal((1, K)), jnp.float32)
        product = jax.jit(matmul)
        works: dict[str, Callable[[], Any]] = {
            "float32": partial(product, x, as_it_is("float32", rows)),
            "affine, 4 bits": partial(product, x, by_rounding(4, rows)),
            "affine, 3 bits": partial(product, x, by_rounding(3, rows)),
        }
        if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx") and K % GROUP == 0:
            works["onnxruntime, 4 bits"] = onnx_product(np.asarray(x), N)
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for turn, name in rounds(works, max(args.rounds, 1) * (1 if args.tiny else 5)):
            _, took = timed(works[name])
            if turn:
                seconds[name].append(took)
        found.append({"K": K, "N": N, "seconds": seconds})
    return found


def onnx_product(x: np.ndarray, N: int) -> Callable[[], Any]:
    """One MatMulNBits of random codes, in a session of its own."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    (M, K), rng = x.shape, np.random.default_rng(0)
    arrays = {
        "b": rng.integers(0, 256, (N, K // GROUP, GROUP // 2), np.uint8),
        "s": rng.standard_normal(N * K // GROUP).astype(np.float32),
    }
    node = helper.make_node(
        "MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft", K=K, N=N, bits=4, block_size=GROUP
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (M, K))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (M, N))],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=9)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return partial(session.run, None, {"x": x})


# -- the page


def page(run: Run) -> Page:
    """Tokens a second, and matrices."""
    settings = run["settings"]
    shape = settings["model"]
    text = (
        f"Random Llama-shaped weights (width {shape['hidden_size']}, {shape['num_hidden_layers']} layers, "
        f"vocabulary {shape['vocab_size']:,}) on a CPU; prompts of {settings['prompt']} tokens, "
        f"{settings['new']} new ones, {settings['rounds']} interleaved rounds; medians (least to most)."
    )
    left_out = [f"{name} is left out: {why}" for name, why in run.get("left_out", {}).items()]
    tables = []
    if "decode" in run:
        tables += [_decoding(run, batch) for batch in sorted({r["batch"] for r in run["decode"]})]
    if "matrices" in run:
        tables.append(_matrices(run["matrices"]))
    return Page("Low bits on a CPU", " ".join([text, *left_out]), tables)


def _decoding(run: Run, batch: int) -> Table:
    entries = [r for r in run["decode"] if r["batch"] == batch]
    dense = next(r for r in entries if r["what"] == "float32")
    tokens = batch * (run["settings"]["new"] - 1)
    rows = []
    for r in entries:
        speeds = [tokens / s for s in r["seconds"]]
        faster = show(ratios(dense["seconds"], r["seconds"]), 2)
        bits = "" if r["bits"] is None else f"{r['bits']:.2f}"
        rows.append((r["what"], bits, show(speeds, 1), faster, f"{r['first_call_s']:.1f}"))
    columns = {
        "weights": "of all linears; embedding and head too where a rival does so",
        "bits": "stored for a weight, of the whole model",
        "tokens a second": "while decoding",
        "times float32": "our dense float32, within a round",
        "first call": "its seconds, compilation included",
    }
    return Table(f"Batch {batch}", columns, rows)


def _matrices(found: list[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for r in found for name in r["seconds"]))
    rows = [
        (
            f"{r['K']} x {r['N']}",
            *(show([1e3 * s for s in r["seconds"][n]], 3) if n in r["seconds"] else "" for n in names),
        )
        for r in found
    ]
    columns = {"K x N": "inputs and outputs"} | dict.fromkeys(names, "milliseconds of one row times it")
    return Table("One row times a matrix", columns, rows)


def main(argv: Sequence[str] | None = None) -> None:
    made = parser("low_bits", __doc__)
    add = made.add_argument
    add("--what", nargs="+", choices=("decode", "matrices"), default=("decode", "matrices"))
    add("--formats", nargs="+", choices=tuple(FORMATS), default=tuple(FORMATS))
    add("--batch", nargs="+", type=int, default=[1, 8])
    add("--rounds", type=int, default=5)
    add("--prompt", type=int, default=32)
    add("--new", type=int, default=48)
    add("--python", default=sys.executable, help="the environment of transformers and torchao")
    tiny: dict[str, Any] = {"rounds": 1, "prompt": 4, "new": 4, "batch": [1], "formats": list(FORMATS)[:3]}
    common.main(parse(made, argv, tiny=tiny), measure, page)


if __name__ == "__main__":
    main()
