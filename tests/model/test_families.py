"""Every family against plain transformers + PEFT on dequantised weights."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

from fttrain.model.config import LoraConfig
from fttrain.model.families import FAMILIES, family_of
from fttrain.model.families.family import GroupFacts, check_supported
from fttrain.quant.config import QuantConfig
from fttrain.util.errors import UserError

LORA = LoraConfig(r=4, lora_alpha=10)
QUANTS = {
    "none": tiny.PLAIN,
    "nf4": QuantConfig("nf4", 64, double_quant=False),
    "nf4_double": QuantConfig("nf4", 64, double_quant=True),
    "fp4_double": QuantConfig("fp4", 32, double_quant=True),
}
LENGTHS = (20, 5, 1, 33)  # sliding windows of 8 are shorter and longer than documents


def against_peft(
    name: str, quant: QuantConfig, lora: LoraConfig = LORA, **changes: Any
) -> tuple[Any, Any, Any, list[tiny.Document]]:
    source = tiny.model(name, **changes)
    decoder, store = tiny.build(source, quant, lora)
    reference = tiny.with_peft(tiny.dequantised(source, quant), decoder, lora)
    return decoder, store, reference, tiny.documents(LENGTHS, masked=0.2)


@pytest.mark.parametrize("quant", QUANTS.values(), ids=QUANTS)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_loss_and_gradients_equal_peft(name: str, quant: QuantConfig) -> None:
    decoder, store, reference, batch = against_peft(name, quant)
    expected = tiny.reference_loss(reference, batch)
    expected.backward()
    loss, gradients = tiny.run(decoder, store, [tiny.one_batch(batch)])
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert tiny.difference(gradients, tiny.peft_gradients(reference, decoder)) <= 1e-5


@pytest.mark.parametrize("name", tiny.MODELS)
def test_logits_equal_peft(name: str) -> None:
    decoder, store, reference, batch = against_peft(name, QUANTS["nf4_double"])
    ours = tiny.logits(decoder, store, tiny.one_batch(batch))
    with torch.no_grad():
        theirs = [reference(input_ids=torch.tensor([ids])).logits[0] for ids, _ in batch]
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_keep_and_recompute_are_bit_equal(name: str) -> None:
    decoder, store = tiny.build(tiny.model(name), QUANTS["nf4_double"], LORA, torch.bfloat16)
    batch = [tiny.one_batch(tiny.documents(LENGTHS))]
    kept = tiny.run(decoder, store, batch, activations="keep")
    recomputed = tiny.run(decoder, store, batch, activations="recompute")
    assert kept[0] == recomputed[0]
    assert all(torch.equal(kept[1][n], recomputed[1][n]) for n in kept[1])


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_bfloat16_is_as_good_as_transformers_own(name: str) -> None:
    """Both against fp32: our bf16 gradient is at most 1.5 times as far off as transformers'."""
    quant = QUANTS["nf4_double"]
    source = tiny.dequantised(tiny.model(name), quant).bfloat16()
    batch = tiny.documents(LENGTHS)
    truth_decoder, truth_store = tiny.build(source.float(), tiny.PLAIN, LORA)
    true_loss, truth = tiny.run(truth_decoder, truth_store, [tiny.one_batch(batch)])
    decoder, store = tiny.build(source, tiny.PLAIN, LORA, torch.bfloat16)
    loss, gradients = tiny.run(decoder, store, [tiny.one_batch(batch)])
    reference = tiny.with_peft(source.bfloat16(), decoder, LORA)
    tiny.reference_loss(reference, batch).backward()
    theirs = tiny.difference(tiny.peft_gradients(reference, decoder), truth)
    assert tiny.difference(gradients, truth) <= 1.5 * theirs <= 0.1
    assert loss == pytest.approx(true_loss, rel=2e-3)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",), ("gate_proj", "o_proj")])
def test_subsets_of_linears_equal_peft(targets: tuple[str, ...]) -> None:
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_rslora=True)
    decoder, store, reference, batch = against_peft("qwen3", QUANTS["nf4"], lora)
    tiny.reference_loss(reference, batch).backward()
    _, gradients = tiny.run(decoder, store, [tiny.one_batch(batch)])
    assert {name.split(".")[4] for name in gradients} == set(targets)
    assert tiny.difference(gradients, tiny.peft_gradients(reference, decoder)) <= 1e-5


def test_each_family_is_compared() -> None:
    compared = {config_class.model_type for config_class, _, _ in tiny.MODELS.values()}
    assert compared == FAMILIES.keys()


@pytest.mark.parametrize("model_type", ["gemma", "phi3", "mixtral", "gpt2"])
def test_other_architectures_are_refused_by_name(model_type: str) -> None:
    from transformers import AutoConfig

    with pytest.raises(UserError, match=f"{model_type}.*not supported.*llama, mistral, qwen2"):
        family_of(AutoConfig.for_model(model_type))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"norm_after_mlp": "post_feedforward_layernorm.weight"}, "a norm after the MLP"),
        ({"norm_offset": 1.0}, r"norms that scale by 1 \+ w"),
        ({"rotary": lambda config, layer: f"table {layer % 2}"}, "several rotary tables"),
        ({"logit_soft_cap": lambda config: 30.0}, "a soft cap of logits"),
        ({"groups": (("down", GroupFacts(("mlp.down_proj",), "geglu")),)}, "prologue geglu"),
    ],
)
def test_facts_that_the_engine_does_not_compute_are_refused(
    facts: dict[str, Any], message: str
) -> None:
    config = tiny.model("llama").config
    check_supported(FAMILIES["llama"], config)
    with pytest.raises(UserError, match=f"llama.* has {message}.*not supported"):
        check_supported(replace(FAMILIES["llama"], **facts), config)
