"""Disk against the files themselves; hours, energy and price by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_files
import tiny_frozen
import tiny_strategy
from tiny_rig import rig

from fttrain.checkpoint.snapshot import Snapshot, save_snapshot
from fttrain.config.run_config import compose
from fttrain.data.batch import IGNORE
from fttrain.data.config import DataConfig
from fttrain.data.dataset import prepare
from fttrain.frozen.config import ModelConfig
from fttrain.frozen.source import load_tokenizer
from fttrain.model.decoder import Architecture
from fttrain.optim.config import OptimConfig
from fttrain.plan.cost import Cost, cost, disk, renting, run_steps, training_rows
from fttrain.plan.rigs import find_rig
from fttrain.plan.time import StepTime
from fttrain.quant.config import QuantConfig
from fttrain.strategy.spec import StrategySpec
from fttrain.training.session import adapter_info


def test_the_cache_takes_what_its_files_take(tmp_path: Path) -> None:
    cache = tiny_frozen.build(tiny_frozen.model(tmp_path / "model"), tmp_path / "cache")
    a = Architecture(tiny.model(num_hidden_layers=tiny_frozen.LAYERS).config)
    spec = replace(tiny_strategy.variant(), quant=QuantConfig())
    files = sum(path.stat().st_size for path in cache.folder.glob("*.bin"))
    assert disk(spec, a, 1).cache_bytes == files == cache.size_bytes


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_snapshots_take_what_their_files_take(tmp_path: Path, kind: str) -> None:
    spec: StrategySpec = replace(tiny_strategy.variant(), optim=OptimConfig(kind=kind))
    frozen = tiny_strategy.base(dtype=spec.dtype, quant=spec.quant, num_hidden_layers=3)
    strategy = tiny_strategy.build(spec, frozen)
    tiny_strategy.apply(strategy, 0)
    info = adapter_info(compose([f"lora.r={spec.lora.r}"]))
    taken = Snapshot(1, strategy.adapter_state(), strategy.optimizer_state(), {}, info)
    folder = save_snapshot(tmp_path, taken)
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    expected = disk(spec, frozen.architecture, 2).snapshots_bytes / 3  # the third: being written
    assert expected == pytest.approx(files, abs=64 << 10)  # headers
    assert expected == pytest.approx(files, rel=0.3)


def test_hours_energy_and_price() -> None:
    pair = rig(1 << 30, cards=2)
    time = StepTime(36.0, 500.0, "compute")
    assert cost(time, pair, 200) == Cost(2.0, None, None)
    card = replace(pair.cards[0], power_limit_w=350.0, price_per_h=0.25)
    priced = replace(pair, cards=(card, card))
    assert cost(time, priced, 200) == Cost(2.0, 1.4, 1.0)
    part = cost(time, priced, None)  # a million tokens: 2000 s
    assert part.hours == pytest.approx(2000 / 3600)
    assert part.price == pytest.approx(0.5 * 2000 / 3600)
    half = replace(pair, cards=(card, pair.cards[0]))
    assert cost(time, half, 200) == Cost(2.0, None, None)  # nothing is guessed


def test_what_renting_costs_is_said_with_its_source() -> None:
    shipped = find_rig("2x4090")
    each = shipped.cards[0].price_per_h
    assert each
    said = renting(shipped, 10)
    assert f"2 x NVIDIA GeForce RTX 4090: ${2 * each:.2f} an hour, ${20 * each:.2f} for" in said
    assert shipped.sources["cards.price_per_h"] in said
    card = replace(shipped.cards[0], price_per_h=None)  # measured: nobody has asked for a price
    own = replace(shipped, name="here", cards=(card,), sources={})
    assert f"1 x NVIDIA GeForce RTX 4090: ${each:.2f} an hour" in renting(own)
    assert shipped.sources["cards.price_per_h"] in renting(own)
    assert "no price is known" in renting(find_rig("one_16gb"))


def test_steps_are_those_of_the_loop() -> None:
    assert run_steps(None, 1.0, None, 16) is None
    assert run_steps(70, 1.0, None, 16) == 70
    assert run_steps(None, 2.0, 100, 16) == 14  # 7 an epoch, the last one partial
    assert run_steps(10, 2.0, 100, 16) == 10


def test_rows_are_those_of_a_data_set_that_is_there(tmp_path: Path) -> None:
    tiny_files.save(tiny.model(num_hidden_layers=2), tmp_path / "model")
    tiny_files.write_data(tmp_path / "data.jsonl")
    model = ModelConfig("tiny", str(tmp_path / "model"))
    path, cache = str(tmp_path / "data.jsonl"), str(tmp_path / "cache")
    data = DataConfig("file", path, seq_len=64, on_bad_row="truncate", cache_dir=cache)
    assert training_rows(model, data) is None
    assert not (tmp_path / "cache").exists()  # it tokenises nothing
    made = prepare(data, *load_tokenizer(model))
    rows = training_rows(model, data)
    assert rows is not None
    assert len(rows) == len(made.train)
    labels = [label for row in rows for _, own in row for label in own[1:]]
    targets = sum(label != IGNORE for label in labels)
    assert 0 < rows.target_share == targets / rows.tokens < 1
    assert rows.row_documents.tolist() == [len(row) for row in rows]
    assert training_rows(model, replace(data, seq_len=32)) is None
    assert training_rows(ModelConfig("hub", "nobody/nothing"), data) is None
    assert training_rows(model, replace(data, path=str(tmp_path / "none.jsonl"))) is None
