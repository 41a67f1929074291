"""Broken and hostile files by the hundred thousand, in processes with a limit of memory and time.

    python -m tests.fuzz --inputs 1000000 [--format NAME ...] [--seed N] [--results docs/results]

Prints how many inputs of each format came to what. Inputs that were neither refused in one line nor opened to
what is right are told, and saved below --failures; `--format NAME --seed N --inputs 1` makes one again.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from tabulate import tabulate  # noqa: E402

from fuzz.processes import OUTCOMES, run  # noqa: E402


def table(counts: dict[str, dict[str, int]]) -> str:
    """Counts by format and outcome."""
    rows = [[name, *(count.get(kind, 0) for kind in OUTCOMES)] for name, count in counts.items()]
    rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, len(OUTCOMES) + 1))])
    return tabulate(rows, headers=["format", *OUTCOMES], tablefmt="github", intfmt=",")


def write_page(folder: Path, command: str, counts: dict[str, dict[str, int]]) -> None:
    """Writes fuzz.json and fuzz.md; what the folder's fuzz.json has of other formats stays."""
    file, old = folder / "fuzz.json", {"commands": [], "counts": {}}
    if file.is_file():
        old = json.loads(file.read_text("utf-8"))
    record = {
        "commands": [*old["commands"], command],
        "date": time.strftime("%Y-%m-%d"),
        "counts": old["counts"] | counts,
    }
    file.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    shown = {"table": table(record["counts"]), "commands": "\n".join(record["commands"])}
    (folder / "fuzz.md").write_text(PAGE.format(**record | shown), "utf-8")


def main(argv: list[str] | None = None) -> int:
    from fuzz.formats import FORMATS

    given = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    given.add_argument("--inputs", type=int, default=10_000, help="in all; fewer of formats that open slowly")
    given.add_argument("--format", nargs="*", choices=[*FORMATS], default=[*FORMATS])
    given.add_argument("--seed", type=int, default=0, help="of the first input of each format")
    given.add_argument("--workers", type=int, default=os.cpu_count())
    given.add_argument("--failures", type=Path, default=Path(tempfile.gettempdir()) / "fuzz-failures")
    given.add_argument("--results", type=Path, metavar="FOLDER", help="gets fuzz.json and fuzz.md")
    args = given.parse_args(argv)
    counts = run(args.format, args.inputs, args.seed, args.workers, args.failures)
    print(table(counts))
    if args.results:
        command = f"python -m tests.fuzz --inputs {args.inputs} --seed {args.seed} --results docs/results"
        command += "" if args.format == [*FORMATS] else f" --format {' '.join(args.format)}"
        write_page(args.results, command, counts)
    return int(any(count.get(kind) for count in counts.values() for kind in OUTCOMES[3:]))


PAGE = """# Broken and hostile files

Each input is a good file of a few kilobytes with one change: bits, bytes, JSON, an array's header, a file
gone. Of what carries our checksums, two in five changes are signed anew, as by a hostile author.

```sh
{commands}
```

{date}. A format's row is of the last command that names it, or names none.

{table}

- **refused**: an error of one line
- **equal**: opened to the same numbers
- **opened**: to other numbers, where nothing could tell (no checksums, or new ones)
- **traceback**: any other error; **silent**: other numbers behind the back of our checksums
- **hang**: more than 10 seconds; **memory**: more than twice the files and 64 MiB (Python, compiled programs)
  at its peak; **crash**: of the process
"""

if __name__ == "__main__":
    sys.exit(main())
