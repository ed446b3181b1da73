"""Checks of the cards by the driver's figures: link, power, ECC, and accelerate's P2P habit."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pynvml
import torch

from fttrain.doctor.finding import NOT_AVAILABLE, Finding, failure, ok, warning
from fttrain.rig import topology
from fttrain.rig.card import handle_of, uuid_of
from fttrain.rig.nvml import ask
from fttrain.util.units import gib


@dataclass(frozen=True)
class Card:
    """The figures of a card that the checks need. None: not available."""

    name: str
    memory_bytes: int
    pcie_width: int | None = None
    pcie_width_most: int | None = None  # of card and slot together
    pcie_generation_most: int | None = None
    power_limit_w: float | None = None
    power_default_w: float | None = None
    ecc: bool | None = None
    ecc_errors: int | None = None  # uncorrected, since the driver was loaded
    uuid: str = ""  # for nvidia-smi, whose numbers may differ from torch's


def list_cards() -> list[Card]:
    """All cards, by torch's numbers."""
    return [_card(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]


def _card(device: torch.device) -> Card:
    properties = torch.cuda.get_device_properties(device)
    plain = Card(properties.name, properties.total_memory, uuid=uuid_of(device))
    handle = handle_of(device)
    return plain if handle is None else _asked(plain, device, handle)


def _asked(card: Card, device: torch.device, handle: Any) -> Card:
    known = topology.facts(device)
    ecc = ask(lambda: pynvml.nvmlDeviceGetEccMode(handle))
    return Card(
        card.name,
        card.memory_bytes,
        known.get("pcie_width"),
        known.get("pcie_width_most"),
        known.get("pcie_generation_most"),
        known.get("power_limit_w"),
        ask(lambda: pynvml.nvmlDeviceGetPowerManagementDefaultLimit(handle) / 1e3),
        None if ecc is None else bool(ecc[0]),
        ask(
            lambda: int(
                pynvml.nvmlDeviceGetTotalEccErrors(
                    handle,
                    pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                    pynvml.NVML_VOLATILE_ECC,
                )
            )
        ),
        card.uuid,
    )


def listing(cards: Sequence[Card]) -> Finding:
    """The names and sizes of the cards, by torch's numbers."""
    if not cards:
        return ok(f"{NOT_AVAILABLE}: no GPU that torch can use")
    return ok(
        "; ".join(f"{i}: {card.name}, {gib(card.memory_bytes)}" for i, card in enumerate(cards))
    )


def pcie(cards: Sequence[Card]) -> Finding:
    """PCIe lanes in use against those of card and slot. The generation is not compared: an idle
    card turns it down.
    """
    known = [(i, c) for i, c in enumerate(cards) if c.pcie_width and c.pcie_width_most]
    if not known:
        return ok(NOT_AVAILABLE)
    figures = [
        f"card {i}: x{card.pcie_width} of x{card.pcie_width_most}, "
        f"generation {card.pcie_generation_most or 'unknown'}"
        for i, card in known
    ]
    if any((card.pcie_width or 0) < (card.pcie_width_most or 0) for _, card in known):
        return warning(
            "; ".join(figures),
            "x8 each is what a desktop board gives two cards; if this one gives more, seat card "
            "and riser anew, and look at slots and bifurcation in the BIOS",
        )
    return ok("; ".join(figures))


def power(cards: Sequence[Card]) -> Finding:
    """The power limit in force against the card's default."""
    known = [(i, c) for i, c in enumerate(cards) if c.power_limit_w and c.power_default_w]
    if not known:
        return ok(NOT_AVAILABLE)
    figures = [f"card {i}: {c.power_limit_w:.0f} of {c.power_default_w:.0f} W" for i, c in known]
    for _, card in known:
        if (card.power_limit_w or 0.0) < (card.power_default_w or 0.0) - 1:
            remedy = f"sudo nvidia-smi -i {card.uuid} -pl {card.power_default_w:.0f}"
            return warning("; ".join(figures), f"{remedy} (unless it is wanted)")
    return ok("; ".join(figures))


def ecc(cards: Sequence[Card]) -> Finding:
    """Uncorrected errors of a card's memory."""
    known = [(i, c) for i, c in enumerate(cards) if c.ecc is not None]
    if not known:
        return ok(NOT_AVAILABLE)
    bad = [i for i, card in known if card.ecc_errors]
    states = "; ".join(f"card {i}: {'on' if card.ecc else 'off'}" for i, card in known)
    if bad:
        errors = "; ".join(f"card {i}: {cards[i].ecc_errors} uncorrected errors" for i in bad)
        reset = f"sudo nvidia-smi -r -i {cards[bad[0]].uuid}"
        return failure(errors, f"{reset}; if they come again, another card")
    return ok(states)


def host_memory(cards: Sequence[Card], memory_bytes: int) -> Finding:
    """Host memory against twice that of the cards: it holds frozen layers, layer inputs, page
    cache.
    """
    if not cards:
        return ok(f"{gib(memory_bytes)}; no card to compare with")
    card_bytes = sum(card.memory_bytes for card in cards)
    figure = f"{gib(memory_bytes)}, the cards have {gib(card_bytes)}"
    if memory_bytes >= 2 * card_bytes:
        return ok(figure)
    return warning(
        f"{figure}; twice as much is wanted",
        "more memory, or strategy=shard or pipeline, embedding=device, layer_inputs=device",
    )


def accelerate_habit(cards: Sequence[Card], fit: bool) -> Finding:
    """NCCL_P2P_DISABLE in the environment, and whether `accelerate launch` would set it.

    ``fit``: accelerate's own judgement of these cards and this driver.
    """
    value = os.environ.get("NCCL_P2P_DISABLE")
    if len(cards) < 2:
        return ok(f"NCCL_P2P_DISABLE={value or 'unset'}; it needs two cards to matter")
    remedy = "fttrain train launch=NAME does not; with an NVLink bridge export NCCL_P2P_DISABLE=0"
    if value not in (None, "", "0"):
        return warning(f"NCCL_P2P_DISABLE={value}: cards talk through host memory", remedy)
    if value is None and not fit:
        return warning("`accelerate launch` would set NCCL_P2P_DISABLE=1 for these cards", remedy)
    return ok(f"NCCL_P2P_DISABLE={value or 'unset'}, and `accelerate launch` leaves it alone")
