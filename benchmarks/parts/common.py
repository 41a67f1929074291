"""What all benchmarks share: their options, the machine, rounds and medians, and the page a run becomes.

    python benchmarks/NAME.py [options] --results docs/results   measures; writes NAME.json and NAME.md
    python benchmarks/NAME.py --render NAME.json                 writes the page of a finished run again
    python benchmarks/NAME.py --tiny                             shows that it runs; its numbers mean nothing

A benchmark is a function `measure(args)` that gives a run and a function `page(run)` that gives a `Page`;
`main` puts them together. A run is JSON: a head that `begin` fills (command line, date, machine, versions)
and what was measured. Pages are made from runs alone.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import importlib.resources
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tabulate import tabulate

import jaxllm as jl
from jaxllm.models.decoder import Config, Decoder
from jaxllm.training.pico.corpus import Text, read

Run = dict[str, Any]
TINY = Config(
    layers=2, width=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=1024, tied=True, context=1024
)  # of `--tiny`: with pico's vocabulary and random weights


# -- options


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """The options of every benchmark; `doc`'s first line says what it measures."""
    made = argparse.ArgumentParser(
        prog=f"{name}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--tiny", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    made.add_argument("--results", type=Path, metavar="FOLDER", help=f"gets {name}.json and {name}.md")
    made.add_argument("--render", type=Path, metavar="JSON", help="measure nothing: the page of this run")
    made.set_defaults(name=name, command="")
    return made


def add_data(made: argparse.ArgumentParser) -> None:
    """Options of benchmarks that read pico's texts; see `texts`."""
    made.add_argument("--data", type=Path, help="directory of the texts that pico's corpus is made of")
    made.add_argument("--stories", type=Path, help="the file of stories given to pico's training")


def parse(
    made: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    *,
    tiny: Mapping[str, Any] | None = None,
    needs: Sequence[str] = (),
) -> argparse.Namespace:
    """The options given.

    tiny: defaults under --tiny. needs: options that must be given where something real is measured.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--tiny" in argv:
        made.set_defaults(**(tiny or {}))
    args = made.parse_args(argv)
    args.command = shlex.join(["python", f"benchmarks/{args.name}.py", *argv])
    missing = [f"--{name}" for name in needs if getattr(args, name) is None]
    if missing and not args.tiny and not args.render:
        made.error(f"{', '.join(missing)} must be given")
    return args


def texts(args: argparse.Namespace) -> list[Text]:
    """pico's texts below --data, the held-out parts apart; --tiny: some sentences."""
    if not args.tiny:
        return read(args.data, args.stories)
    who, what = ("Anna", "Tom", "the king"), ("a red ball", "bread", "an old dog", "nothing")
    said = [f"{a} saw {b}, and {c} had {d}.\n" for a in who for b in what for c in who for d in what]
    return [Text("sentences", "made here", ("".join(said[: 3 * len(said) // 4]),), tuple(said[-30:]))]


def load(args: argparse.Namespace, member: str = "target") -> tuple[Any, Any]:
    """A model in float32 and its tokenizer: --model, or a member of pico below --models or in the package.

    --tiny: a random one of two layers.
    """
    shipped = Path(str(importlib.resources.files("jaxllm"))) / "pico"
    if args.tiny:
        return Decoder(TINY, rngs=nnx.Rngs(0)), jl.load(shipped / "draft")[1]
    folder = getattr(args, "models", None) or shipped
    return jl.load(getattr(args, "model", None) or folder / member, dtype="float32")


def model_name(args: argparse.Namespace) -> str:
    """What `load` gives, in words."""
    if args.tiny:
        return "random, of two layers"
    return Path(args.model).name if getattr(args, "model", None) else "pico target"


# -- what a run is told by


def machine() -> str:
    """The processor's name and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def begin(args: argparse.Namespace, settings: Mapping[str, Any], packages: Sequence[str] = ()) -> Run:
    """A run that has measured nothing yet. packages: whose versions matter beside jax's and our own."""
    return {
        "benchmark": args.name,
        "commands": [args.command],
        "tiny": args.tiny,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": {"Python": platform.python_version(), "jaxllm": jl.__version__, "jax": jax.__version__}
        | {name: version(name) for name in packages},
        "settings": json.loads(json.dumps(settings)),  # as it is read back
    }


def resume(args: argparse.Namespace, run: Run) -> Run:
    """The run that --results holds, to go on with, or else `run`. Ends where that one has other settings."""
    file = json_file(args)
    if file is None or not file.is_file():
        return run
    old = json.loads(file.read_text("utf-8"))
    if any(old[key] != run[key] for key in ("settings", "tiny", "machine", "versions")):
        raise SystemExit(f"{args.name}.py: --results must be new or of the same settings, got {str(file)!r}")
    old["commands"] = list(dict.fromkeys([*old["commands"], *run["commands"]]))
    return old | {"date": run["date"]}


def json_file(args: argparse.Namespace) -> Path | None:
    """Where the run lies."""
    return args.results and args.results / f"{args.name}.json"


def save(args: argparse.Namespace, run: Run) -> None:
    """Writes what there is so far, if there is a folder for it; the file is never half written."""
    file = json_file(args)
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".json.part")
    part.write_text(json.dumps(run, indent=1) + "\n", "utf-8")
    part.replace(file)


# -- time and memory


def rounds(names: Iterable[str], count: int) -> Iterator[tuple[int, str]]:
    """(round, name): every name once a round, in an order that alternates. Round 0 is to warm up."""
    names = list(names)
    for turn in range(count + 1):
        for name in names if turn % 2 else names[::-1]:
            yield turn, name


def timed(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[Any, float]:
    """What `work` gives, all arrays ready, and its seconds."""
    start = clock()
    got = jax.block_until_ready(work())
    return got, clock() - start


def measured(
    work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter
) -> tuple[Any, float, float | None]:
    """What `timed` gives, and by how many bytes the peak resident size rose (None where Linux does not tell).

    Freed pages that are used again do not count.
    """
    before = resident_bytes()
    got, seconds = timed(work, clock)
    return got, seconds, None if before is None else _status("VmHWM") - before


def resident_bytes() -> float | None:
    """Resident bytes of this process, whose peak is counted anew from here on; None where not told."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(line for line in lines if line.startswith(name)).split()[1])


def ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """a / b within each round."""
    return [x / y for x, y in zip(a, b, strict=True)]


def show(values: Sequence[float], digits: int = 3) -> str:
    """Median (least to most), or the one value there is."""
    median, least, most = (f"{x:.{digits}f}" for x in (statistics.median(values), min(values), max(values)))
    return median if len(values) == 1 else f"{median} ({least} to {most})"


# -- pages


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a page. columns: headings, each with the sentence that says what stands below it."""

    title: str
    columns: Mapping[str, str]
    rows: Sequence[Sequence[Any]]
    text: str = ""

    def markdown(self) -> str:
        """The table, and a line for each sentence."""
        said: dict[str, list[str]] = {}
        for heading, sentence in self.columns.items():
            said.setdefault(sentence, []).append(heading)
        lines = [f"- **{', '.join(headings)}**: {sentence}" for sentence, headings in said.items()]
        made = tabulate(self.rows, list(self.columns), tablefmt="github", disable_numparse=True)
        parts = [f"## {self.title}", self.text, made, "\n".join(lines)]
        return "\n\n".join(part for part in parts if part)


@dataclasses.dataclass(frozen=True)
class Page:
    """What a run becomes. figures: functions that draw one (a `matplotlib.figure.Figure`), by title."""

    title: str
    text: str
    tables: Sequence[Table]
    figures: Mapping[str, Callable[[], Any]] = dataclasses.field(default_factory=dict)

    def markdown(self, run: Run) -> str:
        """The page without its figures."""
        versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
        parts = [
            f"# {self.title}",
            "**Tiny sizes: this shows that the script runs; its numbers mean nothing.**" * run["tiny"],
            self.text,
            "\n".join(["```sh", *run["commands"], "```"]),
            f"{run['date']}, {run['machine']}; {versions}.",
            *(table.markdown() for table in self.tables),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"


def write_png(figure: Any, path: Path) -> None:
    """A figure of matplotlib as a PNG of 256 colours: a quarter of the bytes of one of all colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    figure.dpi = 110
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    few = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def main(
    args: argparse.Namespace, measure: Callable[[argparse.Namespace], Run], page: Callable[[Run], Page]
) -> None:
    """Measures (or reads --render), prints the page, and writes run, page and figures into --results."""
    if args.render is None:
        run = measure(args)
    else:
        run = json.loads(args.render.read_text("utf-8"))
        if run["benchmark"] != args.name:
            raise SystemExit(f"{args.name}.py: --render must be a run of it, got one of {run['benchmark']}")
        args.results = args.results or args.render.parent
    save(args, run)
    made = page(run)
    text = made.markdown(run)
    print(text, end="")
    if args.results is None:
        return
    for title, draw in made.figures.items():
        file = args.results / f"{args.name}_{title.lower().replace(' ', '_')}.png"
        write_png(draw(), file)
        text += f"\n![{title}]({file.name})\n"
    (args.results / f"{args.name}.md").write_text(text, "utf-8")
