"""What all tests share: programs, which are compiled once, and the scripts of experiments."""

import gc
import importlib.metadata
import importlib.util
import os
from pathlib import Path

# The suite spends most of its time compiling: much less without optimisation and, where they still exist, with the older emitters.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10."),
)

import jax
import pytest

gc.set_threshold(200_000, 20, 100)  # tracing leaves many objects and little garbage


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """A cache of compiled programs, shared by the processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    Path(folder).mkdir(exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _experiment(name):
    path = Path(__file__).parents[1] / "experiments" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shared_data():
    """The module experiments/shared_data.py."""
    return _experiment("shared_data")


@pytest.fixture(scope="session")
def planted():
    """The module experiments/planted.py."""
    return _experiment("planted")
