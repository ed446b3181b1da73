"""What the driver counts of a card's memory: the allocator's, CUDA's context, NCCL's buffers."""

import os
import threading
from types import TracebackType
from typing import Any

import pynvml

POLL_S = 0.05


class DriverMemory:
    """The most that NVML says while the block runs, sampled by a thread.

    ``own_bytes``: of this process; ``card_bytes``: of all that use the card. None where NVML does
    not say: many containers hide processes from each other.
    """

    def __init__(self, uuid: str) -> None:
        """``uuid``: the card's, as torch has it: numbers may be others than the driver's."""
        self.own_bytes: int | None = None
        self.card_bytes: int | None = None
        self._uuid = uuid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="driver memory", daemon=True)

    def __enter__(self) -> "DriverMemory":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{self._uuid}")
        except pynvml.NVMLError:
            return
        while True:
            self._sample(handle)
            if self._over.wait(POLL_S):
                return

    def _sample(self, handle: Any) -> None:
        try:
            used = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
            self.card_bytes = max(self.card_bytes or 0, used)
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except pynvml.NVMLError:
            return
        for process in processes:
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                self.own_bytes = max(self.own_bytes or 0, int(process.usedGpuMemory))
