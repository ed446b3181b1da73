"""Sizes of models: shapes against transformers, figures against their parts, verdicts on claims."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from fttrain.cli import main
from fttrain.memory.parts import MemoryPart
from fttrain.plan import shapes
from fttrain.plan.reference_claims import CARD, CLAIMS, HIGH, LOW, RIGHT, Claim, judge
from fttrain.plan.sizes import (
    METHODS,
    SCENARIOS,
    SizeEstimate,
    SizeRequest,
    context_bytes,
    estimate_size,
    estimate_sizes,
)
from fttrain.plan.sizes_table import show
from fttrain.util.units import GIB

KNOWN = {  # billions of parameters, as model cards have them
    "Llama-2-7B": 6.74,
    "Llama-3.1-8B": 8.03,
    "Llama-2-13B": 13.0,
    "Qwen3-14B": 14.8,
    "Qwen3-32B": 32.8,
    "CodeLlama-34B": 33.7,
    "Llama-3.1-70B": 70.6,
    "Qwen2.5-72B": 72.7,
    "LLaMA-33B": 32.5,
    "LLaMA-65B": 65.3,
}
SMALL, LARGE = "Llama-2-7B", "Llama-3.1-70B"


@pytest.mark.parametrize("name", KNOWN)
def test_shapes_are_those_of_the_models(name: str) -> None:
    a = shapes.architecture(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(a.config)
    assert shapes.parameters(a) == model.num_parameters()
    assert shapes.parameters(a) / 1e9 == pytest.approx(KNOWN[name], rel=5e-3)
    layer = model.model.layers[0]
    assert shapes.layer_parameters(a) == sum(p.numel() for p in layer.parameters())


def test_a_70b_model_on_one_card_is_the_sum_of_its_known_parts() -> None:
    """Each part from figures of its own; a layer's step alone is the engine's."""
    found = estimate_size(SizeRequest(LARGE, "QLoRA"))
    adapter_values = 207e6  # r=16 on all linears
    table_bytes = 128256 * 8192 * 2
    expected = {
        MemoryPart.FROZEN_LAYERS: 80 * 441.4e6,
        MemoryPart.EMBEDDING: table_bytes,
        MemoryPart.HEAD: table_bytes,
        MemoryPart.ADAPTERS: adapter_values * (2 + 4 + 4 + 8),  # copy, master, gradient, moments
        MemoryPart.ACTIVATIONS: 80 * 2048 * 8192 * 2,
        MemoryPart.DEQUANTIZED_WEIGHTS: 2 * 28672 * 8192 * 2,  # gate and up in bf16
        MemoryPart.CONTEXT: context_bytes(),
    }
    for part, size_bytes in expected.items():
        assert found.card[part] == pytest.approx(size_bytes, rel=5e-3), part
    rest = {part: size for part, size in found.card.items() if part not in expected}
    assert rest.keys() == {MemoryPart.LOGITS, MemoryPart.WORKSPACE}
    assert 0 < sum(rest.values()) < 0.02 * found.card_bytes
    assert context_bytes() > 0.5e9


def test_full_fine_tuning_is_bytes_of_a_parameter_and_a_step() -> None:
    count = shapes.parameters(shapes.architecture(SMALL))
    lora = estimate_size(SizeRequest(SMALL, "LoRA"))
    base = (MemoryPart.FROZEN_LAYERS, MemoryPart.EMBEDDING, MemoryPart.HEAD, MemoryPart.ADAPTERS)
    step_bytes = lora.card_bytes - sum(lora.card[part] for part in base)
    whole = estimate_size(SizeRequest(SMALL, "full"))
    assert whole.card_bytes == 16 * count + step_bytes
    assert (
        estimate_size(SizeRequest(SMALL, "full, 8-bit Adam")).card_bytes == 10 * count + step_bytes
    )
    least = estimate_size(SizeRequest(SMALL, "full", "least"))
    assert least.host_bytes == whole.host_bytes + 14 * count
    assert least.card_bytes > 2 * count + step_bytes


def test_more_parameters_and_wider_ones_take_more_and_fewer_places_less() -> None:
    qlora, lora = SizeRequest(SMALL, "QLoRA"), SizeRequest(SMALL, "LoRA")
    full = SizeRequest(SMALL, "full")
    rising = [
        [replace(qlora, scenario="least"), replace(qlora, scenario="two"), qlora, lora],
        [replace(full, scenario="least"), replace(full, scenario="two"), full],
        [qlora, SizeRequest(LARGE, "QLoRA")],
    ]
    requests = [request for row in rising for request in row]
    told: list[tuple[int, int]] = []
    found = estimate_sizes(requests, lambda done, total: told.append((done, total)))
    assert told[-1] == (len(set(requests)), len(set(requests)))
    for row in rising:
        sizes = [found[question].card_bytes for question in row]
        assert sizes == sorted(sizes)
        assert len(set(sizes)) == len(sizes)
    # What is not on the card is on the host: the frozen layers.
    assert (
        found[replace(qlora, scenario="least")].host_bytes
        > found[qlora].card[MemoryPart.FROZEN_LAYERS]
    )


def claim(value: float, unit: str = "GB", **more: bool | str) -> Claim:
    return Claim("someone", "somewhere", SizeRequest(SMALL, "QLoRA"), value, unit, **more)  # type: ignore[arg-type]


NEED = SizeEstimate({MemoryPart.FROZEN_LAYERS: 9 * 10**9, MemoryPart.CONTEXT: 10**9}, 0)


def test_a_claim_is_judged_by_what_is_needed() -> None:
    for value, word in ((7, LOW), (9.4, LOW), (9.6, RIGHT), (10.4, RIGHT), (10.6, HIGH)):
        assert judge(claim(value), NEED).word == word, value
    low = judge(claim(7, if_low="for a reason", if_high="for another"), NEED)
    assert low.why.startswith("3.0 GB short; it takes frozen layers 9.0 GB")
    assert low.why.endswith("; for a reason")
    assert judge(claim(7 * 10**9 / GIB, "GiB"), NEED).word == LOW
    assert judge(claim(9, by_torch=True), NEED).word == RIGHT  # which does not count the context


def test_a_card_is_right_where_it_suffices() -> None:
    assert judge(claim(9.4, CARD), NEED).word == RIGHT  # of GiB
    assert judge(claim(9.3, CARD), NEED).word == LOW
    assert judge(claim(16, CARD), NEED).why == "6.7 GiB to spare"


def test_every_claim_has_a_request_and_a_source() -> None:
    for own in CLAIMS:
        request = own.request
        assert shapes.size(request.model), own
        assert request.method in METHODS, own
        assert request.scenario in SCENARIOS, own
        assert own.source.startswith("https://") or "without a source" in own.source, own
        assert (
            judge(own, SizeEstimate({MemoryPart.FROZEN_LAYERS: round(2 * own.size_bytes)}, 0)).word
            == LOW
        ), own


def test_the_tables_show_the_requests() -> None:
    written = io.StringIO()
    console = Console(file=written, width=150)
    claims = [own for own in CLAIMS if own.request == SizeRequest(SMALL, "QLoRA")]
    assert {own.figure for own in claims} == {"12 GB", "6 GB"}
    wrong = replace(claims[0], value=0.7 * estimate_size(claims[0].request).card_bytes / 1e9)
    show(console, lambda done, total: None, [SMALL], [*claims, wrong])
    printed = written.getvalue()
    one = estimate_size(SizeRequest(SMALL, "QLoRA"))
    row = next(line for line in printed.splitlines() if " 12, 6, " in line)
    assert f" {one.card_bytes / GIB:.1f} " in row
    assert f"{one.card_bytes / GIB:.2f} │" in printed  # the sum of the parts
    assert "by formula" in printed
    verdicts = [line for line in printed.splitlines() if "│ QLoRA Llama-2-7B" in line]
    assert ["too low" in line for line in verdicts] == [False, False, True]


def test_a_table_takes_no_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--table", "data.seq_len=64"]) != 0
    assert "data.seq_len=64: it takes no settings" in capsys.readouterr().err


def test_help_names_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    assert "--table" in capsys.readouterr().out
