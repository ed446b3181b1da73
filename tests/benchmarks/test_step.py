"""The benchmark of a step, on a model small enough for a test."""

import importlib
from pathlib import Path

import pytest
import torch
from smoke import ROOT, smoke_run
from transformers import LlamaForCausalLM


@pytest.mark.slow
def test_both_sides_do_the_same_work(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ("--quick", "--data", "packed", "--model", str(tiny_model))
    done, written = smoke_run("step.py", tmp_path / "figures.json", *arguments)
    assert done.returncode == 0, done.stderr
    assert written["environment"]["versions"]["torch"] in done.stdout
    peer, own = written["results"]
    assert (peer["settings"]["side"], own["settings"]["side"]) == ("peer", "fttrain")
    # The first loss is the model's own; the later ones agree only if the updates do.
    assert own["losses"] == pytest.approx(peer["losses"], rel=0.01)
    assert own["losses"][-1] < own["losses"][0]
    for result in (peer, own):
        assert result["tokens_per_s"] > 0
        assert result["peak_host_bytes"] >= result["step_peak_host_bytes"] > 0
        assert result["sent_bytes_per_step"] > 0
    assert own["ratios"].keys() >= {"tokens_per_s", "peak_host_bytes", "final_loss"}


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_the_peer_trains_on_the_documents_and_nothing_else(
    tiny_model: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batch of rows has the loss sum of the documents taken one by one."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    plain = importlib.import_module("peers.plain")
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    documents = []
    for length in (7, 12, 3, 5):
        ids = torch.randint(4096, (length,), generator=generator).tolist()
        documents.append((ids, [plain.IGNORE, plain.IGNORE, *ids[2:]]))
    rows = [[document] for document in documents]
    if kind == "packed":
        rows = [documents[:2], documents[2:]]

    def loss_sum(batch: dict[str, torch.Tensor]) -> float:
        return model(**batch, use_cache=False, num_items_in_batch=1).loss.item()

    alone = [plain.padded([[document]]) for document in documents]
    assert loss_sum(getattr(plain, kind)(rows)) == pytest.approx(
        sum(map(loss_sum, alone)), rel=1e-5
    )
