"""The orderly stop: SIGINT and SIGTERM become a request that the loop reads between steps."""

import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

Handler = Callable[[int, FrameType | None], Any] | int | None


class StopSignals:
    """The handler of SIGINT and SIGTERM, as a request to stop that the loop reads between steps.

    No exception is raised, so neither the first nor any later signal can break a save. Only the
    main thread may enter it. ``signum`` is the first signal received, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Handler] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, 0 when no signal came."""
        return 0 if self.signum is None else 128 + self.signum

    def __enter__(self) -> Self:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        again = self.signum is not None
        self.signum = self.signum or signum
        if os.environ.get("RANK", "0") != "0":
            return  # rank 0 speaks for all
        name = signal.Signals(signum).name
        pid = os.getpid()
        text = (
            f"\n{name} again: still finishing and saving; kill -9 {pid} ends it without saving\n"
            if again
            else f"\n{name}: finishing this step, saving, then stopping\n"
        )
        with contextlib.suppress(OSError):  # the terminal may be gone: nobody left to tell
            os.write(2, text.encode())  # print() is not safe inside a signal handler
