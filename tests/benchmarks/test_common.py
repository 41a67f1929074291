"""What the benchmarks share, and what holds for all of them."""

import ast
import json
from pathlib import Path

import pytest
from parts import common

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


def reached_into(text: str) -> list[str]:
    """Private names that a script imports from the house, or reads off anything but `self`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [name for alias in node.names for name in alias.name.split(".")]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) != "self":
            names = [node.attr]
        else:
            continue
        found += [name for name in names if name.startswith("_") and not name.startswith("__")]
    return found


@pytest.mark.parametrize("path", sorted(SCRIPTS.rglob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_use_public_functions_only(path):
    assert reached_into(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "from jaxllm.decoding.generate import _Run",
        "from jaxllm import _private",
        "def f():\n    from jaxllm.decoding import generate as g\n    g._decode()",
        "import jaxllm as jl\njl.cache._layout",
        "import jaxllm._x.y",
    ],
)
def test_a_private_name_is_found(text):
    assert reached_into(text)


def table(**more):
    return common.Table(
        "Speeds", {"who": "a library", "0.1": "a share", "0.2": "a share"}, [["a", 1, "2.50"]], **more
    )


def test_a_table_says_what_each_column_is_and_equal_sentences_once():
    title, text, made, said = table(text="Of today.").markdown().split("\n\n")
    assert (title, text) == ("## Speeds", "Of today.")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in made.splitlines()]
    assert cells[0] == ["who", "0.1", "0.2"] and cells[2] == ["a", "1", "2.50"]
    assert said.splitlines() == ["- **who**: a library", "- **0.1, 0.2**: a share"]


def run_of(args, **more):
    return common.begin(args, {"seeds": (0, 1)}) | more


@pytest.fixture
def arguments(tmp_path):
    return lambda *more: common.parse(common.parser("some", "doc"), ["--results", str(tmp_path), *more])


def test_a_page_tells_command_machine_date_and_versions_and_whether_it_is_tiny(arguments, tmp_path, capsys):
    args = arguments("--tiny")
    common.main(args, run_of, lambda run: common.Page("Some", "What it is.", [table()]))
    text, run = (tmp_path / "some.md").read_text(), json.loads((tmp_path / "some.json").read_text())
    assert capsys.readouterr().out == text
    for part in (run["date"], run["machine"], run["versions"]["jax"], run["commands"][0], "What it is."):
        assert part in text
    assert run["commands"] == [f"python benchmarks/some.py --results {tmp_path} --tiny"]
    assert "numbers mean nothing" in text


def test_a_page_is_made_again_from_a_run(arguments, tmp_path):
    def page(run):
        return common.Page("Some", str(run["found"]), [])

    common.main(arguments(), lambda args: run_of(args, found=7), page)
    first = (tmp_path / "some.md").read_text()
    (tmp_path / "some.md").unlink()

    def never(args):
        raise AssertionError("measured again")

    parsed = common.parse(common.parser("some", "doc"), ["--render", str(tmp_path / "some.json")])
    common.main(parsed, never, page)
    assert (tmp_path / "some.md").read_text() == first
    other = common.parse(common.parser("other", "doc"), ["--render", str(tmp_path / "some.json")])
    with pytest.raises(SystemExit, match="must be a run of it, got one of some"):
        common.main(other, never, page)


def test_a_run_goes_on_where_its_settings_are_the_same(arguments):
    args = arguments()
    common.save(args, run_of(args, found=[1]))
    again = arguments("--render", "x")  # another command line
    run = common.resume(again, run_of(again))
    assert run["found"] == [1] and len(run["commands"]) == 2
    with pytest.raises(SystemExit, match="must be new or of the same settings"):
        common.resume(args, run_of(args) | {"settings": {}})


def test_options_that_are_needed_are_needed_where_something_is_measured(arguments, capsys):
    made = common.parser("some", "doc")
    common.add_data(made)
    with pytest.raises(SystemExit):
        common.parse(made, [], needs=["data"])
    assert "--data must be given" in capsys.readouterr().err
    assert common.parse(made, ["--tiny"], needs=["data"]).data is None


def test_tiny_defaults_give_way_to_what_is_given():
    made = common.parser("some", "doc")
    made.add_argument("--rounds", type=int, default=5)
    given = [common.parse(made, list(argv), tiny={"rounds": 1}).rounds for argv in ([], ["--tiny"])]
    assert given == [5, 1]
    assert common.parse(made, ["--tiny", "--rounds", "3"], tiny={"rounds": 1}).rounds == 3


def test_rounds_alternate_and_the_first_is_to_warm_up():
    found = list(common.rounds(["a", "b"], 2))
    assert found == [(0, "b"), (0, "a"), (1, "a"), (1, "b"), (2, "b"), (2, "a")]


def test_medians_are_told_with_their_range():
    assert common.show([3.0, 1.0, 2.0], 1) == "2.0 (1.0 to 3.0)"
    assert common.show([2.0], 1) == "2.0"
    assert common.ratios([2.0, 3.0], [1.0, 2.0]) == [2.0, 1.5]
