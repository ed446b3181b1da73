"""The demo's work as plain data: model, initial adapter and token ids that all sides take alike."""

import dataclasses
from pathlib import Path
from typing import Any

Document = tuple[list[int], list[int]]  # token ids and labels, aligned; a label is its id or -100
Row = list[Document]


@dataclasses.dataclass(frozen=True)
class Size:
    """How much work; None: as the demo has it."""

    model: str | None  # as model.path
    ranks: int
    micro_batch_size: int | None  # rows of a micro-batch
    gradient_accumulation_steps: int | None  # micro-batches of a step and rank
    steps: int  # optimizer steps, warm-up included


@dataclasses.dataclass(frozen=True)
class Work:
    """What a rank is told, and the rows that it trains on."""

    job: dict[str, Any]  # model, adapter, cache, seed, quant, lora, optim and sizes
    steps: dict[str, list[Any]]  # padded | packed -> by step, rank, micro-batch: its rows

    def tokens(self, kind: str) -> list[int]:
        """Tokens of each step over all ranks, without padding."""
        return [
            sum(len(ids) for rank in step for rows in rank for row in rows for ids, _ in row)
            for step in self.steps[kind]
        ]


def demo_work(size: Size, kinds: list[str], folder: Path) -> Work:
    """Writes checkpoint, adapter and fttrain's cache of the quantised base into ``folder``, so that
    fttrain starts as a run does whose base was used before. ``kinds``: padded, packed.
    """
    from fttrain.config.run_config import compose
    from fttrain.data.dataset import prepare
    from fttrain.frozen.source import load_tokenizer, resolve

    path = [f"model.path={size.model}"] if size.model else []
    config = compose(["experiment=demo", *path])
    loop = config.loop
    source = resolve(config.model)
    tokenizer, tokenizer_id = load_tokenizer(config.model)
    job = {
        "model": str(_safetensors(source, folder)),
        "adapter": str(_initial_adapter(source, config, folder)),
        "seed": loop.seed,
        "quant": dataclasses.asdict(config.quant),
        "lora": dataclasses.asdict(config.lora),
        "optim": dataclasses.asdict(config.optim),
        "ranks": size.ranks,
        "micro_batch_size": size.micro_batch_size or loop.micro_batch_size,
        "gradient_accumulation_steps": size.gradient_accumulation_steps
        or loop.gradient_accumulation_steps,
        "seq_len": config.data.seq_len,
        "cache_dir": str(folder / "cache"),
    }
    _fill_cache(job, config)
    steps = {}
    for kind in kinds:
        data = dataclasses.replace(config.data, packing=kind == "packed")
        steps[kind] = _steps(prepare(data, tokenizer, tokenizer_id).train, job, size.steps)
    return Work(job, steps)


def _safetensors(source: Any, folder: Path) -> Path:
    """The checkpoint in a form that every side can read: transformers quantises no GGUF."""
    if source.gguf_file is None:
        return source.folder
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        **source.pretrained_arguments,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder / "model")
    return folder / "model"


def _initial_adapter(source: Any, config: Any, folder: Path) -> Path:
    """The adapter that a run of fttrain with this seed starts from."""
    import torch
    from safetensors.torch import save_file

    from fttrain.frozen.source import load_config
    from fttrain.model.decoder import Architecture
    from fttrain.model.layer_adapters import LayerAdapters

    architecture = Architecture(load_config(source))
    host = torch.device("cpu")
    adapter = {}
    for index in range(architecture.layers):
        layer = LayerAdapters(index, architecture.groups, config.lora, host, torch.float32)
        layer.reset(config.loop.seed)
        adapter |= {name: master.clone() for name, master in layer.named_masters()}
    save_file(adapter, folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


def _fill_cache(job: dict[str, Any], config: Any) -> None:
    import torch

    from fttrain.distributed.rank_group import RankGroup
    from fttrain.frozen.build import open_or_build
    from fttrain.frozen.config import ModelConfig
    from fttrain.frozen.source import resolve
    from fttrain.strategy.builder import frozen_base

    source = resolve(ModelConfig("benchmark", job["model"]))
    base = frozen_base(source, config.quant, config.model.dtype)
    alone = RankGroup(0, 1, 0, torch.device("cpu"))
    open_or_build(base, job["cache_dir"], alone, lambda done, total: None)


def _steps(rows: Any, job: dict[str, Any], count: int) -> list[Any]:
    """By step, rank and micro-batch its rows, in an order drawn from the seed; again from the
    start where they do not suffice.
    """
    import numpy as np

    order = np.random.RandomState(job["seed"]).permutation(len(rows))
    shape = (
        count,
        job["ranks"],
        job["gradient_accumulation_steps"],
        job["micro_batch_size"],
    )
    chosen = np.resize(order, shape).tolist()
    return [[[[rows[row] for row in batch] for batch in rank] for rank in step] for step in chosen]
