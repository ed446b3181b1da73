"""Generation with keys and values kept against a full forward of transformers for each token."""

import pytest
import tiny
import torch

from fttrain.model.config import LoraConfig
from fttrain.model.decoder import Decoder
from fttrain.quant.config import QuantConfig
from fttrain.schedule import generate
from fttrain.store import Store

LORA = LoraConfig(r=4, lora_alpha=10, lora_dropout=0.5)
NEW_TOKENS = 12


def prompts() -> list[list[int]]:
    return [ids for ids, _ in tiny.documents((5, 1, 19, 9))]  # ragged; windows are 8


def greedy(
    decoder: Decoder, store: Store, prompts: list[list[int]], tokens: int, stop: set[int]
) -> list[list[int]]:
    return generate.greedy(prompts, tokens, stop, generate.whole_model(decoder, store))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "qwen3_sliding"])
def test_equals_the_most_likely_token_of_a_full_forward(name: str) -> None:
    source, quant = tiny.model(name), QuantConfig()
    decoder, store = tiny.build(source, quant, LORA)
    answers = greedy(decoder, store, prompts(), NEW_TOKENS, set())
    reference = tiny.with_peft(tiny.dequantised(source, quant), decoder, LORA).eval()
    for prompt, answer in zip(prompts(), answers, strict=True):
        assert len(answer) == NEW_TOKENS
        # One forward over prompt and answer tells every choice that was made.
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor([prompt + answer])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_prompts_do_not_see_each_other_and_stop_apart() -> None:
    decoder, store = tiny.build(tiny.model(), QuantConfig(), LORA)
    together = greedy(decoder, store, prompts(), NEW_TOKENS, set())
    alone = [greedy(decoder, store, [p], NEW_TOKENS, set())[0] for p in prompts()]
    assert together == alone
    stop = together[0][4]
    stopped = greedy(decoder, store, prompts(), NEW_TOKENS, {stop})
    for full, short in zip(together, stopped, strict=True):
        assert short == (full[: full.index(stop)] if stop in full else full)


def test_nothing_to_do() -> None:
    decoder, store = tiny.build(tiny.model(), QuantConfig(), LORA)
    assert greedy(decoder, store, [], NEW_TOKENS, set()) == []
    assert greedy(decoder, store, prompts(), 0, set()) == [[]] * 4


def test_training_after_generation_is_undisturbed() -> None:
    decoder, store = tiny.build(tiny.model(), QuantConfig(), LORA)
    batch = [tiny.one_batch(tiny.documents((9, 4)))]
    before = tiny.run(decoder, store, batch)
    greedy(decoder, store, prompts(), 3, set())
    after = tiny.run(decoder, store, batch)
    assert before[0] == after[0]
    assert all(torch.equal(before[1][n], after[1][n]) for n in before[1])
