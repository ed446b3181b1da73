"""Shared by all tests."""

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Generator

# Before torch is imported, here and in every process a test starts: on tensors this small a second
# thread only waits for the first, and for long when other programs use the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Caches of the tests, not of the user: nothing that an earlier run left makes a test pass.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fttrain-tests-")

# But for DeepSpeed's kernel, which takes a minute or two to compile: it stays with the environment.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))

import file_order
import pytest
import torch
from turns import turn

# Without a card Triton interprets its kernels, which has to be said before it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def missing_for_cuda() -> str:
    return "" if torch.cuda.is_available() else "no CUDA device on this machine"


def missing_for_deepspeed() -> str:
    if importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed: make setup does it"
    return "" if shutil.which(os.environ.get("CXX", "c++")) else "no C++ compiler on this machine"


def missing_for_liger() -> str:
    found = importlib.util.find_spec("liger_kernel")
    return "" if found else "Liger is not installed: fttrain[liger]"


def missing_for_ray() -> str:
    found = importlib.util.find_spec("ray") and importlib.util.find_spec("hydra_plugins")
    return "" if found else "Ray is not installed: fttrain[ray]"


MISSING = {
    "cuda": missing_for_cuda,
    "deepspeed": missing_for_deepspeed,
    "liger": missing_for_liger,
    "ray": missing_for_ray,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first. Tests marked with what they need are skipped, with the reason, where
    it is missing.
    """
    items.sort(key=lambda item: file_order.place(item.path))
    for mark, missing in MISSING.items():
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and (reason := missing()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")  # set in each of several processes of tests
    if run is None:
        return (yield)
    with turn(run, alone=item.get_closest_marker("alone") is not None):
        return (yield)
