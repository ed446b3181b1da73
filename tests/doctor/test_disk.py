"""Room on the disk for what the chosen model needs."""

from pathlib import Path

import tiny
import tiny_files
import torch

from fttrain.distributed.rank_group import RankGroup
from fttrain.doctor import disk
from fttrain.doctor.finding import FAILURE, OK
from fttrain.frozen.build import open_or_build
from fttrain.frozen.config import ModelConfig
from fttrain.frozen.source import resolve
from fttrain.model.config import LoraConfig
from fttrain.quant.config import QuantConfig
from fttrain.strategy.builder import frozen_base, silent


def test_what_the_cache_needs_is_what_it_then_takes(tmp_path: Path) -> None:
    folder = tiny_files.save(tiny.model(num_hidden_layers=2), tmp_path / "model")
    source = resolve(ModelConfig("tiny", str(folder)))
    base = frozen_base(source, QuantConfig(), "float32")
    before = disk.cache(base, str(tmp_path / "cache"))
    assert (before.verdict, "needs" in before.figure) == (OK, True)
    built = open_or_build(
        base, str(tmp_path / "cache"), RankGroup(0, 1, 0, torch.device("cpu")), silent("")
    )
    norm_bytes = base.architecture.hidden * 4
    assert disk.frozen_bytes(base) == built.size_bytes - norm_bytes
    assert "is there" in disk.cache(base, str(tmp_path / "cache")).figure


def test_trained_values_are_those_of_the_adapter(tmp_path: Path) -> None:
    folder = tiny_files.save(tiny.model(num_hidden_layers=2), tmp_path / "model")
    shape = frozen_base(
        resolve(ModelConfig("tiny", str(folder))), QuantConfig(), "float32"
    ).architecture
    sizes = [
        lora_r * (group.shape.in_features + rows)
        for group in shape.groups
        for rows in group.shape.out_features
        for lora_r in (4,)
    ]
    values = disk.trained_values(shape, LoraConfig(r=4))
    least = 2 * sum(sizes)
    assert least <= values <= least + 2 * 3 * 256  # padding of each section and of the whole


def test_a_full_disk(tmp_path: Path) -> None:
    free = disk.shutil.disk_usage(tmp_path).free
    assert disk.room("it", free // 2, tmp_path / "a" / "b", "less").verdict == OK
    found = disk.room("it", 2 * free, tmp_path / "a" / "b", "output=FOLDER")
    assert (found.verdict, found.remedy) == (FAILURE, "output=FOLDER")
    assert str(tmp_path) in found.figure
