"""How fast files are read that are not in memory."""

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fttrain.util.units import MIB

READ_BYTES = 1024 * MIB  # at most
TEMPORARY_BYTES = 256 * MIB  # of a file that is made where there is none to read
PIECE_BYTES = 16 * MIB


def disk_bytes_per_s(files: Sequence[Path], folder: Path) -> float | None:
    """Read rate of ``files``, or where there are none of a temporary file in ``folder``.

    Pages are dropped from memory first. None where the system keeps them, as it does while another
    process has them mapped and in a file system that lives in memory: what would be measured then
    is no disk. None, too, where nothing can be read or written.
    """
    try:
        if files:
            return _read_rate(files)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="read-rate-") as made:
            piece = os.urandom(PIECE_BYTES)
            for _ in range(TEMPORARY_BYTES // PIECE_BYTES):
                made.write(piece)
            made.flush()
            os.fsync(made.fileno())
            return _read_rate([Path(made.name)])
    except OSError:
        return None


def _read_rate(files: Sequence[Path]) -> float | None:
    piece, done_bytes, seconds = bytearray(PIECE_BYTES), 0, 0.0
    for path in files:
        with open(path, "rb", buffering=0) as file:
            descriptor, size_bytes = file.fileno(), os.fstat(file.fileno()).st_size
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if _in_memory(descriptor, size_bytes):
                return None
            started = time.perf_counter()
            while got := file.readinto(piece):
                done_bytes += got
            seconds += time.perf_counter() - started
        if done_bytes >= READ_BYTES:
            break
    return done_bytes / seconds if done_bytes else None


def _in_memory(descriptor: int, size_bytes: int) -> bool:
    """Whether some of a file's pages are still there: those are read without waiting."""
    page = bytearray(1)
    for place in range(8):
        try:
            if os.preadv(descriptor, [page], size_bytes * place // 8, os.RWF_NOWAIT):
                return True
        except BlockingIOError:
            continue  # the disk would have to be asked
        except OSError:
            return False  # a file system that cannot say
    return False
