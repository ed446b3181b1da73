"""Processes that tests start: forks of one that has imported the libraries and done nothing else.
They stand after 30 ms instead of 6 s, and know of nothing that the tests before them did.
"""

import functools
import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

IMPORTED = ["fttrain.training.train", "fttrain.cli.train", "transformers", "peft", "bitsandbytes"]


def start(main: Callable[..., Any], *args: Any) -> BaseProcess:
    """``main(*args)`` in a process with this one's environment; ``main`` is a plain function of a
    module.
    """
    process: BaseProcess = _context().Process(target=_begin, args=(dict(os.environ), main, args))
    process.start()
    return process


def run(
    main: Callable[..., Any], *args: Any, timeout_s: float = 120
) -> "subprocess.CompletedProcess[str]":
    """The finished ``main(*args)``, as ``subprocess.run`` gives a command with captured output.

    For tests of what a program says and leaves: its start, with the imports, is not among it.
    Raises TimeoutError after ``timeout_s`` seconds, and leaves no process.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start(_captured, out, err, main, args)
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{main.__name__}{args} did not finish in {timeout_s:g} s")
        return subprocess.CompletedProcess(args, process.exitcode, out.read_text(), err.read_text())


def _captured(out: Path, err: Path, main: Callable[..., Any], args: tuple[Any, ...]) -> None:
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    main(*args)


def _begin(environment: dict[str, str], main: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    main(*args)


@functools.cache
def _context() -> Any:
    import torch

    if torch.cuda.is_available():  # a library that asks for the GPU at its import spoils forks
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context
