"""Whole optimizer steps: every split of a batch, two ranks, clipping and AdamW against torch."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_strategy
import torch
from ranks import run_ranks
from torch import Tensor

from fttrain.data.batch import IGNORE, MicroBatch, collate
from fttrain.data.loader import Loader
from fttrain.distributed.rank_group import RankGroup
from fttrain.model.config import LoraConfig
from fttrain.optim.config import OptimConfig
from fttrain.quant.config import QuantConfig
from fttrain.strategy.data_parallel import DataParallel
from fttrain.strategy.protocol import StepStats

LORA = LoraConfig(r=4, lora_alpha=10)
DROPOUT = replace(LORA, lora_dropout=0.2)
DORA = replace(LORA, use_dora=True)
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.01, max_grad_norm=0.05)
ROWS_PER_STEP = 8
# (micro_batch_size, gradient_accumulation_steps) with ROWS_PER_STEP = their product * world_size
SPLITS = {1: [(8, 1), (4, 2), (2, 4), (1, 8)], 2: [(4, 1), (2, 2), (1, 4)]}
Step = tuple[StepStats, dict[str, Tensor]]


def rows(count: int) -> list[list[tiny.Document]]:
    """Rows of uneven lengths and uneven numbers of targets; one has no target at all."""
    made = []
    for row in range(count):
        documents = tiny.documents((3 + 2 * row, 9), seed=row, masked=row / count)
        if row == 2:
            documents = [(ids, [IGNORE] * len(ids)) for ids, _ in documents]
        made.append(documents)
    return made


def strategy(
    lora: LoraConfig = LORA, optim: OptimConfig = OPTIM, rank: int = 0, world_size: int = 1
) -> DataParallel:
    decoder, store = tiny.build(tiny.model(), QuantConfig(), lora)
    group = RankGroup(rank, world_size, rank, tiny.CPU)
    return tiny_strategy.data_parallel(decoder, store, group, optim)


def micro_batches(
    count: int, split: tuple[int, int], rank: int = 0, world_size: int = 1
) -> list[MicroBatch]:
    return Loader(rows(count), *split, rank, world_size, seed=0).next_step()


def measure(trained: DataParallel, batches: list[MicroBatch]) -> Step:
    """A step that is not applied: its figures and the gradient of the mean loss."""
    stats = trained.train_step(batches, 0, 1e-2, lambda loss, grad_norm: False)
    found = tiny.gradients(trained.decoder)
    return stats, {name: g / max(1, stats.targets) for name, g in found.items()}


@functools.cache
def whole(count: int) -> Step:
    """The step as one micro-batch on one rank."""
    return measure(strategy(), micro_batches(count, (ROWS_PER_STEP, 1)))


def assert_same_step(step: Step, expected: Step) -> None:
    (stats, gradients), (expected_stats, expected_gradients) = step, expected
    assert tiny.difference(gradients, expected_gradients) <= 1e-5
    assert stats.loss == pytest.approx(expected_stats.loss, rel=1e-6)
    assert stats.grad_norm == pytest.approx(expected_stats.grad_norm, rel=1e-5)
    assert (stats.targets, stats.tokens) == (expected_stats.targets, expected_stats.tokens)


@pytest.mark.parametrize("count", [8, 5], ids=["full step", "partial step"])
@pytest.mark.parametrize("lora", [LORA, DORA], ids=["LoRA", "DoRA"])
def test_a_step_equals_peft_over_all_its_targets(lora: LoraConfig, count: int) -> None:
    """Normalised by the valid tokens of the whole step: one mean over all documents' targets."""
    stats, gradients = measure(strategy(lora), micro_batches(count, (ROWS_PER_STEP, 1)))
    trained, source = strategy(lora), tiny.dequantised(tiny.model(), QuantConfig())
    reference = tiny.with_peft(source, trained.decoder, lora)
    documents = [document for row in rows(count) for document in row]
    targets = sum(label != IGNORE for _, labels in documents for label in labels[1:])
    loss = tiny.reference_loss(reference, documents) / targets
    loss.backward()
    assert stats.targets == targets
    assert stats.loss == pytest.approx(loss.item(), rel=1e-6)
    expected = tiny.peft_gradients(reference, trained.decoder)
    assert tiny.difference(gradients, expected) <= 1e-5
    norm = torch.nn.utils.get_total_norm(list(expected.values()))
    assert stats.grad_norm == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("count", [8, 5], ids=["full step", "partial step"])
