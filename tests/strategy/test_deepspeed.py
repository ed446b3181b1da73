"""strategy=deepspeed beside the native strategies, plain transformers and plain PEFT."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_strategy
import torch
from ranks import run_ranks
from torch import Tensor

from fttrain.checkpoint.adapter_peft import AdapterInfo, save_adapter
from fttrain.data.batch import IGNORE, MicroBatch, collate
from fttrain.distributed.rank_group import RankGroup
from fttrain.model.config import LoraConfig
from fttrain.quant.config import QuantConfig
from fttrain.strategy.config import StrategyConfig
from fttrain.strategy.protocol import StepStats
from fttrain.strategy.zero_config import ZeroConfig

pytestmark = pytest.mark.deepspeed

PLAIN, NF4 = tiny.PLAIN, QuantConfig()
WHOLE = LoraConfig(r=0)
# Tokens of the documents of each of a step's micro-batches; one has no target, one is empty.
LENGTHS = ((9, 17, 4), (3,), (30, 1), ())
REFUSED = 1  # the step that the judge refuses
STEPS = 4
PROMPTS = [[5, 6, 7], [9, 8]]


def build(
    strategy: str,
    zero: dict[str, Any] | None = None,
    dtype: str = "float32",
    quant: QuantConfig = PLAIN,
    lora: LoraConfig = tiny_strategy.SPEC.lora,
    group: RankGroup | None = None,
    **optim: Any,
) -> Any:
    """Two layers of the tiny model, at the start of a run with dropout, decay and clipping."""
    frozen = tiny_strategy.base(dtype=dtype, quant=quant, num_hidden_layers=2)
    spec = replace(
        tiny_strategy.SPEC,
        strategy=StrategyConfig(strategy, zero=ZeroConfig(**(zero or {}))),
        dtype=dtype,
        quant=quant,
        lora=lora,
        optim=replace(tiny_strategy.SPEC.optim, **optim),
        z_loss=1e-3,
    )
    return tiny_strategy.start(spec, frozen, group)


def documents(step: int) -> list[list[tiny.Document]]:
    """Of each micro-batch of all ranks."""
    made = []
    for index, lengths in enumerate(LENGTHS):
        batch = tiny.documents(lengths, seed=100 * step + index, masked=0.3)
        made.append([(ids, [IGNORE] * len(ids)) for ids, _ in batch] if index == 1 else batch)
    return made


def micro_batches(strategy: Any, step: int) -> list[MicroBatch]:
    """This rank's: the same of all ranks together on any number."""
    rank, world_size = strategy.data_parallel
    batches = [collate(batch, index) for index, batch in enumerate(documents(step))]
    return batches[rank::world_size]


def apply(strategy: Any, step: int) -> StepStats:
    stats: StepStats = strategy.train_step(
        micro_batches(strategy, step), step, tiny_strategy.LR, lambda loss, norm: step != REFUSED
    )
    return stats


def course(strategy: Any, steps: range = range(STEPS)) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, one of which is refused."""
    found = []
    for step in steps:
        stats = apply(strategy, step)
        assert stats.updated == (step != REFUSED)
        found.append((stats.loss, stats.grad_norm))
    return found


def state_of(strategy: Any) -> dict[str, Tensor]:
    """All that an update changes, whole."""
    return {**strategy.adapter_state(), **strategy.optimizer_state()}


def apart(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    """The largest relative difference of a loss or a norm."""
    return max(
        abs(a - b) / b
        for pair, like in zip(one, other, strict=True)
        for a, b in zip(pair, like, strict=True)
    )


def divided(folder: str) -> str:
    """A DeepSpeed JSON under which stage 3 divides tiny weights as well: usually each rank keeps
    small ones whole.
    """
    file = Path(folder) / f"zero3_{torch.distributed.get_rank()}.json"
    section = {"stage3_param_persistence_threshold": 0, "stage": "auto"}
    file.write_text(json.dumps({"zero_optimization": section, "train_batch_size": "auto"}))
    return str(file)


def adapters_course(folder: str) -> dict[str, Any]:
    """Losses of all stages and of replicate; and what a refused step leaves."""
    found: dict[str, Any] = {}
    for name, dtype, quant, zero in (
        ("1", "float32", NF4, {"stage": 1}),
        ("2", "float32", PLAIN, {"stage": 2}),
        ("3", "float32", NF4, {"stage": 3, "config": divided(folder)}),
        ("2 offloaded", "float32", NF4, {"stage": 2, "offload_optimizer": True}),
        (
            "3 offloaded",
            "float32",
            PLAIN,
            {"stage": 3, "offload_optimizer": True, "offload_params": True},
        ),
        ("1 bf16", "bfloat16", NF4, {"stage": 1}),
        ("2 bf16", "bfloat16", PLAIN, {"stage": 2}),
        ("2 offloaded bf16", "bfloat16", PLAIN, {"stage": 2, "offload_optimizer": True}),
    ):
        kind = f"replicate {dtype} {quant.kind}"
        # The first updates of AdamW are little but the gradients' signs, which bf16 may turn.
        optim = {"loraplus_lr_ratio": 4.0, "eps": 1e-8 if dtype == "float32" else 1e-3}
        if kind not in found:
            found[kind] = course(build("replicate", None, dtype, quant, **optim))
        strategy = build("deepspeed", zero, dtype, quant, **optim)
        own = course(strategy, range(REFUSED))
        before = state_of(strategy)
        own += course(strategy, range(REFUSED, REFUSED + 1))
        after = state_of(strategy)
        kept = all(torch.equal(before[key], after[key]) for key in before)
        own += course(strategy, range(REFUSED + 1, STEPS))
        found[name] = own, kept, before.keys() == after.keys(), kind
    return found


def on_rank(folder: str) -> dict[str, dict[str, Any]]:
    """What rank 0 of two compares, by test; DeepSpeed is imported once."""
    return {
        "adapters": adapters_course(folder),
        "snapshots": snapshots(folder),
        "whole": whole_course(folder),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks leave a snapshot and an adapter."""
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict[str, Any]]:
    ranks: list[dict[str, dict[str, Any]]] = run_ranks(on_rank, 2, str(folder), timeout_s=300)
    return ranks[0]


