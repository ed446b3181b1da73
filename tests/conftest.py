"""Shared by all tests."""

import atexit
import os
import shutil
import tempfile

# Before torch is imported, here and in every process a test starts: on tensors this small a second
# thread only waits for the first, and for long when other programs use the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Caches of the tests, not of the user: nothing that an earlier run left makes a test pass.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fttrain-tests-")

import pytest

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``cuda`` are skipped, with the reason, where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
