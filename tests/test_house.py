"""The rules of the house: who may import whom, and README, package and CI saying the same."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGES = ("jaxllm", "pallas_kernels", "checkpoints_convert")

# The tower: a room imports only what stands below it, and itself.
TOWER = (
    {"__main__"},
    {"cli"},
    {"serving", "pointcloud", "graph"},
    {"__init__"},  # the public names
    {"precision"},
    {"training"},
    {"quant"},
    {"files", "measure"},
    {"native", "decoding"},
    {"checkpoints_convert", "eviction"},
    {"models"},
    {"cache"},
    {"sharding", "storage"},
    {"weights"},
    {"ops", "dram", "image"},
    {"pallas_kernels"},
    {"pytree"},
)


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The tree of a file."""
    return ast.parse(path.read_text("utf-8"))


def modules_of(package: str) -> set[str]:
    """All modules loaded by importing `package` in a new process."""
    code = f"import sys, {package}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def imported_by(package: str) -> set[str]:
    """Their top-level names."""
    return {name.split(".")[0] for name in modules_of(package)}


def modules(root) -> dict[str, Path]:
    """The three packages' modules by dotted name."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }


def imports(root) -> dict[str, set[str]]:
    """Which of the packages' modules each module imports, wherever in it the import stands."""
    known = modules(root)
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        named = set()
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                submodules = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= {inner if inner in known else str(node.module) for inner in submodules}
        found[name] = (named & known.keys()) - {name}
    return found


def room(module: str) -> str:
    """The room of the tower that a module belongs to."""
    package, _, rest = module.partition(".")
    return (rest.partition(".")[0] or "__init__") if package == "jaxllm" else package


def test_every_import_goes_down_the_tower(root):
    floor = {name: i for i, rooms in enumerate(TOWER) for name in rooms}
    graph = imports(root)
    assert {room(module) for module in graph} <= floor.keys()
    assert not [
        f"{module} -> {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if room(other) != room(module) and floor[room(other)] <= floor[room(module)]
    ]


def test_no_modules_import_each_other_in_a_loop(root):
    graph, done = imports(root), set()

    def walk(module: str, above: tuple[str, ...]):
        assert module not in above, " -> ".join([*above, module])
        if module not in done:
            for other in graph[module]:
                walk(other, (*above, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def test_no_file_imports_anothers_private_names(root):
    private = [
        f"{name}: {alias.name}"
        for name, path in modules(root).items()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not private


def test_no_lambda_is_bound_to_a_name(root):
    folders = (*PACKAGES, "tests", "benchmarks")
    bound = [
        f"{path.relative_to(root)}:{node.lineno}"
        for folder in folders
        for path in sorted((root / folder).rglob("*.py"))
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)
        if any(isinstance(target, ast.Name) for target in node.targets)
    ]
    assert not bound


def test_no_folder_is_above_16_files_and_no_file_above_450_lines(root):
    packages = (*PACKAGES, "tests", "benchmarks")
    folders = [path for name in packages for path in (root / name, *(root / name).rglob("*/"))]
    large = {str(path): len(list(path.glob("*.py"))) for path in folders}
    assert not {path: count for path, count in large.items() if count > 16}
    files = [path for path in folders if "pallas_kernels" not in path.parts for path in path.glob("*.py")]
    lines = {str(path): path.read_text("utf-8").count("\n") for path in files}
    assert not {path: count for path, count in lines.items() if count > 450}


def test_a_model_alone_loads_no_quantization_method_and_no_eviction():
    loaded = modules_of("jaxllm.models.decoder")
    assert not [name for name in loaded if name.startswith(("jaxllm.quant", "jaxllm.eviction"))]


def test_a_folders_docstring_names_each_of_its_modules_and_no_other(root):
    wrong = {}
    for path in modules(root).values():
        if path.name != "__init__.py" or path.parent.name in ("jaxllm", "pallas_kernels"):
            continue
        text = ast.get_docstring(parsed(path)) or ""
        named = set(re.findall(r"^ *(\w+/?)  ", text, re.M))
        there = {file.stem for file in path.parent.glob("*.py") if file.name != "__init__.py"}
        there |= {f"{inner.parent.name}/" for inner in path.parent.glob("*/__init__.py")}
        if named != there:
            wrong[str(path.parent)] = sorted(named ^ there)
    assert wrong == {}


def test_pallas_kernels_import_neither_of_the_packages_above_them():
    assert not imported_by("pallas_kernels") & {"jaxllm", "checkpoints_convert"}


def test_jaxllm_alone_loads_no_converter_and_no_torch():
    heavy = {"checkpoints_convert", "transformers", "torch", "matplotlib", "lm_eval"}
    assert not imported_by("jaxllm") & heavy


def test_checkpoints_convert_imports_alone_without_torch():
    assert "torch" not in imported_by("checkpoints_convert")


def test_checkpoints_convert_imports_defining_modules_not_the_top_of_jaxllm(root):
    top = re.compile(r"^\s*(import jaxllm( as \w+)?|from jaxllm import .*)$", re.M)
    for path in (root / "checkpoints_convert").rglob("*.py"):
        assert not top.search(path.read_text("utf-8")), path


def fenced(text: str, language: str) -> list[str]:
    """The contents of all fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def test_readme_and_ci_name_the_same_two_commands(root):
    shell = [line for block in fenced((root / "README.md").read_text("utf-8"), "sh")
             for line in block.splitlines()]  # fmt: skip
    script = (root / ".ci" / "run").read_text("utf-8")
    for name in ("DEMO", "TEST"):
        (command,) = re.findall(rf'^{name}="(.*)"$', script, re.M)
        assert command in shell


@pytest.mark.slow
def test_python_of_the_readme_runs(root, tmp_path):
    blocks = fenced((root / "README.md").read_text("utf-8"), "python")
    assert len(blocks) == 2
    assert all(len([line for line in code.splitlines() if line.strip()]) <= 20 for code in blocks)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [" water", " toy"], done.stdout  # as its comment says


def test_version_of_package_and_changelog_agree(root):
    import jaxllm

    changelog = (root / "CHANGELOG.md").read_text("utf-8")
    assert re.search(r"^## (\S+)", changelog, re.M).group(1) == jaxllm.__version__


@pytest.fixture(scope="module")
def project(root) -> dict:
    """The table `project` of pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.mark.parametrize("word", ["jaxlib", "=="])
def test_runtime_dependencies_pin_nothing(project, word):
    assert not [line for line in project["dependencies"] if word in line]


def test_lowest_versions_of_ci_are_the_lower_bounds_of_the_package(root, project):
    lines = (root / ".ci" / "lowest.txt").read_text("utf-8").splitlines()
    lowest = [line for line in lines if not line.startswith("#")]
    assert lowest == [line.replace(">=", "==") for line in project["dependencies"]]


def test_what_tests_compare_with_is_pinned(project):
    pins = [line for line in project["optional-dependencies"]["test"] if "==" in line]
    assert {line.partition("==")[0] for line in pins} == {"transformers", "qwix", "torch"}


def test_test_files_that_documents_name_exist(root):
    pages = [path for folder in ("docs", "tests") for path in (root / folder).rglob("*.md")]
    pages += [root / "README.md", root / "CONTRIBUTING.md"]
    named = {
        (page.name, path)
        for page in pages
        for path in re.findall(r"\btests/[\w/]+\.py\b", page.read_text("utf-8"))
    }
    written = {("add_method.md", "tests/quant/methods/test_quantiles.py")}  # by whoever follows the guide
    assert written <= named
    assert [(page, path) for page, path in sorted(named - written) if not (root / path).exists()] == []
