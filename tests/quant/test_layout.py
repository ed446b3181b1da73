"""Where tensors lie in a layer's flat buffer."""

import math

import pytest
import torch

from fttrain.quant.layout import ALIGN_BYTES, Layout

TENSORS = [
    ("packed", (1000,), torch.uint8),
    ("absmax", (7,), torch.float32),
    ("norm", (3, 5), torch.bfloat16),
    ("offset", (1,), torch.float32),
]


def test_views_share_the_buffer_are_aligned_and_do_not_overlap() -> None:
    layout = Layout(TENSORS)
    flat = torch.zeros(layout.size_bytes, dtype=torch.uint8)
    views = layout.views(flat)
    for number, (name, shape, dtype) in enumerate(TENSORS, start=1):
        assert (tuple(views[name].shape), views[name].dtype) == (shape, dtype)
        assert (views[name].data_ptr() - flat.data_ptr()) % ALIGN_BYTES == 0
        views[name].view(-1).view(torch.uint8).fill_(number)
    for number, (name, _, _) in enumerate(TENSORS, start=1):
        assert bool((views[name].view(-1).view(torch.uint8) == number).all()), name
    used = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in TENSORS)
    assert int((flat != 0).sum()) == used


@pytest.mark.parametrize("world_size", range(1, 9))
def test_every_world_size_up_to_eight_shards_it_evenly(world_size: int) -> None:
    layout = Layout(TENSORS)
    assert layout.size_bytes % (world_size * ALIGN_BYTES) == 0
    shards = torch.arange(layout.size_bytes).view(world_size, -1)
    assert torch.equal(torch.cat(list(shards)), torch.arange(layout.size_bytes))
