"""Read rates are the disk's, or there are none."""

import mmap
from pathlib import Path

from fttrain.rig import disk


def test_what_stays_in_memory_is_not_taken_for_the_disk(tmp_path: Path) -> None:
    file = tmp_path / "layer_000.bin"
    file.write_bytes(bytes(4 << 20))
    with open(file, "r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        assert not any(mapped[:: mmap.PAGESIZE])  # mapped pages cannot be dropped
        assert disk.disk_bytes_per_s([file], tmp_path) is None


def test_the_temporary_file_goes_again(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    disk.disk_bytes_per_s([], folder)
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


def test_a_file_that_cannot_be_read_has_no_rate(tmp_path: Path) -> None:
    assert disk.disk_bytes_per_s([tmp_path / "none"], tmp_path) is None
    (tmp_path / "file").touch()
    assert disk.disk_bytes_per_s([], tmp_path / "file") is None
