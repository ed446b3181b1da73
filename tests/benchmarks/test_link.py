"""A paced link: copies take no less than their time there, whichever side stream makes them."""

import importlib
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from smoke import ROOT

from fttrain.store import side_stream

Module = Callable[[str], ModuleType]
MIB = 1 << 20
RATE = 0.05  # GB/s: a MiB takes 21 ms
SETTINGS = {"gb_s": RATE, "own_gb_s": {"host to host": 10.0}}


def test_two_lanes_share_the_link(module: Module) -> None:
    """The time it takes has a lower bound, which no load can break."""
    sources = [torch.arange(MIB // 4, dtype=torch.int32) + number for number in range(4)]
    copies = [torch.zeros_like(source) for source in sources]
    with module("harness.link").paced(SETTINGS) as ways:
        streams = [side_stream.copy_stream(torch.device("cpu")) for _ in range(2)]
        began = time.perf_counter()
        for number, (into, source) in enumerate(zip(copies, sources, strict=True)):
            streams[number % 2].run(partial(side_stream.copy, into, source))
        asked_s = time.perf_counter() - began
        for own in streams:
            own.synchronize()
        taken_s = time.perf_counter() - began
    needed_s = 4 * MIB / (RATE * 1e9)
    assert taken_s >= needed_s
    assert asked_s < taken_s  # whoever asks does not wait
    assert ways["host to host"].carried_bytes == 4 * MIB
    for into, source in zip(copies, sources, strict=True):
        assert torch.equal(into, source)


def test_everyone_who_copies_is_paced_and_only_inside(module: Module) -> None:
    link = module("harness.link")
    pattern = re.compile(r"from fttrain\.store\.side_stream import .*\bcopy\b")
    files = [
        file.relative_to(ROOT).with_suffix("")
        for file in sorted((ROOT / "fttrain").rglob("*.py"))
        if pattern.search(file.read_text())
    ]
    names = [".".join(Path(file).parts) for file in files]
    assert {"fttrain.store.host", "fttrain.store.activations"} <= set(names)
    plain = side_stream.copy
    with link.paced(SETTINGS):
        paced = {name: importlib.import_module(name).copy for name in names}
        assert all(copy is not plain for copy in paced.values())
    assert all(importlib.import_module(name).copy is plain for name in names)


@pytest.mark.cuda
@pytest.mark.parametrize("to_card", [True, False])
def test_the_card_copies_at_the_rate_that_is_asked_for(module: Module, to_card: bool) -> None:
    link, gauge = module("harness.link"), module("harness.fit_gauge")
    card = torch.device("cuda", 0)
    own = gauge.rates(card)
    settings = {
        "gb_s": min(own["copy_gb_s"].values()) / 4,
        "own_gb_s": own["copy_gb_s"],
        "cycles_per_s": own["cycles_per_s"],
    }
    on_host = torch.arange(16 * MIB, dtype=torch.int32).pin_memory()
    on_card = torch.zeros_like(on_host, device=card) if to_card else on_host.to(card)
    back = torch.zeros_like(on_host).pin_memory()
    into, source = (on_card, on_host) if to_card else (back, on_card)
    with link.paced(settings):
        streams = [side_stream.copy_stream(card) for _ in range(2)]
        torch.cuda.synchronize()
        began = time.perf_counter()
        for number in range(4):
            streams[number % 2].run(partial(side_stream.copy, into, source))
        asked_s = time.perf_counter() - began
        torch.cuda.synchronize()
        taken_s = time.perf_counter() - began
    needed_s = 4 * into.nbytes / (settings["gb_s"] * 1e9)
    assert taken_s >= 0.8 * needed_s  # the clock that a waiting kernel counts changes
    assert asked_s < needed_s / 2  # the host runs ahead
    assert torch.equal(into.cpu(), source.cpu())
