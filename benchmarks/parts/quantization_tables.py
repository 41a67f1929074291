"""Tables, figures and the papers' expectations from the results of `quantization.py`."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from parts.common import Page, Run, Table

BUDGETS = (2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
MARKS = "osv^Dx+*<>ph"

# Loss increase, in nats, on the 16 stories with stories260K, by an independent implementation of the same
# methods on statistics of its own (2026-11-21): name, bits, group size. Its "GPTQ" clips by searching, too.
RIVALS = {
    ("RTN", 2, 32): 4.1263, ("RTN", 3, 32): 0.6215, ("RTN", 4, 32): 0.0931,
    ("RTN, clipped", 2, 32): 2.7730, ("RTN, clipped", 3, 32): 0.4834, ("RTN, clipped", 4, 32): 0.0811,
    ("GPTQ, as published", 2, 32): 3.0726, ("GPTQ, as published", 3, 32): 0.4049,
    ("GPTQ, as published", 4, 32): 0.0668,
    ("GPTQ", 2, 32): 1.8786, ("GPTQ", 3, 32): 0.3009, ("GPTQ", 4, 32): 0.0447,
    ("RTN", 2, 64): 4.5338, ("RTN", 3, 64): 0.8411, ("RTN", 4, 64): 0.1105,
    ("RTN, clipped", 2, 64): 3.2183, ("RTN, clipped", 3, 64): 0.5994, ("RTN, clipped", 4, 64): 0.1018,
    ("GPTQ, as published", 2, 64): 4.0500, ("GPTQ, as published", 3, 64): 0.5319,
    ("GPTQ, as published", 4, 64): 0.0636,
    ("GPTQ", 2, 64): 2.2955, ("GPTQ", 3, 64): 0.3757, ("GPTQ", 4, 64): 0.0674,
    ("SqueezeLLM", 2, None): 2.2734, ("SqueezeLLM", 3, None): 0.2884, ("SqueezeLLM", 4, None): 0.0341,
}  # fmt: skip

Row = dict[str, Any]


def merged(results: Iterable[Row]) -> list[Row]:
    """One row a job, seeds together: means, the spread of the perplexity, the least memory."""
    by: dict[Any, list[Row]] = defaultdict(list)
    for r in results:
        by[tuple(r[key] for key in ("what", "name", "bits", "group_size", "sequences"))].append(r)
    rows = []
    for found in by.values():
        mean = {key: statistics.mean(r[key] for r in found) for key in ("perplexity", "kl", "loss_increase")}
        error = max(r["standard_error"] for r in found)
        perplexities = [r["perplexity"] for r in found]
        memory = [r["memory"] for r in found if r["memory"] is not None]
        more = {
            "seeds": len(found),
            "least": min(perplexities),
            "most": max(perplexities),
            "seed_spread": statistics.stdev(r["loss_increase"] for r in found) if len(found) > 1 else 0.0,
            "standard_error": error,
            "memory": min(memory, default=None),
            "first_seconds": found[0]["seconds"],
            "seconds": min(r["seconds"] for r in found),
        }
        rows.append(found[0] | mean | more)
    return rows


def of(rows: list[Row], what: str) -> list[Row]:
    return [r for r in rows if r["what"] == what]


def one(rows: list[Row], what: str, name: str, **where) -> Row | None:
    """The row of that name."""
    found = [r for r in of(rows, what) if r["name"] == name and all(r[k] == v for k, v in where.items())]
    return found[0] if found else None


# -- what the papers lead one to expect


def expectations(run: Run) -> list[tuple[str, str, bool]]:
    """(claim, what was measured, whether it holds) for all that the results can tell."""
    rows, found = merged(run["results"]), []

    def add(claim: str, parts: list[Row | None], tell: Callable[..., tuple[str, bool]]) -> None:
        if parts and all(part is not None for part in parts):
            found.append((claim, *tell(*parts)))

    def ascending(*parts: Row) -> tuple[str, bool]:
        values = [part["perplexity"] for part in parts]
        return ", ".join(number(v) for v in values), values == sorted(values)

    for bits in (2, 3):
        parts = [one(rows, "methods", name, bits=bits) for name in ("LNQ, guided", "SqueezeLLM", "RTN")]
        add(f"guided LNQ < SqueezeLLM < RTN in perplexity at {bits} code bits", parts, ascending)
    for sequences in sorted({r["sequences"] for r in of(rows, "curve")}):
        for gptq in ("GPTQ, as published", "GPTQ"):
            names = ("DASH-Q", gptq, "RTN")
            parts = [one(rows, "curve", name, sequences=sequences) for name in names]
            add(f"DASH-Q < {gptq} < RTN at 2 bits, {sequences} sequences", parts, ascending)
    for bits in sorted({r["bits"] for r in of(rows, "nested")}):
        parts = [one(rows, "nested", name, bits=bits) for name in ("Any-Precision", "SqueezeLLM")]
        add(
            f"Any-Precision at {bits} bits within 3 % of k-means of its own",
            parts,
            lambda nested, own: (
                f"{number(nested['perplexity'])} against {number(own['perplexity'])}, "
                f"{100 * (nested['perplexity'] / own['perplexity'] - 1):+.1f} %",
                nested["perplexity"] <= 1.03 * own["perplexity"],
            ),
        )
    found += _mixed(rows) + _recovered(rows, run["given"]["perplexity"])
    add(
        "NestedFP in FP16 mode is the FP16 model, bit for bit",
        [one(rows, "methods", "NestedFP, fp16")],
        lambda r: ("equal logits" if r["bitwise"] else "different logits", r["bitwise"]),
    )
    return found


def _mixed(rows: list[Row]) -> list[tuple[str, str, bool]]:
    mixed = one(rows, "ablations", "2/4/16: columns by gain, outliers at 2 bits")
    plain = [
        r for r in of(rows, "ablations") if not r["name"].startswith("2/4/16") and r["bits_per_weight"] <= 3.0
    ]
    if mixed is None or not plain:
        return []
    found = []
    for who, names in (
        ("rounded without feedback", ("RTN", "RTN, clipped", "DASH-Q", "DASH-Q, whole zero")),
        ("GPTQ", ("GPTQ",)),
    ):
        best = min((r for r in plain if r["name"] in names), key=lambda r: r["perplexity"], default=None)
        if best is not None:
            told = f"{number(mixed['perplexity'])} at {mixed['bits_per_weight']:.3f} bits against "
            told += f"{number(best['perplexity'])}, {label(best)} at {best['bits_per_weight']:.3f}"
            holds = mixed["perplexity"] < best["perplexity"]
            found.append((f"2/4/16 better than every affine model of at most 3 bits, {who}", told, holds))
    return found


def _recovered(rows: list[Row], given: float) -> list[tuple[str, str, bool]]:
    base = one(rows, "dec_dec", "RTN, bucket, 0")
    some = one(rows, "dec_dec", "RTN, bucket, 51")
    if base is None or some is None:
        return []
    share = (base["perplexity"] - some["perplexity"]) / (base["perplexity"] - given)
    told = f"{number(base['perplexity'])} to {number(some['perplexity'])}: {100 * share:.0f} % of the gap"
    return [("DecDEC on 3-bit RTN recovers 45 % of the perplexity gap at 5 % of inputs", told, share >= 0.45)]


def rivals(run: Run) -> list[tuple[str, str, bool]]:
    """The same for the independent implementation; only for its model."""
    if "stories260K" not in run["settings"]["model"]:
        return []
    found = []
    for r in of(merged(run["results"]), "methods"):
        bar = RIVALS.get((r["name"], r["bits"], r["group_size"]))
        if bar is not None:
            told = f"{r['loss_increase']:.4f} +- {r['standard_error']:.4f} against {bar:.4f}"
            found.append((label(r), told, r["loss_increase"] <= bar))
    return found


# -- the page


def number(x: float) -> str:
    return f"{x:.3f}" if x < 100 else f"{x:.1f}" if x < 1e4 else f"{x:.2g}"


def label(r: Row) -> str:
    bits = "" if r["bits"] is None else f", {r['bits']} bits"
    return r["name"] + bits + ("" if r["group_size"] is None else f", group {r['group_size']}")


TITLES = {
    "methods": "Methods",
    "curve": "Calibration text",
    "nested": "Nested and independent widths",
    "dec_dec": "DecDEC: selection, inputs of each 1024",
    "ablations": "2/4/16 bits",
}


def page(run: Run) -> Page:
    """All results as tables and figures."""
    settings, rows = run["settings"], merged(run["results"])
    tables = [_results(part, title, what) for what, title in TITLES.items() if (part := of(rows, what))]
    if part := of(rows, "methods"):
        tables.append(_best(part))
    if seconds := run.get("calibration_seconds"):
        columns = {"statistic": "what methods ask for", "CPU seconds": "of all threads, compiled"}
        tables.append(Table("Statistics", columns, [(k, f"{s:.2f}") for k, s in seconds.items()]))
    for title, found in (
        ("Expected from the papers", expectations(run)),
        ("Loss increase against an independent implementation of the same methods", rivals(run)),
    ):
        if found:
            columns = {"claim": "what should hold", "measured": "in the order of the claim", "holds": "here"}
            rows_ = [(claim, told, "yes" if holds else "no") for claim, told, holds in found]
            tables.append(Table(title, columns, rows_))
    text = (
        f"Model {settings['model']}, as it is {number(run['given']['perplexity'])} in perplexity over "
        f"{settings['predictions']:,} predictions; statistics of {settings['sequences']} sequences of "
        f"{settings['length']} tokens. Means of the seeds there are."
    )
    return Page("Quantization", text, tables, figures(run))


COLUMNS = {
    "method": "what quantized the linears of all blocks",
    "bits": "of a code",
    "group": "inputs that share a scale",
    "sequences": "how many it was calibrated on",
    "total bits": "bits a weight, everything stored counted",
    "perplexity": "over all predictions (least to most of the seeds)",
    "KL": "divergence from the model as it is, nats a token",
    "loss increase": "nats a token, +- its standard error over sequences, standard deviation of the seeds",
    "CPU s": "seconds of all threads: of the first run, compilation included / the least of the seeds",
    "MB": "how far the peak resident size rose",
}


def _results(rows: list[Row], title: str, what: str) -> Table:
    columns = {name: said for name, said in COLUMNS.items() if name != "sequences" or what == "curve"}
    body = []
    for r in sorted(rows, key=lambda r: (r["bits"] or 9, r["sequences"] or 0)):
        spread = f" ({number(r['least'])} to {number(r['most'])})" if r["seeds"] > 1 else ""
        seeds = f", {r['seed_spread']:.4f}" if r["seeds"] > 1 else ""
        cells = {
            "method": r["name"],
            "bits": r["bits"] or "",
            "group": r["group_size"] or "",
            "sequences": r["sequences"],
            "total bits": f"{r['bits_per_weight']:.3f}",
            "perplexity": number(r["perplexity"]) + spread,
            "KL": f"{r['kl']:.4f}",
            "loss increase": f"{r['loss_increase']:.4f} +- {r['standard_error']:.4f}{seeds}",
            "CPU s": f"{r['first_seconds']:.1f} / {r['seconds']:.2f}",
            "MB": "" if r["memory"] is None else f"{r['memory'] / 1e6:.0f}",
        }
        body.append([cells[name] for name in columns])
    return Table(title, columns, body)


def _best(rows: list[Row]) -> Table:
    body = []
    for budget in BUDGETS:
        fitting = [r for r in rows if r["bits_per_weight"] <= budget and not r["name"].startswith("DecDEC")]
        if fitting:
            best = min(fitting, key=lambda r: r["kl"])
            numbers = f"{best['bits_per_weight']:.3f}", number(best["perplexity"]), f"{best['kl']:.4f}"
            body.append((budget, label(best), *numbers))
    columns = {"at most": "total bits a weight", "method": "whose divergence is least there"}
    columns |= {name: COLUMNS[name] for name in ("total bits", "perplexity", "KL")}
    return Table("The best at each budget of total bits", columns, body)


# -- figures


def figures(run: Run) -> dict[str, Callable[[], Any]]:
    """A figure a part, for the parts that have results."""
    rows = merged(run["results"])
    parts = {"methods": _draw_methods, "curve": _draw_curve, "nested": _draw_nested}
    parts |= {"dec_dec": _draw_dec_dec, "ablations": _draw_ablations}
    return {
        what: partial(_figure, fill=fill, rows=part, run=run)
        for what, fill in parts.items()
        if (part := of(rows, what))
    }


def _figure(fill, rows: list[Row], run: Run) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12 if fill is _draw_methods else 8, 5), layout="constrained")
    fill(figure, rows, run)
    settings = run["settings"]
    figure.suptitle(f"{settings['model']}, {settings['predictions']:,} predictions", fontsize=9)
    return figure


def _lines(axes, rows: list[Row], x: Callable[[Row], float], named=label, log=True) -> None:
    """A line a name: KL against x, the range over seeds not shown."""
    by: dict[str, list[Row]] = defaultdict(list)
    for r in rows:
        by[named(r)].append(r)
    for i, (name, found) in enumerate(by.items()):
        found.sort(key=x)
        mark, style = MARKS[i % len(MARKS)], "-" if i < 10 else "--"
        points = [(x(r), max(r["kl"], 1e-7)) for r in found]
        axes.plot(*zip(*points, strict=True), style, marker=mark, markersize=4, linewidth=0.8, label=name)
    if log:
        axes.set_yscale("log")
    axes.set_ylabel("KL to the model, nats a token")
    axes.grid(alpha=0.3)


def _draw_methods(figure, rows: list[Row], run) -> None:
    left, right = figure.subplots(1, 2, sharey=True)

    def named(r: Row) -> str:
        return r["name"] + ("" if r["group_size"] is None else f", g{r['group_size']}")

    exact = [r for r in rows if r["kl"] < 1e-6]  # a logarithmic axis has no place for them
    rows = [r for r in rows if r["kl"] >= 1e-6]
    _lines(left, [r for r in rows if r["bits"] is not None], lambda r: r["bits"], named)
    left.set(xlabel="bits of a code")
    left.set_xticks(sorted({r["bits"] for r in rows if r["bits"] is not None}))
    _lines(right, rows, lambda r: r["bits_per_weight"], named)
    right.set(xlabel="total bits a weight", xlim=(2, 11))
    right.legend(fontsize=6, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    if exact:
        right.set_title("not shown: " + ", ".join(named(r) for r in exact), fontsize=7)


def _draw_curve(figure, rows: list[Row], run) -> None:
    axes = figure.subplots()
    tokens = run["settings"]["width"] // 2
    _lines(axes, rows, lambda r: r["sequences"], lambda r: r["name"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({r["sequences"] for r in rows}), sorted({r["sequences"] for r in rows}))
    axes.set(xlabel=f"calibration sequences of {tokens} tokens, 2-bit codes")
    axes.legend(fontsize=7)


def _draw_nested(figure, rows: list[Row], run) -> None:
    axes = figure.subplots()
    _lines(axes, rows, lambda r: r["bits"], lambda r: r["name"])
    axes.set(xlabel="bits of a code")
    axes.set_xticks(sorted({r["bits"] for r in rows}))
    axes.legend(fontsize=8)


def _draw_dec_dec(figure, rows: list[Row], run) -> None:
    axes = figure.subplots()

    def fetched(r: Row) -> int:
        return int(r["name"].rsplit(", ", 1)[1])

    _lines(axes, rows, fetched, lambda r: r["name"].rsplit(", ", 1)[0], log=False)
    axes.set(xlabel="inputs whose residual is fetched, of each 1024", ylim=(0, None))
    axes.legend(fontsize=8)


def _draw_ablations(figure, rows: list[Row], run) -> None:
    axes = figure.subplots()
    rows = sorted(rows, key=lambda r: -r["loss_increase"])
    names = [f"{label(r)} ({r['bits_per_weight']:.2f} bits)" for r in rows]
    colours = ["C0" if r["name"].startswith("2/4/16") else "C7" for r in rows]
    errors = [r["seed_spread"] for r in rows]
    axes.barh(names, [r["loss_increase"] for r in rows], xerr=errors, color=colours)
    axes.set(xlabel="loss increase, nats a token (bars: standard deviation over seeds)", xscale="log")
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(axis="x", alpha=0.3)
