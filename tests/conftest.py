"""What every test shares: the CPU as platform, the shared data folder, marks that need hardware.

Tests of parity and real data read files that are not part of the repository. They are looked for
in `../shared` next to the repository, or where the environment variable LARA_SHARED points;
without them these tests skip and say so.
"""

import atexit
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

# Before anything imports jax: tests run on the CPU unless the caller asks for another platform, and
# ask XLA for less optimisation there: nearly all their time is compilation.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Indexes of read-only data: no test finds those of another run, or leaves its own behind.
os.environ["LARA_JAX_CACHE"] = tempfile.mkdtemp(prefix="lara_jax_cache_")
atexit.register(shutil.rmtree, os.environ["LARA_JAX_CACHE"], ignore_errors=True)

import pytest  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with golden files and sample data; skips the test where it is absent."""
    path = Path(os.environ.get("LARA_SHARED", REPOSITORY.parent / "shared")).resolve()
    if not path.is_dir():
        pytest.skip(f"no shared data at {path} (set LARA_SHARED to where it lies)")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests whose mark names something this machine lacks."""
    missing = {}
    if importlib.util.find_spec("torch") is None:
        missing["torch"] = "PyTorch is not installed (the torch extra)"
    if shutil.which("nvidia-smi") is None:
        missing["gpu"] = "no NVIDIA GPU on this machine"
    for item in items:
        for mark, reason in missing.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))
