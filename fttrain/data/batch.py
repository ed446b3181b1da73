"""Micro-batches, the input of the model: documents end to end, without padding.

Legend: N tokens of a micro-batch, all its documents together.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fttrain.data.config import ROW_MULTIPLE
from fttrain.util.units import round_up

IGNORE = -100  # target of a token that is not trained on


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of one rank.

    ``N`` may be 0: a rank without work still takes part in every collective.
    """

    input_ids: Tensor  # int64 (N,)
    targets: Tensor  # int64 (N,): the next token of the same document, or IGNORE
    position_ids: Tensor  # int64 (N,): restarts at 0 in each document
    lengths: tuple[int, ...]  # tokens of each document; they sum to N
    index: int  # number in the optimizer step over all ranks; seeds dropout
    # int64 (M,): positions of the tokens that have a target. Computed on the host, so that no
    # device is waited for to learn M
    trained: Tensor
    target_counts: tuple[int, ...]  # targets of each document, padding apart; they sum to M

    @property
    def valid_tokens(self) -> int:
        """M: targets that are not IGNORE."""
        return len(self.trained)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch with its tensors on ``device``; the host does not wait for it."""
        return replace(
            self,
            input_ids=moved(self.input_ids, device),
            targets=moved(self.targets, device),
            position_ids=moved(self.position_ids, device),
            trained=moved(self.trained, device),
        )

    def padded(self, multiple: int = ROW_MULTIPLE) -> "MicroBatch":
        """The same micro-batch with N a multiple of ``multiple``.

        The padding is a document without targets, so it changes no result.
        """
        count = round_up(len(self.input_ids), multiple) - len(self.input_ids)
        if not count:
            return self
        return replace(
            self,
            input_ids=torch.nn.functional.pad(self.input_ids, (0, count)),
            targets=torch.nn.functional.pad(self.targets, (0, count), value=IGNORE),
            position_ids=torch.nn.functional.pad(self.position_ids, (0, count)),
            lengths=(*self.lengths, count),
        )


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; the host does not wait for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # a copy from pageable memory would make the host wait
    return tensor.to(device, non_blocking=device.type == "cuda")


def collate(documents: list[tuple[list[int], list[int]]], index: int) -> MicroBatch:
    """Return ``documents``, pairs of (token ids, labels), as one micro-batch.

    Labels are aligned with the ids (label i is token i, or IGNORE). Targets are the labels moved
    one to the left within each document, so no token predicts the first token of the next document.
    """
    documents = [document for document in documents if document[0]]
    lengths = tuple(len(ids) for ids, _ in documents)
    flat_ids = [token for ids, _ in documents for token in ids]
    shifted = [(*labels[1:], IGNORE) for _, labels in documents]
    flat_targets = [target for document_targets in shifted for target in document_targets]
    targets = torch.tensor(flat_targets, dtype=torch.int64)
    positions = [torch.arange(length) for length in lengths]
    return MicroBatch(
        input_ids=torch.tensor(flat_ids, dtype=torch.int64),
        targets=targets,
        position_ids=torch.cat(positions) if positions else torch.zeros(0, dtype=torch.int64),
        lengths=lengths,
        index=index,
        trained=(targets != IGNORE).nonzero().squeeze(-1),
        target_counts=tuple(
            len(document_targets) - document_targets.count(IGNORE) for document_targets in shifted
        ),
    )
