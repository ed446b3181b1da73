"""A lineage that is left: the snapshots that are set aside, also by several nodes."""

import os
from pathlib import Path

import pytest
import torch

from fttrain.checkpoint import lineage
from fttrain.checkpoint.adapter_peft import AdapterInfo
from fttrain.checkpoint.discovery import snapshot_to_resume
from fttrain.checkpoint.lineage import branch_off, branched_at
from fttrain.checkpoint.snapshot import LEFT, Snapshot, save_snapshot
from fttrain.distributed.rank_group import RankGroup

NAME = "model.layers.0.self_attn.q_proj"


def save(checkpoints: Path, step: int) -> Path:
    adapter = {f"{NAME}.lora_A": torch.ones(2, 8), f"{NAME}.lora_B": torch.zeros(5, 2)}
    info = AdapterInfo(2, 4.0, 0.0, ("q_proj",), True)
    taken = Snapshot(step, adapter, {"step": torch.tensor(step)}, {}, info, "base", "main")
    return save_snapshot(checkpoints, taken, keep_last=9)


def names(checkpoints: Path) -> set[str]:
    return {path.name for path in checkpoints.iterdir() if path.is_dir()}


def test_without_a_process_above_it_the_lineage_is_left_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container the launcher may be out of sight: its id is 0."""
    save(tmp_path, 1), save(tmp_path, 2)
    monkeypatch.setattr(os, "getppid", lambda: 0)
    branch_off(tmp_path, 1)
    assert names(tmp_path) == {"step_00000001", f"{LEFT}step_00000002"}
    assert branched_at(tmp_path) == 1
    monkeypatch.undo()
    assert branched_at(tmp_path) is None, "of another launcher"


def test_another_machine_may_set_the_same_ones_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    seen = lineage.later_than(tmp_path, 1)
    branch_off(tmp_path, 1)  # the other one was quicker
    monkeypatch.setattr(lineage, "later_than", lambda checkpoints, step: seen)
    left = {"step_00000001", f"{LEFT}step_00000002", f"{LEFT}step_00000003"}
    assert names(tmp_path) == left
    branch_off(tmp_path, 1)
    assert names(tmp_path) == left


def test_what_was_left_before_is_in_nobodys_way(tmp_path: Path) -> None:
    save(tmp_path, 1), save(tmp_path, 2)
    branch_off(tmp_path, 1)
    again = save(tmp_path / "elsewhere", 2)
    again.rename(tmp_path / "step_00000002")
    branch_off(tmp_path, 1)
    assert names(tmp_path) == {"step_00000001", f"{LEFT}step_00000002", "elsewhere"}


def test_a_restart_takes_nothing_older_than_the_start_of_its_lineage(tmp_path: Path) -> None:
    """What it began with lies where nobody looks for the newest."""
    save(tmp_path, 1)
    begun = save(tmp_path / "kept", 3)
    alone = RankGroup(0, 1, 0, torch.device("cpu"))
    branch_off(tmp_path, 3)
    for again in (False, True):
        found = snapshot_to_resume(tmp_path, str(begun), alone, again)
        assert found is not None
        assert found[1].step == 3
    save(tmp_path, 4)
    for _ in range(2):  # the second time after a start that has saved nothing of its own
        found = snapshot_to_resume(tmp_path, str(begun), alone, True)
        assert found is not None
        assert found[1].step == 4
        branch_off(tmp_path, 4)
