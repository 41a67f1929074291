"""Compiles every case for GPUs that are not there, and says what the machine code is (check C).

    python -m pallas_kernels.aot                       # all cases for all their GPUs, as a table
    python -m pallas_kernels.aot --gpu h100 --case "dequant_gemm"
    python -m pallas_kernels.aot --write               # AOT.json and AOT.md beside this file
    python -m pallas_kernels.aot --check               # exit status 1 where they differ, or anything spills

Needs the environment of `.ci/aot.txt`: jax with its CUDA plugin, and ptxas and nvdisasm from wheels; neither
driver nor GPU. One process compiles for one GPU: a second one in the same process would be compiled wrongly.
An instruction that the GPU lacks ends LLVM's process; the rest of the cases then go on in a new one.

A pass says that compilers take the code, and what it is made of. It says nothing of numbers, races or speed.
The model: how long bytes, instructions and tensor cores take at the data sheet's rates (`gpus.py`), each
alone; the longest bounds the kernel. An H200 runs what is compiled for an H100, with more bandwidth.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.case import Case
from pallas_kernels.cases import all_cases
from pallas_kernels.gpus import GPUS, Gpu
from pallas_kernels.sass import largest_loop

HERE = Path(__file__).parent
STORED = HERE / "AOT.json"
BUILDS = tuple(gpu for gpu in GPUS if gpu != "h200")  # which runs what an H100 does
XLAS_OWN = re.compile(r"(loop|input|wrapped|fusion|copy|transpose|broadcast|gemm_fusion|triton_softmax)[_\d]")
PTXAS = re.compile(
    r"Compiling entry function '([^']+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One kernel of a case for one GPU; error says why there is none."""

    case: str
    gpu: str
    kernel: str = ""
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    loop: int = 0  # instructions of the largest innermost loop, a turn
    per_unit: float = 0.0  # instructions of a thread for one unit (weight, pair, point)
    kinds: dict[str, int] = dataclasses.field(default_factory=dict)
    error: str | None = None


def cases_for(gpu: str) -> list[str]:
    """Names of the cases that are compiled: for a Hopper all, for others two of each operation."""
    names = [name for name, case in all_cases().items() if gpu in case.gpus]
    if gpu == "h100":
        return names
    by_operation: dict[str, list[str]] = {}
    for name in names:
        by_operation.setdefault(re.split(r"[ ,]", name)[0], []).append(name)
    return [name for of_one in by_operation.values() for name in of_one[:2]]


