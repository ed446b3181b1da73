"""What measure.md says of links: savings by their figures, faults in capitals."""

from pathlib import Path

import pytest
import tiny
import torch

from fttrain.model.decoder import Architecture
from fttrain.quant.config import QuantConfig
from fttrain.rig.measure import MeasuredShapes
from fttrain.rig.measure_report import tables, write_report
from fttrain.rig.profile import (
    COLLECTIVES,
    CardProfile,
    HostProfile,
    LinkProfile,
    LinkSample,
    Measured,
    RigProfile,
)

FORMAT = Architecture(tiny.model().config).frozen_format(QuantConfig(), torch.bfloat16)
WORK = MeasuredShapes("tiny", 3, 128, 4, FORMAT, gradient_bytes=4096, boundary_bytes=16384)


def link(transport: str, seen: str, gradients_s: float, **more: object) -> LinkProfile:
    samples = {name: (LinkSample(65536, 1e-3), LinkSample(1 << 20, 4e-3)) for name in COLLECTIVES}
    found = {"samples": samples, "gradients_s": gradients_s, **more}
    return LinkProfile(transport, seen, 2, **found)  # type: ignore[arg-type]


@pytest.fixture
def profile() -> RigProfile:
    """GEMMs take a second a step; the gradients 0.1 and 0.25 s."""
    flop = 3 * WORK.layers * WORK.micro_batches * WORK.gemm_flop
    card = CardProfile("card", "cuda", 24 << 30, float(flop))
    links = (
        link("default", "P2P/CUMEM over NVLink", 0.1),
        link("no_p2p", "SHM/direct/direct", 0.25),
        link("sockets", "SHM/direct/direct", 0.05, as_asked=False),
        link("gloo", "TCP on lo", 0.0, samples={}, wrong="rank 1: a byte differs"),
    )
    measured = Measured("2026-11-25T12:00:00+00:00", "0123", {"torch": "2.13.0"})
    return RigProfile("2x card", (card, card), HostProfile("cpu", 8, 64 << 30), links, measured)


def test_the_report_says_what_a_link_saves_and_which_is_wrong(
    profile: RigProfile, tmp_path: Path
) -> None:
    text = write_report(tmp_path, profile, WORK, tables(profile, WORK)).read_text()
    assert (
        "default (P2P/CUMEM over NVLink) saves at most 12.0% of a step with strategy=replicate "
        "beside no_p2p (SHM/direct/direct)." in text
    )  # 0.15 s of 1.25
    assert "saves" not in text.split("beside no_p2p", 1)[1]  # sockets are not slower
    assert "| default | 1.000 | 0.100 (10.0%) |" in text
    assert "gloo is WRONG: rank 1: a byte differs" in text
    assert "| gloo | 1.000" not in text
    assert "SHM/direct/direct (not what was asked for)" in text
    # 1 MiB in 4 ms: 0.262 GB/s, of which a rank's part of all_gather is half.
    assert "| default: all_gather | 1 MiB | 4.000 | 0.262 | 0.131 |" in text


def test_a_single_rank_has_no_links(profile: RigProfile, tmp_path: Path) -> None:
    alone = RigProfile("card", profile.cards[:1], profile.host, (), profile.measured)
    printed = tables(alone, WORK)
    assert [table.title for table in printed] == ["Cards", "Copies", "Host"]
    text = write_report(tmp_path, alone, WORK, printed).read_text()
    assert "| between host and card | not available |" in text
    assert [file.name for file in tmp_path.iterdir()] == ["measure.md"]
