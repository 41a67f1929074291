"""The pictures of the documentation, each drawn for a light and for a dark page.

    python docs/pictures.py            # all; or: tower quality_at_bits kvzip_heads

The tower is drawn from the imports there are, the curves from a table of the results, the heads from `pico`
itself, which takes half a minute. The same input gives the same bytes.
"""

import ast
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PACKAGES = ("jaxllm", "checkpoints_convert", "pallas_kernels")
INK = {"light": "#2b2f33", "dark": "#d6d9dc"}
FAINT = {"light": "#d0d4d8", "dark": "#4a4f55"}
MEANING = {
    "cli": "one file a command",
    "precision": "widths chosen at run time",
    "training": "the trainer, pico, gates",
    "jaxllm": "what a user types",
    "quant": "methods, calibration, whole models",
    "measure": "perplexity, choices, bytes",
    "files": "the door for every file",
    "native": "the directory that save writes",
    "decoding": "prefill, the loop, sampling",
    "checkpoints_convert": "other people's files",
    "eviction": "who stays in a cache",
    "models": "one forward pass a file",
    "cache": "how keys and values are stored",
    "sharding": "where leaves go on a mesh",
    "storage": "directories, manifests",
    "weights": "how a weight is stored; matmul",
    "ops": "functions on plain arrays",
    "pallas_kernels": "operations with GPU kernels",
    "pytree": "frozen dataclasses",
}
FILL = {"light": "#eef1f4", "dark": "#22272d"}