def compile_here(names: Sequence[str], gpu: str, folder: Path) -> None:
    """Compiles cases one after the other; PTX and sizes go to a folder for each."""
    from jax.experimental import topologies  # of the plugin, which this process alone may load

    config = GPUS[gpu].target_config()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=gpu, topology="1x1x1", target_config=config
    )
    device = topology.devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    cases = all_cases()
    for i, name in enumerate(names):
        case, here = cases[name], folder / str(i)
        here.mkdir()
        (here / "started").touch()
        os.environ["MOSAIC_GPU_DUMP_TO"] = str(here)

        def run(*arrays, case=case):
            return case.run(*arrays)

        run.__name__ = f"case_{i}"
        arrays = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tuple(case.arrays)
        )
        try:
            with jax.default_device(device):
                jax.jit(run).lower(*arrays).compile()
        except Exception as error:  # whatever a compiler finds is the answer
            (here / "error").write_text(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
        (here / "done").touch()


def compile_for(gpu: str, names: Sequence[str]) -> list[Compiled]:
    """All kernels of the cases, in new processes."""
    found: list[Compiled] = []
    left = list(names)
    while left:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            done = subprocess.run(
                [sys.executable, "-m", "pallas_kernels.aot", "--child", gpu, scratch, *left],
                env=environment(folder),
                cwd=HERE.parent,
                text=True,
                errors="replace",
                capture_output=True,
            )
            reached = 0
            for i, name in enumerate(left):
                if not (folder / str(i) / "started").exists():
                    break
                reached = i + 1
                found += of_case(name, gpu, folder, i, done.stderr)
            if not reached:
                raise SystemExit(f"aot: nothing was compiled for {gpu}:\n{done.stderr[-2000:]}")
            left = left[reached:]
    return found


def environment(folder: Path) -> dict[str, str]:
    """Of a process that compiles: the plugin without its checks, PTX kept, no compilation cache."""
    return {
        **os.environ,
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAX_PLATFORMS": "",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_RESOURCES": "1",
        # of what emitters can write only this: with all passes it takes six times as long
        "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_emitter_re=ptx",
    }


def of_case(name: str, gpu: str, folder: Path, i: int, log: str) -> list[Compiled]:
    """What was compiled for one case."""
    here = folder / str(i)
    if (here / "error").exists():
        return [Compiled(name, gpu, error=(here / "error").read_text()[:300])]
    if not (here / "done").exists():
        reason = re.findall(r"LLVM ERROR: .*|Fatal Python error.*", log)
        return [Compiled(name, gpu, error=reason[-1] if reason else "the compiler's process ended")]
    case = all_cases()[name]
    kernels = [kernel for ptx in sorted(here.glob("*.ptx")) for kernel in assemble(ptx, case, gpu)]
    for ptx in sorted(folder.glob(f"module_*.jit_case_{i}.*ptx")):
        kernels += assemble(ptx, case, gpu)
    sizes = {}
    for path in folder.glob(f"module_*.jit_case_{i}.*thunk_sequence*"):
        for kernel, size in re.findall(r"(\S+) grid: .*?shared_memory: (\d+)", path.read_text()):
            sizes[kernel] = int(size)
    scratch = [
        int(size)
        for path in sorted(here.glob("*.resources.txt"))
        for size in re.findall(r"smem_scratch_bytes=(\d+)", path.read_text())
    ]
    found = []
    for kernel in kernels:
        shared = sizes.get(kernel.kernel, kernel.shared_bytes)
        if kernel.kernel.endswith("_mosaic_gpu_kernel") and scratch:
            shared = scratch.pop(0)
        found.append(dataclasses.replace(kernel, shared_bytes=shared))
    own = [kernel for kernel in found if not XLAS_OWN.match(kernel.kernel)]
    return own or [Compiled(name, gpu, error="no kernel but XLA's own")]


def assemble(ptx: Path, case: Case, gpu: str) -> list[Compiled]:
    """ptxas' and nvdisasm's answer to a file of PTX."""
    cubin = ptx.with_suffix(".cubin")
    said = tool("ptxas", f"-arch={GPUS[gpu].arch}", "-v", str(ptx), "-o", str(cubin))
    sections = re.split(r"^\s*\.section\s+\.text\.", tool("nvdisasm", "-c", str(cubin)), flags=re.M)
    found = []
    for name, stores, loads, registers in PTXAS.findall(said):
        section = next((s for s in sections if s.startswith(f"{name},")), "")
        loop = largest_loop(section, above=case.loops_above)
        found.append(
            Compiled(
                case.name,
                gpu,
                kernel=name,
                registers=int(registers),
                spill_bytes=int(stores) + int(loads),
                loop=0 if loop is None else loop.instructions,
                per_unit=0.0 if loop is None else round(loop.instructions / case.units_per_turn, 3),
                kinds={} if loop is None else loop.kinds,
            )
        )
    return found


def tool(name: str, *arguments: str) -> str:
    """What a program of the CUDA wheels prints."""
    path = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin" / name
    if not path.exists():
        raise SystemExit(f"aot: {name} must be there, by the wheels of .ci/aot.txt, got no {path}")
    done = subprocess.run([str(path), *arguments], text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"aot: {name} {arguments[-1]}: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout + done.stderr


def bounds(case: Case, compiled: Compiled, gpu: Gpu) -> dict[str, float]:
    """Least microseconds by each resource."""
    eight = "fp8" in case.name and gpu.tensor8 is not None
    tensor = gpu.tensor8 if eight and gpu.tensor8 is not None else gpu.tensor16
    return {
        "memory": 1e6 * case.num_bytes / gpu.bandwidth,
        "instructions": 1e6 * case.units * compiled.per_unit / (128 * gpu.cores * gpu.clock),
        "tensor cores": 1e6 * case.operations / tensor if compiled.kinds.get("tensor") else 0.0,
    }


def main_kernel(kernels: Iterable[Compiled]) -> Compiled:
    """The kernel with the most instructions in a loop: others prepare or add up."""
    return max(kernels, key=lambda kernel: kernel.loop)


def page(rows: Sequence[Compiled], versions: dict[str, str]) -> str:
    """AOT.md."""
    cases = all_cases()
    text = [
        "# Machine code of the kernels",
        "",
        "Made by `python -m pallas_kernels.aot --write`, nothing here ran on a GPU. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
        "| case | GPU | registers | spilled | shared | loop | a unit | of them |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r.error:
            text.append(f"| {r.case} | {r.gpu} | {r.error} | | | | | |")
            continue
        kinds = ", ".join(f"{n} {k}" for k, n in sorted(r.kinds.items(), key=lambda item: -item[1]))
        shared = f"{r.shared_bytes:,}"
        text.append(
            f"| {r.case}: {r.kernel} | {r.gpu} | {r.registers} | {r.spill_bytes} | {shared} "
            f"| {r.loop} | {r.per_unit:.2f} | {kinds} |"
        )
    text += [
        "",
        "registers: of a thread; spilled, shared: bytes; loop: instructions in one turn of the largest "
        "innermost loop; a unit: instructions of a thread for one weight, cached pair or point.",
        "",
        "## What bounds them, by data sheets",
        "",
        "Least microseconds if each resource were the only one. Not measured.",
        "",
        "| case | GPU | bytes | instructions | tensor cores | bound by |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        for gpu in ("h100", "h200", "a100", "l4"):
            compiled = [r for r in rows if r.case == name and r.gpu == gpu.replace("h200", "h100")]
            if not compiled or any(r.error for r in compiled):
                continue
            times = bounds(case, main_kernel(compiled), GPUS[gpu])
            least = max(times, key=lambda key: times[key])
            shown = " | ".join(f"{t:.1f}" for t in times.values())
            text.append(f"| {name} | {gpu} | {shown} | {least} |")
    return "\n".join(text) + "\n"


def versions() -> dict[str, str]:
    """Of what compiles."""
    from importlib.metadata import version

    return {name: version(name) for name in ("jax", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "nvidia-nvvm")}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        "python -m pallas_kernels.aot", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gpu", action="append", choices=BUILDS)
    parser.add_argument("--case", default="", help="only cases whose name has this in it")
    parser.add_argument("--write", action="store_true", help="AOT.json and AOT.md")
    parser.add_argument("--check", action="store_true", help="compare with AOT.json")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        gpu, scratch, *names = options.child
        compile_here(names, gpu, Path(scratch))
        return 0
    jax.config.update("jax_platforms", "cpu")  # this process reads cases only
    chosen = {gpu: [name for name in cases_for(gpu) if options.case in name] for gpu in options.gpu or BUILDS}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # of processes: a GPU each
        found = pool.map(compile_for, chosen, chosen.values())
    rows = [row for of_gpu in found for row in of_gpu]
    print(page(rows, versions()))
    bad = [r for r in rows if r.error or r.spill_bytes]
    stored = json.loads(STORED.read_text()) if STORED.exists() else {"versions": versions(), "kernels": []}
    if options.write:
        whole = together(rows, stored)
        record = {"versions": versions(), "kernels": [dataclasses.asdict(r) for r in whole]}
        STORED.write_text(json.dumps(record, indent=1) + "\n")
        STORED.with_suffix(".md").write_text(page(whole, versions()))
    if options.check:
        bad += differences(rows, stored)
    for r in bad:
        print(
            f"aot: {r.gpu} {r.case} {r.kernel}: {r.error or f'{r.spill_bytes} bytes spilled'}",
            file=sys.stderr,
        )
    return 1 if bad else 0


def together(rows: Sequence[Compiled], stored: dict[str, Any]) -> list[Compiled]:
    """What was compiled now, and of what is stored the other cases that there still are, in their order."""
    done = {(r.case, r.gpu) for r in rows}
    wanted = [(name, gpu) for gpu in BUILDS for name in cases_for(gpu)]
    if stored["versions"] != versions():
        stored = {"kernels": []}
    kept = [r for r in (Compiled(**r) for r in stored["kernels"]) if (r.case, r.gpu) not in done]
    place = {pair: i for i, pair in enumerate(wanted)}
    return sorted((r for r in (*rows, *kept) if (r.case, r.gpu) in place), key=lambda r: place[r.case, r.gpu])


def differences(rows: Sequence[Compiled], stored: dict[str, Any]) -> list[Compiled]:
    """Kernels that are not as stored; what is stored and was not compiled counts as one."""
    if stored["versions"] != versions():
        raise SystemExit(f"aot: AOT.json needs {stored['versions']}, got {versions()}")
    was = {(r["case"], r["gpu"], r["kernel"]): Compiled(**r) for r in stored["kernels"]}
    found = []
    for r in rows:
        old = was.pop((r.case, r.gpu, r.kernel), None)
        if r != old and not r.error:
            found.append(dataclasses.replace(r, error=f"differs from what is stored, {old}"))
    asked = {(r.case, r.gpu) for r in rows}
    return found + [
        dataclasses.replace(r, error="is stored and not there")
        for r in was.values()
        if (r.case, r.gpu) in asked
    ]


if __name__ == "__main__":
    sys.exit(main())
