"""memory.json in the report."""

import json
from pathlib import Path

import pytest

from fttrain.track.memory import memory_section

GIB = 1024**3


def use(part: str, device: float, host: float) -> dict[str, object]:
    return {"part": part, "device_bytes": int(device * GIB), "host_bytes": int(host * GIB)}


def test_parts_of_all_ranks_stand_side_by_side(tmp_path: Path) -> None:
    ranks = [[use("layers", 2, 0), use("head", 0, 0.5)], [use("layers", 1.25, 0)]]
    path = tmp_path / "memory.json"
    path.write_text(json.dumps({"step": 1, "ranks": ranks}))
    assert memory_section(path) == (
        "## Memory in step 1, GiB\n\n"
        "| part | rank 0, device | rank 0, host | rank 1, device | rank 1, host |\n"
        "|---|---|---|---|---|\n"
        "| layers | 2.00 |  | 1.25 |  |\n"
        "| head |  | 0.50 |  |  |"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 1}', '{"step": 1, "ranks": [3]}'])
def test_what_is_not_whole_is_left_out(text: str, tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text(text)
    assert memory_section(tmp_path / "memory.json") is None
    assert memory_section(tmp_path / "none.json") is None