def save(name: str, draw: Callable[[str], plt.Figure]) -> None:
    """Draws a picture twice: docs/pictures/NAME_light.svg and NAME_dark.svg."""
    (DOCS / "pictures").mkdir(exist_ok=True)
    for mode, ink in INK.items():
        colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
        style = {"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
        style |= {"axes.edgecolor": FAINT[mode], "axes.spines.top": False, "axes.spines.right": False}
        with plt.rc_context(colours | style):
            figure = draw(mode)
            path = DOCS / "pictures" / f"{name}_{mode}.svg"
            figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
            plt.close(figure)
            print(path.relative_to(ROOT), f"{path.stat().st_size:,} bytes")


# -- the tower


def room_of(module: str) -> str:
    """The room of a module: its folder in jaxllm, its file there, or its package."""
    names = module.split(".")
    return names[0] if names[0] != "jaxllm" else names[1] if len(names) > 1 else "jaxllm"


def imports(path: Path) -> set[str]:
    """The modules of the house that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = [path.parent.name] * node.level + [node.module] * bool(
                node.module
            )  # "." in the stub only
            for alias in node.names:
                inner = ROOT.joinpath(*".".join(start).split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                found.add(".".join([*start, alias.name] if is_module else start))
    return {name for name in found if name.split(".")[0] in PACKAGES}


def rooms_below() -> dict[str, set[str]]:
    """The rooms that each room imports."""
    below: dict[str, set[str]] = {}
    for package in PACKAGES:
        paths = sorted((ROOT / package).rglob("*.py")) + sorted(
            (ROOT / package).rglob("*.pyi")
        )  # public names
        for path in paths:
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            room = room_of(module)
            below.setdefault(room, set()).update({room_of(name) for name in imports(path)} - {room})
    del below["__main__"]
    return below


def floors() -> list[list[str]]:
    """The rooms by how many others they stand on, one above another; the lowest first."""
    below, floor = rooms_below(), dict[str, int]()
    while len(floor) < len(below):
        ready = [room for room in below if room not in floor and below[room] <= floor.keys()]
        if not ready:
            raise ValueError(
                f"pictures: rooms must not import each other, got {sorted(below.keys() - floor)}"
            )
        floor |= {room: 1 + max((floor[b] for b in below[room]), default=-1) for room in ready}
    return [sorted(r for r in floor if floor[r] == f) for f in range(max(floor.values()) + 1)]


def tower(mode: str) -> plt.Figure:
    """Boxes in rows: a room imports only rooms in rows below its own."""
    rows = floors()
    figure, axes = plt.subplots(figsize=(7, 0.5 * len(rows)), layout="constrained")
    for y, rooms in enumerate(rows):
        for i, room in enumerate(rooms):
            x = (i - (len(rooms) - 1) / 2) * 3.1
            box = {
                "boxstyle": "round,pad=0,rounding_size=0.1",
                "facecolor": FILL[mode],
                "edgecolor": FAINT[mode],
            }
            axes.add_patch(matplotlib.patches.FancyBboxPatch((x - 1.45, y - 0.38), 2.9, 0.76, **box))
            name = "jaxllm: the public names" if room == "jaxllm" else room
            axes.text(x, y + 0.13, name, ha="center", va="center", fontsize=9, fontweight="bold")
            axes.text(x, y - 0.18, MEANING[room], ha="center", va="center", fontsize=7)
    axes.set(xlim=(-4.6, 4.6), ylim=(-0.6, len(rows) - 0.4))
    axes.axis("off")
    return figure


# -- quality at bits


SHOWN = ("RTN", "AWQ", "GPTQ", "DASH-Q", "SqueezeLLM", "LNQ, guided", "2/4/16-bit")


def quality_at_bits(mode: str) -> plt.Figure:
    """Perplexity at stored bits, a line a method, from the run behind the page of results."""
    run = json.loads((DOCS / "results" / "quantization.json").read_text("utf-8"))
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, colour in zip(SHOWN, plt.get_cmap("tab10").colors, strict=False):
        points: dict[float, list[float]] = {}
        for r in run["results"]:
            if (r["what"], r["name"]) == ("methods", name):
                points.setdefault(r["bits_per_weight"], []).append(r["perplexity"])
        bits = sorted(points)
        means = [statistics.mean(points[b]) for b in bits]
        axes.plot(bits, means, marker="o", markersize=4, linewidth=1.4, color=colour, label=name)
    exact = run["given"]["perplexity"]
    axes.axhline(exact, color=FAINT[mode], linewidth=1, linestyle=(0, (4, 3)))
    axes.text(2.2, exact, "as it is, in 16 bits", va="bottom", fontsize=8)
    axes.set(xlabel="stored bits a weight", ylabel="perplexity", yscale="log")
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=9)
    return figure


# -- what KVzip keeps


@functools.cache
def kept_by_head() -> np.ndarray:
    """The part of a list's pairs that each layer and head of pico keeps, of 30 % in all [L, K]."""
    import jaxllm as jl
    from jaxllm.cache.repack import positions_by_head
    from jaxllm.training.pico.exercises import Words, list_end, lookup

    model, tokenizer = jl.load()
    words = Words.from_tokenizer(tokenizer)
    tokens = lookup(np.random.default_rng(3), words, 48, value_tokens=1).tokens
    ids = tokens[: list_end(tokens, words)].tolist()
    cache = jl.prefill(model, [ids])
    scores = jl.eviction.kvzip_scores(model, cache, [ids[1:]], tokenizer=tokenizer, prefix=1)
    small = jl.eviction.evict(cache, scores, ratio=0.3, prefix=1)
    return np.array([[len(head) / len(ids) for head in layer[0]] for layer in positions_by_head(small)])


def kvzip_heads(mode: str) -> plt.Figure:
    """A square a head, the fuller the more it keeps."""
    part = kept_by_head().T
    figure, axes = plt.subplots(figsize=(7, 1.9), layout="constrained")
    axes.pcolormesh(part, vmin=0, vmax=1, cmap="Blues" if mode == "light" else "Blues_r")
    for (head, layer), value in np.ndenumerate(part):
        dark = (value > 0.5) == (mode == "light")
        colour = "white" if dark else "#1c2024"
        axes.text(layer + 0.5, head + 0.5, f"{100 * value:.0f}", ha="center", va="center", color=colour)
    places = [np.arange(size) + 0.5 for size in part.shape[::-1]]
    axes.set(xlabel="layer", ylabel="key-value head", xticks=places[0], yticks=places[1])
    axes.set(xticklabels=range(part.shape[1]), yticklabels=range(part.shape[0]))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


PICTURES = {draw.__name__: draw for draw in (tower, quality_at_bits, kvzip_heads)}

if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        save(name, PICTURES[name])
