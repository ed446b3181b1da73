"""One ``fttrain train`` as a child: what it says goes into a file, redacted, and it ends with the
process that started it.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from fttrain.launcher.environment import PARENT_PID
from fttrain.launcher.launch import killed_by
from fttrain.util.redact import redact

PROGRAM = (sys.executable, "-m", "fttrain")
ERROR = "fttrain: error: "
_TOTAL = re.compile(r"^(\d+) steps of \d+ rows|^step \d+/(\d+) ")
_DRAIN_S = 10.0  # after the child's end its last words are read for so long at most


class Child:
    """A running trial. Its start and ``poll`` until its end belong on one thread: the kernel ends a
    child whose starting thread is gone.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        cwd: Path,
        variables: Mapping[str, str] | None = None,
        cores: Sequence[int] = (),
    ) -> None:
        """Starts ``fttrain arguments`` in a session of its own.

        ``variables``: of its environment, beside this process's. ``cores``: of the CPU that it may
        use; none: all of this process's.
        """
        self.total_steps: int | None = None  # once it has said so
        self._errors: list[str] = []
        self._last = ""  # the last line that says something
        self._log = log.open("ab")
        environment = {**os.environ, **(variables or {}), PARENT_PID: str(os.getpid())}
        self._process = subprocess.Popen(
            [*PROGRAM, *arguments],
            env=environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self._process.pid, cores)  # its threads inherit it
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs. All it said is then in the
        file.
        """
        code = self._process.poll()
        if code is not None:
            self._reader.join(_DRAIN_S)
        return code

    def send(self, signum: int) -> None:
        """A signal, unless it has ended."""
        if self._process.poll() is None:
            self._process.send_signal(signum)

    def kill(self) -> None:
        """Ends it at once; its ranks, if any, end with it."""
        self.send(signal.SIGKILL)
        self._process.wait()

    def reason(self, code: int) -> str:
        """Why it ended with ``code``, in one line."""
        if self._errors:
            return self._errors[0]
        if code < 0:
            return killed_by(-code)
        return f"exit code {code}" + (f": {self._last}" if self._last else "")

    def _read(self) -> None:
        """The thread: every line, redacted, into the file."""
        assert self._process.stdout is not None
        with self._log as log, self._process.stdout as stream:
            for raw in stream:
                line = redact(raw.decode(errors="replace").rstrip("\n"))
                log.write(line.encode() + b"\n")
                log.flush()
                self._note(line)

    def _note(self, line: str) -> None:
        if found := _TOTAL.match(line):
            self.total_steps = int(found[1] or found[2])
        if line.startswith(ERROR):
            self._errors.append(line.removeprefix(ERROR))
        elif line.strip():
            self._last = line.strip()
