"""What every test shares: settings made before jax starts, and small fixtures.

Eight virtual CPU devices (tensor-parallel tests), a compilation cache kept between runs, no
network, strict promotion of dtypes and ranks. Fixtures: `shared_data` (skips where the folder is
absent), `torch` (parity tests), `root`, `tiny_checkpoint` (of `tiny_llama.py`).
"""

import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxllm-tests"

DEVICES = "--xla_force_host_platform_device_count=8"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()
# Environment variables rather than jax.config: programs that tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("MPLBACKEND", "agg")
# Matplotlib's own folders where the home directory cannot be written.
os.environ.setdefault("MPLCONFIGDIR", str(Path(tempfile.gettempdir()) / "jaxllm-tests-matplotlib"))

import jax  # noqa: E402
import pytest  # noqa: E402
from tiny_llama import write_checkpoint  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

NO_TORCH = "parity tests need torch, which the `test` extra installs on Python 3.11 only"


def torch_is_excused() -> bool:
    """True where parity tests may be skipped: a newer Python without torch."""
    return sys.version_info >= (3, 12) and find_spec("torch") is None


def pytest_collection_modifyitems(items):
    if torch_is_excused():
        for item in items:
            if item.get_closest_marker("parity"):
                item.add_marker(pytest.mark.skip(reason=NO_TORCH))


@pytest.fixture(scope="session")
def torch():
    """The torch module; on Python 3.11 its absence is an error, not a skip."""
    if torch_is_excused():
        pytest.skip(NO_TORCH)
    import torch

    return torch


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of test data that lies beside the repository, or a skip."""
    path = Path(os.environ.get("JAXLLM_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip("no folder ../shared/data beside the repository; set JAXLLM_SHARED_DATA")
    return path


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A Hugging Face directory of a random Llama with 2 layers, 264 tokens, context 128."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-llama")
