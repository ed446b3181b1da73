"""The strategies ask a card for nothing that could race."""

import pytest
import short_memory
from tiny_streams import (
    GROUPS,
    LAYERS,
    MIXED,
    OFFLOAD,
    ON_HOST,
    PIPELINE,
    SHARD,
    STREAM,
    Settings,
    races,
)

from fttrain.store.side_stream import CudaSideStream

VARIANTS: dict[str, Settings] = {
    "replicate": {},
    "shard": SHARD,
    "stream": STREAM,
    "stream, some layers resident": {**STREAM, "resident_layers": 1, "slots": 3},
    "all on the host": ON_HOST,
    "all on the host, groups": GROUPS,
    "all on the host, optimizer sharded": {**ON_HOST, "shard": True},
    "optimizer sharded": {**SHARD, "shard": True},
    "offload": OFFLOAD,
    "offload, groups": {"activations": "offload", "group": 1},
    "mixed": MIXED,
    "pipeline": PIPELINE,
    "pipeline, offload": {"strategy": "pipeline", "activations": "offload", "offload": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_races(name: str) -> None:
    assert races(VARIANTS[name], evaluated=True) == []


@pytest.mark.parametrize(
    "settings", [{"layer_inputs": "host"}, {"activations": "offload"}], ids=str
)
def test_nothing_races_on_the_last_stage(settings: Settings) -> None:
    assert races({"strategy": "pipeline", "offload": True, **settings}, rank=1) == []


@pytest.mark.parametrize("settings", [OFFLOAD, {**STREAM, "layer_inputs": "host"}], ids=str)
def test_a_step_that_ran_out_of_memory_leaves_no_copy_under_way(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_memory.limit(monkeypatch, "backward", tokens=0, layer=LAYERS - 2)
    assert races(settings) == []
    monkeypatch.setattr(CudaSideStream, "synchronize", lambda self: None)
    found = races(settings)
    freed = "*", "copy_ * writes *", "it is freed on compute"
    assert any(race.is_like(*freed) for race in found), found


def test_parts_of_gradients_on_the_device_need_no_wait_of_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is none on a card; here, where a device is the CPU, there would be one."""
    monkeypatch.setattr(CudaSideStream, "synchronize", lambda self: None)
    assert races({**SHARD, "shard": True}) == []