@pytest.mark.parametrize("split", SPLITS[1], ids=str)
def test_every_split_on_one_rank(split: tuple[int, int], count: int) -> None:
    assert_same_step(measure(strategy(), micro_batches(count, split)), whole(count))


def on_rank(world_size: int) -> dict[str, Any]:
    """Everything that is compared between one rank and two, on this rank."""
    rank = torch.distributed.get_rank() if world_size > 1 else 0
    trained = strategy(rank=rank, world_size=world_size)
    steps = {
        (count, split): measure(trained, micro_batches(count, split, rank, world_size))
        for count in (8, 5, 1)
        for split in SPLITS[world_size]
    }
    # Dropout: the same eight micro-batches of one row on any number of ranks.
    dropping = strategy(DROPOUT, rank=rank, world_size=world_size)
    same = (1, ROWS_PER_STEP // world_size)
    dropped = measure(dropping, micro_batches(8, same, rank, world_size))
    for step in range(3):
        dropping.train_step(
            micro_batches(8, same, rank, world_size), step, 1e-2, lambda loss, norm: True
        )
    batches = micro_batches(8, (4, 1), rank, world_size)
    return {
        "steps": steps,
        "dropped": dropped,
        "trained": {name: master.clone() for name, master in dropping.adapter_state().items()},
        "evaluated": trained.evaluate(batches) if world_size == 2 else None,
        "sync_bytes": dropped[0].sync.sync_bytes,
        "parameters": sum(p.numel() for p in trained.decoder.parameters()),
    }


def test_two_ranks_equal_one() -> None:
    one = on_rank(1)
    two = run_ranks(on_rank, 2, 2)
    for found in two:
        for (count, _), step in found["steps"].items():
            assert_same_step(step, one["steps"][count, (ROWS_PER_STEP, 1)])
        assert_same_step(found["dropped"], one["dropped"])
        assert tiny.difference(found["trained"], one["trained"]) < 1e-4
        stats, _ = one["steps"][8, (8, 1)]
        sums = found["evaluated"]
        assert sums.mean("nll") == pytest.approx(stats.loss, rel=1e-6)
        assert sums.targets == stats.targets
        assert found["sync_bytes"] == 4 * found["parameters"]
    assert one["sync_bytes"] == 0
    first, second = (found["trained"] for found in two)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_order_of_ranks_does_not_change_the_mask() -> None:
    """Dropout follows a micro-batch's index, not the place where it runs."""
    trained = strategy(DROPOUT)
    batches = micro_batches(8, (1, 8))
    forward, backward = measure(trained, batches), measure(trained, batches[::-1])
    assert tiny.difference(forward[1], backward[1]) <= 1e-5
    other = measure(trained, [replace(batch, index=batch.index + 1) for batch in batches])
    assert tiny.difference(other[1], forward[1]) > 1e-3


def test_no_two_micro_batches_and_no_two_steps_share_a_mask() -> None:
    trained = strategy(DROPOUT)
    batch = micro_batches(8, (8, 1))[0]
    found = []
    for index, step in ((0, 0), (1, 0), (2, 0), (8, 0), (0, 1), (1, 1)):
        trained.train_step([replace(batch, index=index)], step, 1e-2, lambda loss, norm: False)
        found.append(tiny.gradients(trained.decoder))
    for i, one in enumerate(found):
        assert all(tiny.difference(one, other) > 1e-3 for other in found[:i])


@pytest.mark.parametrize("max_grad_norm", [0.05, 100.0, 0.0], ids=["clips", "slack", "off"])
def test_clipping_and_updates_equal_torch(max_grad_norm: float) -> None:
    optim = replace(OPTIM, max_grad_norm=max_grad_norm)
    trained = strategy(optim=optim)
    source = tiny.dequantised(tiny.model(), QuantConfig())
    reference = tiny.with_peft(source, trained.decoder, LORA)
    parameters = dict(reference.named_parameters())
    adapters = [parameters[tiny.peft_name(name)] for name in trained.adapter_state()]
    before = {name: master.clone() for name, master in trained.adapter_state().items()}
    adamw = torch.optim.AdamW(adapters, lr=optim.lr, weight_decay=optim.weight_decay)
    loader = Loader(rows(8), 2, 2, 0, 1, seed=0)
    for step in range(5):
        batches = loader.next_step()
        lr = optim.lr * (1 - step / 10)
        stats = trained.train_step(batches, step, lr, lambda loss, norm: True)
        adamw.zero_grad()
        documents = [document for batch in batches for document in _documents(batch)]
        (tiny.reference_loss(reference, documents) / stats.targets).backward()
        norm = torch.nn.utils.clip_grad_norm_(adapters, max_grad_norm or torch.inf)
        assert stats.grad_norm == pytest.approx(float(norm), rel=1e-4)
        adamw.param_groups[0]["lr"] = lr
        adamw.step()
    ours = {name: master - before[name] for name, master in trained.adapter_state().items()}
    theirs = {n: parameters[tiny.peft_name(n)].detach() - before[n] for n in ours}
    assert tiny.difference(ours, theirs) < 1e-3
    assert float(sum(o.square().sum() for o in ours.values())) > 0


def _documents(batch: MicroBatch) -> list[tiny.Document]:
    """A micro-batch's documents back, their labels moved to where their tokens are."""
    ids, targets = batch.input_ids.split(batch.lengths), batch.targets.split(batch.lengths)
    return [(i.tolist(), [IGNORE, *t[:-1].tolist()]) for i, t in zip(ids, targets, strict=True)]


def test_a_refused_step_changes_nothing() -> None:
    trained = strategy()
    batches = micro_batches(8, (2, 4))
    trained.train_step(batches, 0, 1e-2, lambda loss, norm: True)
    adapter = {n: t.clone() for n, t in trained.adapter_state().items()}
    moments = {n: t.clone() for n, t in trained.optimizer_state().items()}
    seen = []
    stats = trained.train_step(batches, 1, 1e-2, lambda *figures: seen.append(figures) or False)
    assert seen == [(stats.loss, stats.grad_norm)]
    assert not stats.updated
    assert all(torch.equal(adapter[n], t) for n, t in trained.adapter_state().items())
    assert all(torch.equal(moments[n], t) for n, t in trained.optimizer_state().items())


def test_a_step_without_targets_updates_nothing() -> None:
    trained = strategy()
    adapter = {n: t.clone() for n, t in trained.adapter_state().items()}
    masked = collate([([5, 6, 7], [IGNORE] * 3)], 0)
    judged: list[float] = []
    stats = trained.train_step(
        [masked, collate([], 1)], 0, 1e-2, lambda loss, norm: judged.append(loss) or True
    )
    assert not judged  # a loss of 0 would pull down the spike guard's baseline
    assert not stats.updated
    assert (stats.loss, stats.targets, stats.tokens, stats.grad_norm) == (0.0, 0, 3, 0.0)
    assert trained.optimizer_state() == {}
    assert all(torch.equal(adapter[n], t) for n, t in trained.adapter_state().items())


def test_a_nan_reaches_the_judge_and_never_the_adapter() -> None:
    trained = strategy()
    trained.decoder.layers[1].adapters.flat.data[3] = torch.nan
    trained.decoder.layers[1].adapters.refresh()
    seen: list[tuple[float, float]] = []
    trained.train_step(
        micro_batches(8, (8, 1)), 0, 1e-2, lambda *figures: seen.append(figures) or False
    )
    assert torch.tensor(seen).isnan().all()
    before = trained.decoder.layers[0].adapters.flat.detach().clone()
    stats = trained.train_step(micro_batches(8, (8, 1)), 1, 1e-2, lambda loss, norm: True)
    assert not stats.updated  # not even by a judge that lets it pass
    assert torch.equal(trained.decoder.layers[0].adapters.flat, before)


def test_state_goes_on_bit_for_bit() -> None:
    """Adapter and optimizer of a strategy in another one: the next steps are the same bits."""
    first, second = strategy(DROPOUT), strategy(DROPOUT)
    batches = micro_batches(8, (2, 4))
    for step in range(2):
        first.train_step(batches, step, 1e-2, lambda loss, norm: True)
    second.load_adapter_state({n: t.clone() for n, t in first.adapter_state().items()})
    second.load_optimizer_state({n: t.clone() for n, t in first.optimizer_state().items()})
    for step in range(2, 4):
        for one in (first, second):
            one.train_step(batches, step, 1e-2, lambda loss, norm: True)
    for name, master in first.adapter_state().items():
        assert torch.equal(master, second.adapter_state()[name]), name


def test_foreign_adapters_are_refused() -> None:
    from fttrain.util.errors import UserError

    trained = strategy()
    state = {n: t.clone() for n, t in trained.adapter_state().items()}
    name = next(iter(state))
    with pytest.raises(UserError, match=r"has shape \(3, 64\).*lora.r or the model differ"):
        trained.load_adapter_state({**state, name: torch.zeros(3, 64)})
    del state[name]
    with pytest.raises(UserError, match=r"lora_A.*only in one of.*lora.target_modules"):
        trained.load_adapter_state(state)
