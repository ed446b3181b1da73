"""What the driver says, and that it is None where nobody can say."""

from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import torch

from fttrain.rig import nvml, topology
from fttrain.rig.card import handle_of
from fttrain.rig.machine import identity, versions


def test_without_a_gpu_nothing_is_available() -> None:
    cpu = torch.device("cpu")
    assert topology.facts(cpu) == {}
    assert topology.nvlink_bytes(cpu) is None


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: object) -> None:
        raise topology.pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(topology.pynvml, "nvmlInit", gone)
    assert nvml.driver_version() is None
    assert "driver" not in versions()


def test_a_machine_is_known_again() -> None:
    assert identity() == identity()
    assert len(identity()) == 16
    assert versions()["torch"] == torch.__version__


@pytest.mark.parametrize(("written", "node"), [("1\n", 1), ("-1\n", None), (None, None)])
def test_the_node_of_a_card_s_slot(
    written: str | None, node: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel names it; -1: the host has one only."""
    slot = SimpleNamespace(domain=0, bus=0xC3, device=0)
    monkeypatch.setattr(topology.pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(topology.pynvml, "nvmlDeviceGetPciInfo", lambda card: slot)
    monkeypatch.setattr(topology, "PCI_DEVICES", tmp_path)
    folder = tmp_path / "0000:c3:00.0"
    folder.mkdir()
    if written is not None:
        (folder / "numa_node").write_text(written)
    assert topology._numa_node("card") == node


@pytest.mark.cuda
def test_a_card_s_facts_are_plausible() -> None:
    facts = topology.facts(torch.device("cuda", 0))
    assert nvml.driver_version()
    now, most = facts["pcie_generation"], facts["pcie_generation_most"]
    assert now is None or 1 <= now <= most <= 7
    assert facts["pcie_width"] is None or 1 <= facts["pcie_width"] <= facts["pcie_width_most"] <= 32
    assert facts["nvlink_lanes"] >= 0
    assert facts["power_limit_w"] is None or 10 < facts["power_limit_w"] < 2000
    slot = pynvml.nvmlDeviceGetPciInfo(handle_of(torch.device("cuda", 0)))
    place = f"{slot.domain:04x}:{slot.bus:02x}:{slot.device:02x}.0"
    assert not topology.PCI_DEVICES.is_dir() or (topology.PCI_DEVICES / place).is_dir()
