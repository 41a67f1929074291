"""Compiled programs kept between runs of the command line: where, how many; never at a run's cost."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxllm.cli import compilation_cache

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def without_jaxs_own(monkeypatch, tmp_path):
    """A user who has set nothing; the cache directory."""
    for name in compilation_cache.OF_JAX:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield tmp_path / "jaxllm" / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_for_the_user_unless_jax_is_told_where(without_jaxs_own, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    for name in compilation_cache.OF_JAX:
        with monkeypatch.context() as patch:
            patch.setenv(name, "false")
            compilation_cache.start()
        assert jax.config.jax_compilation_cache_dir == before and not without_jaxs_own.exists()
    compilation_cache.start()
    assert jax.config.jax_compilation_cache_dir == str(without_jaxs_own) and without_jaxs_own.is_dir()


def test_an_option_and_a_variable_keep_nothing(without_jaxs_own, monkeypatch, jaxllm):
    assert jaxllm("--no-compilation-cache", "train").status == 0 and not without_jaxs_own.exists()
    with monkeypatch.context() as patch:
        patch.setenv("JAXLLM_NO_COMPILATION_CACHE", "1")
        assert jaxllm("train").status == 0 and not without_jaxs_own.exists()
    assert jaxllm("train").status == 0 and without_jaxs_own.is_dir()


def test_a_directory_that_cannot_be_made_is_one_line_and_no_error(without_jaxs_own, capsys):
    before = jax.config.jax_compilation_cache_dir
    without_jaxs_own.parent.write_text("in the way")
    compilation_cache.start()
    said = capsys.readouterr().err
    assert said.startswith("jaxllm: compiled programs are not kept: ") and said.count("\n") == 1
    assert jax.config.jax_compilation_cache_dir == before


def test_a_large_cache_is_halved_from_the_least_recently_read_on(tmp_path):
    for i, size in enumerate([30, 0, 30, 30, 30]):
        (tmp_path / f"{i}").write_bytes(bytes(size))
        os.utime(tmp_path / f"{i}", (1000 + i, 1000))
    compilation_cache.prune(tmp_path, 120)  # it is not large
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "2", "3", "4"]  # an empty file is broken
    compilation_cache.prune(tmp_path, 119)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4"]


@pytest.mark.slow
def test_a_second_process_compiles_nothing_and_a_broken_entry_fails_nothing(tiny_checkpoint, tmp_path):
    def generate() -> str:
        environment = {k: v for k, v in os.environ.items() if k not in compilation_cache.OF_JAX}
        done = subprocess.run(
            [sys.executable, "-m", "jaxllm", "generate", "--model", str(tiny_checkpoint),
             "--prompt", "the", "--max-new-tokens", "2"],
            capture_output=True, text=True, timeout=300, env=environment | {"XDG_CACHE_HOME": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def entries() -> list[Path]:
        return sorted((tmp_path / "jaxllm").rglob("*-cache"))

    plain = generate()
    kept = entries()
    assert generate() == plain and entries() == kept != []
    for entry in kept:
        entry.write_bytes(b"broken")
    assert generate() == plain
