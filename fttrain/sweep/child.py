"""A child process that runs ``fttrain train``. Its output goes to a file, redacted, and it ends
with the process that started it.
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
_DRAIN_S = 10.0  # longest time to read the last output after the child's end


class Child:
    """The process of a trial. One thread must start it and ``poll`` it until its end: the kernel
    ends a child with the thread that started it.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        cwd: Path,
        variables: Mapping[str, str] | None = None,
        cores: Sequence[int] = (),
    ) -> None:
        """Start ``fttrain arguments`` in a new session.

        ``variables``: added to this process's environment. ``cores``: the CPU cores that it may
        use; none: all of this process's.
        """
        self.total_steps: int | None = None  # known once the child has printed it
        self._errors: list[str] = []
        self._last = ""  # the last line that is not blank
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
        """The exit code, negative for a signal; None while the child runs. After its end the file
        has all of its output.
        """
        code = self._process.poll()
        if code is not None:
            self._reader.join(_DRAIN_S)
        return code

    def send(self, signum: int) -> None:
        """Send ``signum``, unless the child has ended."""
        if self._process.poll() is None:
            self._process.send_signal(signum)

    def kill(self) -> None:
        """Kill the child; its ranks, if any, end with it."""
        self.send(signal.SIGKILL)
        self._process.wait()

    def reason(self, code: int) -> str:
        """The reason for an end with ``code``, in one line."""
        if self._errors:
            return self._errors[0]
        if code < 0:
            return killed_by(-code)
        return f"exit code {code}" + (f": {self._last}" if self._last else "")

    def _read(self) -> None:
        """Write each line of the output, redacted, to the file: the thread's function."""
        assert self._process.stdout is not None
        with self._log as log, self._process.stdout as stream:
            for raw in stream:
                line = redact(raw.decode(errors="replace").rstrip("\n"))
                log.write(line.encode() + b"\n")
                log.flush()
                self._note(line)

    def _note(self, line: str) -> None:
        if match := _TOTAL.match(line):
            self.total_steps = int(match[1] or match[2])
        if line.startswith(ERROR):
            self._errors.append(line.removeprefix(ERROR))
        elif line.strip():
            self._last = line.strip()
