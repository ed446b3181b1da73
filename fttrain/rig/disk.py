"""The read rate of files that are not in the page cache."""

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fttrain.util.units import MIB

READ_BYTES = 1024 * MIB  # at most
TEMPORARY_BYTES = 256 * MIB  # of a temporary file, where there is none to read
PIECE_BYTES = 16 * MIB


def disk_bytes_per_s(files: Sequence[Path], folder: Path) -> float | None:
    """Read rate of ``files``, or where there are none of a temporary file in ``folder``.

    The page cache of the files is dropped first. None where the system keeps it, as while another
    process maps the file or in a file system in memory: that would not be the rate of a disk. None,
    too, where nothing can be read or written.
    """
    try:
        if files:
            return _read_rate(files)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="read-rate-") as file:
            piece = os.urandom(PIECE_BYTES)
            for _ in range(TEMPORARY_BYTES // PIECE_BYTES):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            return _read_rate([Path(file.name)])
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
            while count := file.readinto(piece):
                done_bytes += count
            seconds += time.perf_counter() - started
        if done_bytes >= READ_BYTES:
            break
    return done_bytes / seconds if done_bytes else None


def _in_memory(descriptor: int, size_bytes: int) -> bool:
    """Whether some of a file's pages are in the page cache: those are read without waiting."""
    page = bytearray(1)
    for eighth in range(8):
        try:
            if os.preadv(descriptor, [page], size_bytes * eighth // 8, os.RWF_NOWAIT):
                return True
        except BlockingIOError:
            continue  # not cached: the disk would have to be read
        except OSError:
            return False  # a file system without RWF_NOWAIT
    return False
