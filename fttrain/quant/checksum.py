"""temporary stub until the cache branch lands"""

import torch
from torch import Tensor


def checksum(flat: Tensor) -> Tensor:
    words = flat.view(torch.int64)
    return (words * (torch.arange(len(words), device=flat.device) * 2 + 1)).sum()