def test_adapters_train_as_under_replicate(results: dict[str, dict[str, Any]]) -> None:
    found = results["adapters"]
    for name, (own, kept, same_names, kind) in (
        (name, result) for name, result in found.items() if not name.startswith("replicate")
    ):
        assert kept, f"{name}: a refused step changed weights or optimizer state"
        assert same_names
        assert apart(own, found[kind]) < (1e-2 if "bf16" in name else 2e-5), name
        losses = [abs(a - b) for (a, _), (b, _) in zip(own, found[kind], strict=True)]
        assert max(losses) < 1e-3, name


def snapshots(folder: str) -> dict[str, Any]:
    """A run under stage 3 that goes on elsewhere; what it says; its adapter; its frozen bytes."""
    strategy = build("deepspeed", {"stage": 3, "config": divided(folder)}, quant=NF4)
    frozen = _frozen_bytes(strategy)
    course(strategy, range(2))
    adapter, optimizer = strategy.adapter_state(), strategy.optimizer_state()
    found = {"bytes": frozen, "unstopped": course(strategy, range(2, STEPS))}
    found["evaluated"] = strategy.evaluate(micro_batches(strategy, 9))
    found["said"] = strategy.generate(PROMPTS, 6, set())
    found["stopped"] = strategy.generate(PROMPTS, 6, {found["said"][0][-1]})
    final = strategy.adapter_state()
    if torch.distributed.get_rank() == 0:
        save_adapter(Path(folder) / "adapter", final, AdapterInfo(4, 10.0), "")
        torch.save((adapter, optimizer), Path(folder) / "snapshot.pt")
    torch.distributed.barrier()
    for name, kind, zero in (("2", "deepspeed", {"stage": 2}), ("replicate", "replicate", None)):
        found[name] = _go_on(build(kind, zero, quant=NF4), folder)
    native = build("replicate", quant=NF4)
    native.load_adapter_state(_shared(final))
    found["native evaluated"] = native.evaluate(micro_batches(native, 9))
    found["native said"] = native.generate(PROMPTS, 6, set())
    native.load_adapter_state(torch.load(Path(folder) / "snapshot.pt")[0])
    return found


def alone(folder: str) -> list[tuple[float, float]]:
    """The same snapshot on one rank without a process group of its own."""
    group = RankGroup(0, 1, 0, tiny.CPU)
    return _go_on(build("deepspeed", {"stage": 3}, quant=NF4, group=group), folder)


def _go_on(strategy: Any, folder: str) -> list[tuple[float, float]]:
    adapter, optimizer = torch.load(Path(folder) / "snapshot.pt")
    strategy.load_adapter_state(adapter)
    strategy.load_optimizer_state(optimizer)
    return course(strategy, range(2, STEPS))


