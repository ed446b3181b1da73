"""Copies between card and host."""

import pytest
import torch

from fttrain.distributed.rank_group import RankGroup
from fttrain.rig.copies import copy_rates
from fttrain.rig.profile import CopyRates


def test_a_cpu_has_none() -> None:
    cpu = torch.device("cpu")
    assert copy_rates(RankGroup(0, 1, 0, cpu), cpu) == (CopyRates(), CopyRates())


@pytest.mark.cuda
def test_page_locked_memory_is_not_slower_than_pageable() -> None:
    cpu = torch.device("cpu")
    for rates in copy_rates(RankGroup(0, 1, 0, cpu), torch.device("cuda", 0)):
        assert rates.pinned_bytes_per_s is not None
        assert rates.pageable_bytes_per_s is not None
        assert rates.pinned_bytes_per_s > 0.9 * rates.pageable_bytes_per_s
        assert rates.both_ways_bytes_per_s is not None
        assert rates.both_ways_bytes_per_s < 1.2 * rates.pinned_bytes_per_s
        # One card alone: all at once is the same.
        assert rates.all_cards_bytes_per_s == pytest.approx(rates.pinned_bytes_per_s, rel=0.2)
