"""The benchmark of a step, on a model small enough for a test."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fttrain.data.stdlib import pairs

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a tokenizer that knows the words of the data."""
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
    folder = tmp_path_factory.mktemp("model")
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
    arguments = ["--quick", "--data", "packed", "--model", str(tiny_model), "--json", str(figures)]
    done = subprocess.run(
        [sys.executable, "benchmarks/step.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(figures.read_text())
    assert written["environment"]["versions"]["torch"] in done.stdout
    peer, own = written["results"]
    assert (peer["settings"]["side"], own["settings"]["side"]) == ("peer", "fttrain")
    # The first loss is the model's own; the later ones agree only if the updates do.
    assert own["losses"] == pytest.approx(peer["losses"], rel=0.01)
    assert own["losses"][-1] < own["losses"][0]
    for result in (peer, own):
        assert result["tokens_per_s"] > 0
        assert result["peak_host_bytes"] >= result["step_peak_host_bytes"] > 0
        assert result["loopback_bytes_per_step"] > 0
    assert own["ratios"].keys() >= {"tokens_per_s", "peak_host_bytes", "final_loss"}


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_the_peer_trains_on_the_documents_and_nothing_else(
    tiny_model: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batch of rows has the loss sum of the documents taken one by one."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    ddp = importlib.import_module("peers.ddp")
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    documents = []
    for length in (7, 12, 3, 5):
        ids = torch.randint(4096, (length,), generator=generator).tolist()
        documents.append((ids, [ddp.IGNORE, ddp.IGNORE, *ids[2:]]))
    rows = [[document] for document in documents]
    if kind == "packed":
        rows = [documents[:2], documents[2:]]

    def loss_sum(batch: dict[str, torch.Tensor]) -> float:
        return model(**batch, use_cache=False, num_items_in_batch=1).loss.item()

    alone = [ddp.padded([[document]]) for document in documents]
    assert loss_sum(getattr(ddp, kind)(rows)) == pytest.approx(sum(map(loss_sum, alone)), rel=1e-5)
