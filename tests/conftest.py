"""What every test shares: settings made before jax starts, and small fixtures.

Eight virtual CPU devices (tensor-parallel tests), a compiler told to be quick, a compilation cache
kept between runs, no network, strict promotion of dtypes and ranks. Fixtures: `shared_data` (skips
where the folder is absent), `torch` (parity tests), `usual_compiler` (tests of compiled programs),
`root`, `tiny_checkpoint` (of `tiny_llama.py`).
"""

import gc
import os
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxllm-tests"

# Environment variables rather than jax.config: programs that tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in flags:
    flags += " --xla_force_host_platform_device_count=8"
# Most of a first run is the compiling of thousands of small programs that run once: a quick compiler
# halves it. XLA_FLAGS=--xla_backend_optimization_level=3 tests what the compiler of a user makes.
USUAL: dict[str, int | bool] = {"xla_backend_optimization_level": 3}
QUICK = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # newer ones do not know the flag, which ends the process
    USUAL["xla_cpu_use_fusion_emitters"] = True
    QUICK += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if os.environ["JAX_PLATFORMS"] == "cpu" and "optimization_level" not in flags:
    flags += f" {QUICK}"
os.environ["XLA_FLAGS"] = flags.strip()
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

# A tenth of the time went into looking for cycles among objects of which few are ever garbage.
gc.freeze()
gc.set_threshold(100_000, 20, 100)

# JAX keeps the MLIR of what it has lowered, a megabyte a program. With a thousand of them alive each further
# one takes several times as long, and a worker would grow to 5 GB.
PROGRAMS_KEPT = 900
lowered = 0


def count_lowered(event: str, seconds: float, **_) -> None:
    global lowered
    lowered += event.endswith("jaxpr_to_mlir_module_duration")


jax.monitoring.register_event_duration_secs_listener(count_lowered)


def pytest_runtest_teardown():
    global lowered
    if lowered > PROGRAMS_KEPT:
        jax.clear_caches()
        lowered = 0


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture
def compiled():
    """The names of the programs that are compiled from here on, as they come."""
    jax.clear_caches()
    names: list[str] = []

    def listen(event: str, seconds: float, *, fun_name: str = "", **_) -> None:
        if event.endswith("backend_compile_duration"):
            names.append(fun_name.removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


NO_TORCH = "parity tests need torch, which the `test` extra installs on Python 3.11 only"


def torch_is_excused() -> bool:
    """True where parity tests may be skipped: a newer Python without torch."""
    return sys.version_info >= (3, 12) and find_spec("torch") is None


def pytest_collection_modifyitems(items):
    # Notebooks and guides take minutes: first, so that no worker is left alone with one at the end.
    items.sort(key=lambda item: item.path.name not in ("test_notebooks.py", "test_docs.py"))
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
def usual_compiler() -> dict[str, int | bool]:
    """`compiler_options` of a user's program, for tests that look at what was compiled."""
    return USUAL


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A Hugging Face directory of a random Llama with 2 layers, 264 tokens, context 128."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-llama")