def _shared(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rank 0's on all ranks."""
    told = [whole]
    torch.distributed.broadcast_object_list(told)
    return told[0]


def _frozen_bytes(strategy: Any) -> tuple[int, int, bool]:
    """4-bit weights; how many of them are divided; whether all are what the cache holds, gathered
    again.
    """
    import deepspeed
    from bitsandbytes.nn import Params4bit

    frozen = tiny_strategy.base(quant=NF4, num_hidden_layers=2)
    held = set()
    for flat in frozen.flats:
        views = frozen.frozen_format.layout.views(flat)
        for name, group in frozen.frozen_format.groups.items():
            half = group.in_features // 2
            held |= {
                bytes(views[f"{name}.packed"][rows.start * half : rows.stop * half].tolist())
                for rows in group.rows
            }
    packed = [p for p in strategy._model.parameters() if isinstance(p, Params4bit)]
    parts = [p for p in packed if p.numel() == 0 and 2 * p.ds_tensor.numel() == p.ds_numel]
    with deepspeed.zero.GatheredParameters(packed):
        same = all(bytes(p.data.flatten().tolist()) in held for p in packed)
    return len(packed), len(parts), same


def test_a_snapshot_goes_on_anywhere(results: dict[str, dict[str, Any]], folder: Path) -> None:
    found = {**results["snapshots"]}
    found["alone"] = run_ranks(alone, 1, str(folder), process_group=False)[0]
    for name in ("2", "replicate", "alone"):
        assert apart(found[name], found["unstopped"]) < 2e-5, name
    packed, parts, same = found["bytes"]
    assert packed == parts == 14, "stage 3 keeps 4-bit weights whole on each rank"
    assert same, "4-bit weights are not what they were before they were divided"
    evaluated, native = found["evaluated"], found["native evaluated"]
    assert evaluated.metrics == pytest.approx(native.metrics, rel=1e-5)
    assert evaluated.targets == native.targets
    assert found["said"] == found["native said"]
    end = found["said"][0].index(found["said"][0][-1])
    assert found["stopped"][0] == found["said"][0][:end]
    _check_plain_peft(folder / "adapter", evaluated.metrics["nll"], evaluated.targets)


def _check_plain_peft(adapter: Path, loss: float, targets: int) -> None:
    from peft import PeftModel

    base = tiny.dequantised(tiny.model(num_hidden_layers=2), NF4)
    peft = PeftModel.from_pretrained(base, adapter)
    every = [document for batch in documents(9) for document in batch]
    with torch.no_grad():
        assert float(tiny.reference_loss(peft, every)) == pytest.approx(loss, rel=1e-5)
    assert sum(collate([document], 0).valid_tokens for document in every) == targets


def whole_course(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, zero in (
        ("2", {"stage": 2}),
        ("3", {"stage": 3, "config": divided(folder)}),
        ("3 offloaded", {"stage": 3, "offload_optimizer": True, "offload_params": True}),
    ):
        strategy = build("deepspeed", zero, lora=WHOLE, eps=1e-4)
        own = course(strategy, range(2))
        adapter, optimizer = _shared(strategy.adapter_state()), _shared(strategy.optimizer_state())
        own += course(strategy, range(2, STEPS))
        final = strategy.adapter_state()
        strategy.load_adapter_state(adapter)
        strategy.load_optimizer_state(optimizer)
        again = course(strategy, range(2, STEPS))
        found[name] = own, final, again
    return found


def test_all_weights_train_as_in_plain_transformers(results: dict[str, dict[str, Any]]) -> None:
    found = results["whole"]
    losses, reference = plain_course()
    for name, (own, final, again) in found.items():
        assert apart(own, losses) < 1e-4, name
        assert again == own[2:], f"{name}: a resumed run is another one"
        assert tiny.difference(final, {n: reference[n] for n in final}) < 1e-4, name
        assert final.keys() == reference.keys()


def plain_course() -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """transformers and torch's AdamW; vectors do not decay."""
    model, optim = tiny.model(num_hidden_layers=2), replace(tiny_strategy.SPEC.optim, eps=1e-4)
    weights = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [w for w in weights.values() if w.dim() > 1]},
            {"params": [w for w in weights.values() if w.dim() == 1], "weight_decay": 0.0},
        ],
        lr=tiny_strategy.LR,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
    found = []
    for step in range(STEPS):
        batches = documents(step)
        targets = sum(collate(batch, 0).valid_tokens for batch in batches)
        total = sum(tiny.reference_loss(model, batch) for batch in batches)
        drift = sum(_squared_log_sum_exp(model, batch) for batch in batches)
        optimizer.zero_grad()
        ((total + 1e-3 * drift) / targets).backward()  # type: ignore[union-attr]
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), optim.max_grad_norm)
        found.append((float(torch.as_tensor(total).detach()) / targets, float(norm)))
        if step != REFUSED:
            optimizer.step()
    return found, {name: weight.detach() for name, weight in weights.items()}


def _squared_log_sum_exp(model: Any, batch: list[tiny.Document]) -> Any:
    """The z-loss's term, summed over tokens with a target."""
    total: Any = 0.0
    for ids, labels in batch:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        has_target = torch.tensor(labels[1:]) != IGNORE
        total = total + logits.logsumexp(-1)[has_target].square().sum()
    return total


def faults() -> dict[str, Any]:
    strategy = build("deepspeed", {"stage": 2})
    good = _shared(strategy.adapter_state())
    name = next(name for name in good if name.endswith("lora_B"))
    strategy.load_adapter_state({**good, name: torch.full_like(good[name], math.nan)})
    bad = apply(strategy, 0)
    strategy.load_adapter_state(good)
    after = apply(strategy, 0)
    fresh = apply(build("deepspeed", {"stage": 2}), 0)
    return {"updated": bad.updated, "norm": bad.grad_norm, "same": after.loss == fresh.loss}


def test_a_gradient_that_is_not_finite_is_left_out() -> None:
    found = run_ranks(faults, 1)[0]
    assert not found["updated"]
    assert not math.isfinite(found["norm"])
    assert found["same"], "something of the bad step stayed"
