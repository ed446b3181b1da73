"""The newest snapshot of any machine reaches every rank, whoever sees its files."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from ranks import run_ranks

from fttrain.checkpoint.adapter_peft import AdapterInfo
from fttrain.checkpoint.discovery import newest_snapshot, snapshot_to_resume
from fttrain.checkpoint.lineage import branch_off
from fttrain.checkpoint.snapshot import Snapshot, load_snapshot, save_snapshot
from fttrain.distributed.process_group import split_by_node
from fttrain.distributed.rank_group import RankGroup
from fttrain.util.errors import UserError

CPU = torch.device("cpu")
# Steps of the snapshots that the first and the second machine have; which of them is taken
CASES = {
    "the first has more": ((2, 6), (4,), (0, 6)),
    "the second has more": ((2,), (4,), (1, 4)),
    "both have it": ((4,), (4,), (0, 4)),
    "the second alone": ((), (3,), (1, 3)),
    "nobody": ((), (), None),
}


def snapshot(step: int, machine: int) -> Snapshot:
    generator = torch.Generator().manual_seed(10 * step + machine)
    name = "model.layers.0.self_attn.q_proj"
    adapter = {
        f"{name}.lora_A": torch.randn(2, 8, generator=generator),
        f"{name}.lora_B": torch.zeros(5, 2),
    }
    optimizer = {
        "8bit": torch.randint(0, 255, (7,), generator=generator, dtype=torch.uint8),
        "half": torch.randn(3, generator=generator).to(torch.bfloat16),
        "step": torch.tensor(step),
        "none": torch.zeros(0),
    }
    info = AdapterInfo(2, 4.0, 0.05, ("q_proj",), True)
    return Snapshot(step, adapter, optimizer, {"loss": 0.1 + 0.2}, info, "base", "main")


def same(one: Snapshot, other: Snapshot) -> bool:
    tensors = ((one.adapter, other.adapter), (one.optimizer, other.optimizer))
    plain = [(s.step, s.scalars, s.adapter_info, s.base_model, s.revision) for s in (one, other)]
    return plain[0] == plain[1] and all(
        ours.keys() == theirs.keys()
        and all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)
        for ours, theirs in tensors
    )


def look(folder: Path) -> dict[str, Any]:
    """On one of four ranks of two machines; each machine has a folder of its own."""
    rank = torch_dist.get_rank()
    group = split_by_node(RankGroup(rank, 4, rank % 2, CPU), 2)
    own, found = group.inter_node.rank, {}
    for case in CASES:
        checkpoints = folder / case / str(own)
        taken = newest_snapshot(checkpoints, "auto", group)
        found[case] = None if taken is None else (taken[0], taken[1])
    only_here = folder / "the second alone" / "1" / "step_00000003"
    path = str(only_here) if own == 1 else str(only_here / "not here")
    found["by path"] = newest_snapshot(folder / "nobody" / "0", path, group)
    damaged = folder / "damaged" / str(own)
    for name, resume in (("damaged", "auto"), ("no such path", str(folder / "nothing"))):
        with pytest.raises(UserError) as error:
            newest_snapshot(damaged, resume, group)
        found[name] = str(error.value)
    return found


def test_every_rank_gets_the_newest(tmp_path: Path) -> None:
    for case, (first, second, _) in CASES.items():
        for machine, steps in enumerate((first, second)):
            for step in steps:
                folder = tmp_path / case / str(machine)
                save_snapshot(folder, snapshot(step, machine))
    broken = save_snapshot(tmp_path / "damaged" / "0", snapshot(1, 0))
    (broken / "optimizer.safetensors").write_bytes(b"")
    for rank, found in enumerate(run_ranks(look, 4, tmp_path)):
        for case, (_, _, expected) in CASES.items():
            if expected is None:
                assert found[case] is None
                continue
            machine, step = expected
            where, taken = found[case]
            assert same(taken, snapshot(step, machine)), (case, rank)
            path = str(tmp_path / case / str(machine) / f"step_{step:08d}")
            assert where == (path if machine == 0 else f"{path} on {os.uname().nodename}")
        assert same(found["by path"][1], snapshot(3, 1))
        assert "none of the 1 checkpoints is whole" in found["damaged"]
        assert found["no such path"].startswith(f"resume={tmp_path / 'nothing'}: not a whole")


def attempts(folder: Path) -> list[int | None]:
    """On one of four ranks of two machines: what a run that is started again and again goes on
    from.
    """
    rank = torch_dist.get_rank()
    group = split_by_node(RankGroup(rank, 4, rank % 2, CPU), 2)
    own = folder / str(group.inter_node.rank)
    asked, found = str(own / "step_00000003"), []

    def wanted(again: bool) -> None:
        taken = snapshot_to_resume(own, asked, group, again)
        found.append(None if taken is None else taken[1].step)

    def on_machine(place: int, act: Callable[[], object]) -> None:
        if group.intra_node.is_main and group.inter_node.rank == place:
            act()
        group.barrier()

    wanted(again=False)
    wanted(again=True)  # it crashed before it had read
    for place in range(2):
        on_machine(place, lambda: branch_off(own, 3))
    wanted(again=True)
    on_machine(1, lambda: save_snapshot(own, snapshot(4, 1)))
    on_machine(0, lambda: [note.unlink() for note in own.glob(".branch_*")])  # it came anew
    wanted(again=True)
    return found


def test_all_machines_leave_the_later_ones(tmp_path: Path) -> None:
    """The first has the one that is asked for, the second later ones as well."""
    for machine, steps in enumerate(((2, 3), (3, 6))):
        for step in steps:
            save_snapshot(tmp_path / str(machine), snapshot(step, machine))
    for found in run_ranks(attempts, 4, tmp_path):
        assert found == [3, 3, 3, 4]
    assert not list(tmp_path.glob("*/.left_*")), "gone with the first save"


def test_one_rank_reads_it_as_it_is(tmp_path: Path) -> None:
    path = save_snapshot(tmp_path, snapshot(5, 0))
    found = newest_snapshot(tmp_path, "auto", RankGroup(0, 1, 0, CPU))
    assert found is not None
    assert found[0] == str(path)
    assert same(found[1], load_snapshot(path))
