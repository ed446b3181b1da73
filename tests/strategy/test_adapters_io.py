"""Adapters of stages: cut out of a whole one and put together again, exactly."""

from typing import Any

import pytest
import tiny
import tiny_strategy
import torch
from ranks import run_ranks

from fttrain.strategy.adapters_io import assemble, load_adapter_state, part_of
from fttrain.util.errors import UserError


def stage(layers: range) -> Any:
    """A strategy's decoder cut down to some of its layers."""
    decoder = tiny_strategy.build(tiny_strategy.variant(), tiny_strategy.base()).decoder
    decoder.layers = [decoder.layers[layer] for layer in layers]
    return decoder


def whole() -> dict[str, torch.Tensor]:
    return tiny_strategy.adapters(
        tiny_strategy.build(tiny_strategy.variant(), tiny_strategy.base(num_hidden_layers=12))
    )


def test_a_part_has_its_layers_and_no_others() -> None:
    """Layer 1 is not layer 11."""
    frozen = tiny_strategy.base(num_hidden_layers=12)
    decoder = tiny_strategy.build(tiny_strategy.variant(), frozen).decoder
    state = whole()
    decoder.layers = decoder.layers[1:3]
    part = part_of(state, decoder)
    assert part.keys() == {name for name, _ in tiny.named_masters(decoder)}
    changed = {name: tensor + 1 for name, tensor in part.items()}
    load_adapter_state(decoder, changed)
    for name, master in tiny.named_masters(decoder):
        assert torch.equal(master, state[name] + 1)


def test_a_tensor_of_no_layer_is_left_to_be_refused() -> None:
    decoder = stage(range(2))
    state = {
        **dict(tiny.named_masters(decoder)),
        "model.layers.99.mlp.up_proj.lora_A": torch.ones(1),
    }
    part = part_of(state, decoder)
    with pytest.raises(UserError, match=r"model\.layers\.99\.mlp\.up_proj\.lora_A"):
        load_adapter_state(decoder, part)


def tensors(rank: int) -> dict[str, torch.Tensor]:
    """Different ones on each rank, of several types; none on rank 1."""
    if rank == 1:
        return {}
    generator = torch.Generator().manual_seed(rank)
    return {
        f"{rank}.matrix": torch.randn(3 + rank, 4, generator=generator),
        f"{rank}.slanted": torch.randn(5, 6, generator=generator).t(),
        f"{rank}.step": torch.tensor(float(rank)),
        f"{rank}.half": torch.randn(7, generator=generator).bfloat16(),
        f"{rank}.count": torch.arange(3) + rank,
        f"{rank}.empty": torch.zeros(0, 2),
    }


def put_together() -> dict[str, torch.Tensor]:
    group = tiny_strategy.this_group()
    return assemble(tensors(group.rank), group)


@pytest.mark.parametrize("world_size", [1, 3])
def test_rank_0_gets_all_and_the_others_nothing(world_size: int) -> None:
    found, *others = [put_together()] if world_size == 1 else run_ranks(put_together, world_size)
    expected = {n: t for rank in range(world_size) for n, t in tensors(rank).items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert others == [{}] * (world_size - 1)
    assert found["0.step"].device == tiny.CPU
