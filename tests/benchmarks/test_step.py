"""The benchmark of a step, on a model small enough for a test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fttrain.data.stdlib import pairs

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A random Llama of two layers with a tokenizer that knows the words of the data."""
    import torch

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in pairs() for text in pair), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    folder = tmp_path / "model"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_both_sides_do_the_same_work(tiny_model: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/step.py", "--quick", "--model", str(tiny_model)]
    done = subprocess.run(
        [*command, "--json", str(figures)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(figures.read_text())
    assert written["environment"]["versions"]["torch"] in done.stdout
    sides: dict[str, dict[str, dict]] = {"padded": {}, "packed": {}}
    for result in written["results"]:
        sides[result["data"]][result["settings"]["side"]] = result
    for kind in sides:
        peer, own = sides[kind]["peer"], sides[kind]["fttrain"]
        # The start is the model's own loss; after it the updates have to agree as well.
        assert own["losses"] == pytest.approx(peer["losses"], rel=0.01)
        assert own["tokens"] == peer["tokens"]
        for result in (peer, own):
            assert result["tokens_per_s"] > 0
            assert result["peak_host_bytes"] >= result["step_peak_host_bytes"] > 0
            assert result["loopback_bytes_per_step"] > 0
        assert set(own["ratios"]) >= {"tokens_per_s", "peak_host_bytes", "final_loss"}
