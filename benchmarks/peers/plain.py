"""The usual QLoRA loop with transformers, PEFT and bitsandbytes, whatever divides it among ranks.

As a competent user writes it: attention by ``sdpa``, adapters in bf16 with fp32 masters (faster
here than fp32 adapters under autocast), gradients reduced once a step, no synchronisation in
between, loss divided by the target tokens of the whole step over all ranks.

Legend: B rows of a micro-batch, T tokens of its longest row.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as torch_dist
from peers.work import Row
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging

IGNORE = -100  # the label of a token that is not trained on


def padded(rows: list[Row]) -> dict[str, Tensor]:
    """One document a row, padded to the longest: what a data collator makes.

    ``input_ids``, ``labels`` and ``attention_mask`` int64 (B, T).
    """
    length = max(len(ids) for row in rows for ids, _ in row)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for [(ids, labels)] in rows:
        fill = length - len(ids)
        batch["input_ids"].append([*ids, *[0] * fill])
        batch["labels"].append([*labels, *[IGNORE] * fill])
        batch["attention_mask"].append([*[1] * len(ids), *[0] * fill])
    return {name: torch.tensor(values) for name, values in batch.items()}


def packed(rows: list[Row]) -> dict[str, Tensor]:
    """Several documents a row. Positions restart with each; without a mask of its own transformers
    makes of them the block-diagonal causal one.

    ``input_ids``, ``labels`` and ``position_ids`` int64 (B, T).
    """
    length = max(sum(len(ids) for ids, _ in row) for row in rows)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        fill = length - sum(len(ids) for ids, _ in row)
        # The fill is a document of its own at the end of the row.
        documents = [*row, ([0] * fill, [IGNORE] * fill)] if fill else row
        batch["input_ids"].append([token for ids, _ in documents for token in ids])
        # No token predicts the first one of the next document.
        batch["labels"].append([label for _, own in documents for label in (IGNORE, *own[1:])])
        batch["position_ids"].append([at for ids, _ in documents for at in range(len(ids))])
    return {name: torch.tensor(values) for name, values in batch.items()}


class PlainLoop(ABC):
    """One rank of a peer. A subclass divides the model among the ranks and reduces gradients, to
    their mean over the ranks.
    """

    sharded = False  # whether a rank holds only a part of each gradient after the reduction

    def __init__(self, job: dict[str, Any], model: nn.Module) -> None:
        self.model = model
        self._rank, self._world_size = torch_dist.get_rank(), torch_dist.get_world_size()
        self._collate = padded if job["data"] == "padded" else packed
        self._max_grad_norm: float = job["optim"]["max_grad_norm"]
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._masters = [_own(p.detach()).float() for p in self._parameters]
        self._adamw = torch.optim.AdamW(
            self._masters,
            lr=job["optim"]["lr"],
            betas=tuple(job["optim"]["betas"]),
            eps=job["optim"]["eps"],
            weight_decay=job["optim"]["weight_decay"],
            fused=True,
        )

    @abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Forward and backward of a micro-batch run in it; gradients meet after the ``last``."""

    def prepare(self, ranks: list[list[list[Row]]]) -> list[dict[str, Tensor]]:
        """The tensors of this rank's micro-batches of one step, of those of all ``ranks``."""
        return [self._collate(rows) for rows in ranks[self._rank]]

    def step(self, batches: list[dict[str, Tensor]], number: int) -> float:
        """One optimizer step. Returns the loss in nats per target token over all ranks."""
        targets = torch.stack([(batch["labels"][:, 1:] != IGNORE).sum() for batch in batches]).sum()
        torch_dist.all_reduce(targets)
        share = targets / self._world_size  # gradients become the mean over the ranks
        loss_sum = torch.zeros(())
        for index, batch in enumerate(batches):
            with self.accumulating(last=index == len(batches) - 1):
                loss = self.model(**batch, use_cache=False, num_items_in_batch=share).loss
                loss.backward()
            loss_sum += loss.detach()
        self._update()
        torch_dist.all_reduce(loss_sum)
        return loss_sum.item() / self._world_size

    @torch.no_grad()
    def _update(self) -> None:
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            if parameter.grad is None:
                assert not master.numel(), "a parameter has no gradient"
                master.grad = torch.zeros_like(master)  # all of it belongs to another rank
            else:
                master.grad = _own(parameter.grad).float()
        if self._max_grad_norm:
            self._clip([master.grad for master in self._masters])
        self._adamw.step()
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            _own(parameter).copy_(master)
        self.model.zero_grad()

    def _clip(self, gradients: list[Any]) -> None:
        """By the norm over all ranks, as ``clip_grad_norm_`` does it for whole gradients."""
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.sharded:
            square = norm.square()
            torch_dist.all_reduce(square)
            norm = square.sqrt()
        torch._foreach_mul_(gradients, (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0))


def _own(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def load(job: dict[str, Any], storage: torch.dtype = torch.uint8) -> PeftModel:
    """The quantised model with its initial adapter. ``storage``: the type that the 4-bit bytes pass
    for.
    """
    logging.disable_progress_bar()
    quant, lora = job["quant"], job["lora"]
    base = AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant["kind"],
            bnb_4bit_use_double_quant=quant["double_quant"],
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=storage,
        ),
    )
    if job["checkpointing"]:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(
        r=lora["r"],
        lora_alpha=lora["lora_alpha"],
        lora_dropout=lora["lora_dropout"],
        target_modules=lora["target_modules"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    start = load_file(job["adapter"])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            parameter.data = start.pop(key).to(torch.bfloat16)
    assert not start, f"the peer has no adapter for {sorted(start)[0]}"
    return model.train()  # in eval mode bitsandbytes may repack weights such that backward is wrong
