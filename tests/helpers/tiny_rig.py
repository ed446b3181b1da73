"""Made-up rigs, and a tiny model that just fits them or does not."""

from dataclasses import replace

import tiny
import tiny_strategy

from fttrain.model.decoder import Architecture
from fttrain.plan.choose import Candidate, candidates, choose
from fttrain.rig.profile import (
    CardProfile,
    CopyRates,
    HostProfile,
    LinkProfile,
    LinkSample,
    RigProfile,
)
from fttrain.strategy.spec import StepSize, StrategySpec

A = Architecture(tiny.model(num_hidden_layers=6).config)
SPEC = replace(tiny_strategy.variant(), size=StepSize(1, 64, 1))
ROOMY = 1 << 40


def rig(
    memory_bytes: int,
    host_bytes: int = ROOMY,
    cards: int = 1,
    link: float = 1e9,
    copy: float = 1e9,
) -> RigProfile:
    copies = CopyRates(copy)
    card = CardProfile("card", "cuda", memory_bytes, 1e10, 1e10, 1e10, copies, copies)
    names = ("all_reduce", "all_gather", "send_recv")
    samples = {name: (LinkSample(1, 1 / link), LinkSample(10**9, 1e9 / link)) for name in names}
    host = HostProfile("cpu", 8, host_bytes, adamw_values_per_s=1e9)
    links = (LinkProfile("default", "?", cards, samples),)
    return RigProfile("made up", (card,) * cards, host, links)


def chosen(on: RigProfile, spec: StrategySpec = SPEC) -> list[Candidate]:
    return choose(list(candidates(spec, len(on.cards))), A, on, lambda done, total: None)
