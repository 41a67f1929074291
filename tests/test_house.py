"""The rules of the house: who may import whom, and README, package and CI saying the same."""

import re
import subprocess
import sys
import tomllib

import pytest

PACKAGES = ("jaxllm", "pallas_kernels", "checkpoints_convert")


def imported_by(package: str) -> set[str]:
    """Top-level names of all modules loaded by importing `package` in a new process."""
    code = f"import sys, {package}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_pallas_kernels_import_neither_of_the_packages_above_them():
    assert not imported_by("pallas_kernels") & {"jaxllm", "checkpoints_convert"}


def test_jaxllm_alone_loads_no_converter_and_no_torch():
    heavy = {"checkpoints_convert", "transformers", "torch", "matplotlib", "lm_eval"}
    assert not imported_by("jaxllm") & heavy


def test_checkpoints_convert_imports_alone_without_torch():
    assert "torch" not in imported_by("checkpoints_convert")


def test_only_load_names_checkpoints_convert(root):
    naming = [
        str(path.relative_to(root))
        for package in ("jaxllm", "pallas_kernels")
        for path in sorted((root / package).rglob("*.py"))
        if re.search(r"^\s*(from|import) checkpoints_convert", path.read_text("utf-8"), re.M)
    ]
    assert naming == ["jaxllm/load.py"]


def test_load_imports_checkpoints_convert_inside_functions_only(root):
    text = (root / "jaxllm" / "load.py").read_text("utf-8")
    assert not re.search(r"^(from|import) checkpoints_convert", text, re.M)


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


def test_python_of_the_readme_runs(root, tmp_path):
    blocks = fenced((root / "README.md").read_text("utf-8"), "python")
    assert len(blocks) == 2
    assert all(len([line for line in code.splitlines() if line.strip()]) <= 20 for code in blocks)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [" water", " toy"], done.stdout  # as its comment says


def test_every_folder_and_file_of_the_readme_list_exists(root):
    (listing,) = fenced((root / "README.md").read_text("utf-8"), "text")
    names = [line.split()[0] for line in listing.splitlines() if line.strip()]
    assert [name for name in names if not (root / name).exists()] == []


def test_readme_list_names_every_module(root):
    (listing,) = fenced((root / "README.md").read_text("utf-8"), "text")
    names = {line.split()[0] for line in listing.splitlines() if line.strip()}
    missing = [
        str(path.relative_to(root))
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
        if path.name != "__init__.py" and str(path.relative_to(root)) not in names
    ]
    assert missing == []


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
