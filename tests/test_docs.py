"""The documentation: its examples run, its reference misses no public name, its numbers come from results."""

import importlib
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

# One process for all pages, which share compiled programs, without the checks that tests switch on.
RUN = """
import os, re, sys
from pathlib import Path

for page in map(Path, sys.argv[1:]):
    os.mkdir(page.stem)
    os.chdir(page.stem)
    blocks = re.findall(r"^```python\\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    assert blocks, page
    space = {"__name__": page.stem}
    for i, block in enumerate(blocks, 1):
        print(f"{page.name}, block {i}", flush=True)
        exec(compile(block, f"{page.name}, block {i}", "exec"), space)
    os.chdir("..")
"""

# What users reach that no `__all__` lists: every public thing that these modules define is in the reference.
ENTRIES = (
    "checkpoints_convert.huggingface",
    "checkpoints_convert.llama2c",
    "checkpoints_convert.llama2c_tokenizer",
    "checkpoints_convert.mingpt",
    "checkpoints_convert.quantized.two_bit_words",
    "checkpoints_convert.qwix",
    "jaxllm.training.trainer",
)


LONG = ("kv_cache", "quantization")  # they compile most
PAGES = [
    DOCS / "index.md",
    *(page for page in sorted((DOCS / "guides").glob("*.md")) if page.stem != "index"),
]


@pytest.mark.slow
@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_examples_of_the_guides_run_from_top_to_bottom(long, tmp_path):
    pages = [str(page) for page in PAGES if (page.stem in LONG) == long]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *pages], capture_output=True, text=True, timeout=900, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr


def resolve(name: str):
    """The object of a dotted name."""
    module, _, rest = name, "", ""
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest = f"{last}.{rest}" if rest else last
    for part in filter(None, rest.split(".")):
        found = getattr(found, part)
    return found


def defined_in(module) -> dict[str, object]:
    """The public functions and classes that a module defines itself."""
    return {
        name: thing
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(thing) or inspect.isclass(thing))
        and thing.__module__ == module.__name__
    }


@pytest.fixture(scope="module")
def documented() -> list[object]:
    """Everything that a page of the reference shows."""
    found: list[object] = []
    for page in sorted((DOCS / "api").glob("*.md")):
        text = page.read_text("utf-8")
        for kind, name, options in re.findall(r"^\.\. auto(\w+):: (\S+)\n((?:   :.*\n)*)", text, re.M):
            thing = resolve(name)
            found.append(thing)
            if kind == "module" and ":members:" in options:
                found += defined_in(thing).values()
    return found


@pytest.mark.parametrize("module", ["jaxllm", "jaxllm.cache", "jaxllm.eviction", "jaxllm.precision"])
def test_the_reference_has_every_public_name(module, documented):
    face = importlib.import_module(module)
    names = [n for n in face.__all__ if not any(getattr(face, n) is thing for thing in documented)]
    assert names == []


@pytest.mark.parametrize("module", ENTRIES)
def test_the_reference_has_every_entry_point(module, documented):
    there = defined_in(importlib.import_module(module))
    assert there
    assert [n for n, thing in there.items() if not any(thing is other for other in documented)] == []


def test_everything_in_the_reference_says_what_it_is(documented):
    assert [thing for thing in documented if not (inspect.getdoc(thing) or "").strip()] == []


def test_numbers_of_the_readme_stand_on_the_pages_they_name():
    section = (ROOT / "README.md").read_text("utf-8").split("\n## What was measured\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")][2:]
    assert 1 <= len(rows)
    count = 0
    for _, numbers, where in rows:
        (page,) = re.findall(r"\(docs/(results/\w+\.md)\)", where)
        text = (DOCS / page).read_text("utf-8")
        some = re.findall(r"\d+(?:[.,]\d+)*", numbers)
        assert some
        count += len(some)
        for number in some:
            assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d]|[.,]\d)", text), (number, page)
    assert count <= 8


def test_no_picture_or_notebook_is_above_100_kilobytes():
    files = [path for folder in ("docs", "notebooks") for path in (ROOT / folder).rglob("*.*")]
    pictures = [path for path in files if path.suffix in (".png", ".svg", ".ipynb")]
    assert pictures and [path for path in pictures if path.stat().st_size > 100_000] == []


def test_commands_of_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    lines = [line.partition("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", text, re.S)
             for line in block.splitlines()]  # fmt: skip
    assert len(lines) >= 8
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    extras = project["project"]["optional-dependencies"].keys()
    for name in re.findall(r"\[([\w,]+)\]", " ".join(lines)):
        assert set(name.split(",")) <= extras
    markers = [line.split(":")[0] for line in project["tool"]["pytest"]["ini_options"]["markers"]]
    assert set(re.findall(r"-m (\w+)", " ".join(lines))) - {"venv"} <= set(markers)
    for path in re.findall(r"(?<= )((?:tests|docs|benchmarks)[\w/.]*)(?= |$)", "\n".join(lines)):
        assert (ROOT / path).exists() or path == "docs/_build", path
    for command in {line.split()[0] for line in lines if line} - {"pre-commit", "sphinx-build"}:
        assert (
            shutil.which(command, path=f"{Path(sys.executable).parent}:/usr/bin:/bin")
            or (ROOT / command).exists()
        ), command


def test_the_tower_is_drawn_and_told_as_the_imports_are():
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    below = pictures.rooms_below()
    section = (ROOT / "README.md").read_text("utf-8").split("\n## The tower\n")[1]
    told = [
        line[:36].split() for line in section.split("```")[1].splitlines()[1:]
    ]  # names, then what they are
    floor = {room: i for i, rooms in enumerate(told) for room in rooms}
    assert floor.keys() == below.keys()
    assert [(a, b) for a, rooms in below.items() for b in rooms if floor[b] <= floor[a]] == []
    for mode in ("light", "dark"):
        drawn = (DOCS / "pictures" / f"tower_{mode}.svg").read_text("utf-8")
        assert [room for room in below if f">{room}<" not in drawn and f">{room}: " not in drawn] == []
