"""The tables and the picture of `precision.py`, from what it found."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from parts.common import Table, ratios, show


def _mean(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    few = f"{statistics.mean(values):.{digits}f}"
    return few if len(values) < 2 else f"{few} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def quality_tables(found: list[dict[str, Any]]) -> list[Table]:
    columns = {
        "method": "who chooses",
        "target": "bits a weight that were asked for",
        "bits": "that unseen text reads",
        "on calibration": "that calibration text reads",
        "perplexity": "of unseen text",
        "spread": "standard deviation of bits between windows",
        "lines": "share of linears whose estimate is a line",
    }
    rows = []
    for method in dict.fromkeys(one["method"] for one in found):
        for target in dict.fromkeys(one["target"] for one in found if one["method"] == method):
            some = [one for one in found if (one["method"], one["target"]) == (method, target)]
            rows.append(
                (
                    method,
                    f"{target:g}",
                    _mean([one["bits"] for one in some], 3),
                    _mean([one["bits on calibration"] for one in some], 3)
                    if method != "whole widths"
                    else "",
                    _mean([one["perplexity"] for one in some], 3),
                    _mean([one["spread"] for one in some], 3),
                    _mean([one["lines"] for one in some], 2) if method.startswith("DP-LLM") else "",
                )
            )
    return [Table("Quality", columns, rows), _against_static(found)]


def _against_static(found: list[dict[str, Any]]) -> Table:
    """At how many targets each method is below the better static one at the bits that it really reads."""
    columns = {
        "method": "who chooses",
        "below": "of all targets and seeds, those at which its perplexity lies below that of static widths "
        "(Fisher) at the bits it reads, on the line between static points",
        "by": "mean difference in perplexity there",
    }
    rows = []
    whole = [one["target"] for one in found if one["method"] == "whole widths"]
    ends = (min(whole), max(whole))  # where static widths are those of all
    static = [one for one in found if one["method"] == "static, Fisher"]
    static += [one for one in found if one["method"] == "whole widths" and one["target"] in ends]
    for method in dict.fromkeys(one["method"] for one in found):
        if method in ("whole widths", "static, Fisher"):
            continue
        differences = []
        for one in (one for one in found if one["method"] == method):
            own = [other for other in static if other["seed"] == one["seed"]]
            line = sorted((other["bits"], math.log(other["perplexity"])) for other in own)
            bits, logs = zip(*line, strict=True)
            differences.append(one["perplexity"] - math.exp(np.interp(one["bits"], bits, logs)))
        below = sum(d < 0 for d in differences)
        rows.append((method, f"{below} of {len(differences)}", f"{statistics.mean(differences):+.3f}"))
    return Table("Against static widths", columns, rows)


def gain_table(found: list[dict[str, Any]]) -> Table:
    columns = {
        "linear": "means over layers",
        "variation": "of what the bit beyond the narrowest width changes, over tokens: deviation over mean",
        "exact": "bits a weight that choosing half of the unseen tokens by exact errors saves against chance",
        "line": "by a line in the input's length, fitted on other text",
    }
    rows_of = [name for name in found[0] if name.endswith(" rows")]
    columns |= {name: "by a fitted projection of so many" for name in rows_of}
    columns["64 rows read"] = "bits a weight that they read themselves"
    rows = [
        (r["linear"], f"{r['variation']:.2f}")
        + tuple(f"{r[name]:.3f}" for name in ("exact", "line", *rows_of))
        + (f"{64 * r['reads']:.2f}",)
        for r in found
    ]
    return Table("What there is to gain", columns, rows)


def outliers_table(found: list[dict[str, Any]]) -> Table:
    columns = {
        "strength": "by which channels are made larger",
        "saved": "bits a weight that exact errors save against chance, mean over linears",
        "method": "who chooses",
        "target": "bits a weight that were asked for",
        "bits": "that unseen text reads",
        "perplexity": "of unseen text",
        "over static": "nats a token more than static widths (Fisher) of the same target, by seed",
    }
    rows = []
    for strength, method, target in dict.fromkeys((r["strength"], r["method"], r["target"]) for r in found):
        at = [r for r in found if (r["strength"], r["target"]) == (strength, target)]
        own = [r for r in at if r["method"] == method]
        static = {r["seed"]: r["perplexity"] for r in at if r["method"] == "static, Fisher"}
        over = [math.log(r["perplexity"] / static[r["seed"]]) for r in own]
        rows.append(
            (f"{strength:g}", _mean([r["saved"] for r in own], 3), method, f"{target:g}")
            + (_mean([r["bits"] for r in own], 3), _mean([r["perplexity"] for r in own], 3), _mean(over, 4))
        )
    return Table("Where the choice begins to pay", columns, rows)


def cost_table(found: list[dict[str, Any]]) -> Table:
    columns = {
        "model": "whose linears",
        "estimator": "of all linears alike",
        "operations": "multiplications of a token's estimates, over those of its products",
        "bytes": "bytes that estimates read, over those of planes at 3.5 bits",
    }
    rows = [(r["model"], r["estimator"], f"{r['operations']:.2%}", f"{r['bytes']:.2%}") for r in found]
    return Table("What estimating costs", columns, rows)


def traffic_table(found: list[dict[str, Any]]) -> Table:
    columns = {
        "model": "whose blocks",
        "bits": "that a token reads",
        "asked for": "KiB of words in loads of the kernel's program, the linears of a block; the last of a "
        "row may reach behind its end, where nothing is fetched",
        "of planes": "KiB of words of so many planes",
        "levels": "KiB of the tables of that width, as stored; looked up again they come from caches",
        "over 6 bits": "words and levels",
    }
    whole = {r["model"]: r["words"] + r["levels"] for r in found if r["bits"] == 6}
    rows = [
        (r["model"], r["bits"])
        + tuple(f"{r[key] / 1024:,.0f}" for key in ("read", "words", "levels"))
        + (f"{(r['words'] + r['levels']) / whole[r['model']]:.3f}",)
        for r in found
    ]
    return Table("What the kernel of a width chosen at run time reads", columns, rows)


def time_table(found: list[dict[str, Any]]) -> Table:
    columns = {
        "requests": "at once",
        "what": "at which width, and who says so",
        "ms": "a step, medians (least to most) of interleaved rounds",
        "over 4 bits, known": "within a round",
    }
    base = {r["requests"]: r["seconds"] for r in found if r["what"] == "4 bits, known"}
    rows = [
        (
            r["requests"],
            r["what"],
            show([1e3 * s for s in r["seconds"]], 2),
            show(ratios(r["seconds"], base[r["requests"]]), 3),
        )
        for r in found
    ]
    return Table("A step of decoding", columns, rows)


def curves(found: list[dict[str, Any]]) -> Any:
    """Perplexity by bits read, a curve a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(one["method"] for one in found):
        own = [one for one in found if one["method"] == method]
        points = sorted(
            tuple(statistics.mean(o[key] for o in own if o["target"] == t) for key in ("bits", "perplexity"))
            for t in {one["target"] for one in own}
        )
        style = "k--" if method == "whole widths" else "-" if method.startswith("DP-LLM") else ":"
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=method, linewidth=1.2)
    axes.set(xlabel="bits a weight that unseen text reads", ylabel="perplexity", xlim=(2.95, 5.05))
    axes.legend(fontsize=7)
    return figure
