"""What a run leaves behind: an adapter, or with lora=none a whole model."""

from pathlib import Path

import torch
from torch import Tensor

from fttrain.checkpoint.adapter_peft import load_adapter, save_adapter
from fttrain.checkpoint.full_model import load_weights, save_model
from fttrain.checkpoint.snapshot import find_snapshot
from fttrain.config.run_config import RunConfig
from fttrain.frozen.source import Source, load_config
from fttrain.training.session import TrainSession, adapter_info
from fttrain.util.errors import UserError

ADAPTER, MODEL = "adapter", "model"  # folders in the run's output


def export_result(run: TrainSession, source: Source) -> str:
    """Writes what has trained, and says how to use it; on rank 0. Every rank calls it."""
    state, config = run.strategy.adapter_state(), run.config
    if not run.group.is_main:
        return ""
    info = adapter_info(config)
    if info is None:
        folder, dtype = run.output / MODEL, getattr(torch, config.model.dtype)
        save_model(folder, state, load_config(source), run.tokenizer, source, dtype)
        return (
            f"model: {folder}\nload it with plain transformers:\n"
            f"  model = AutoModelForCausalLM.from_pretrained({str(folder)!r})"
        )
    folder = run.output / ADAPTER
    save_adapter(folder, state, info, run.base_model, config.model.revision)
    arguments = ", ".join(
        repr(value) if i == 0 else f"{key}={value!r}"
        for i, (key, value) in enumerate(source.pretrained_arguments.items())
    )
    return (
        f"adapter: {folder}\nload it with plain PEFT:\n"
        f"  base = AutoModelForCausalLM.from_pretrained({arguments})\n"
        f"  model = PeftModel.from_pretrained(base, {str(folder)!r})"
    )


def find_trained(config: RunConfig) -> dict[str, Tensor]:
    """What the run in ``config.output`` has trained, fp32 by name: the finished result, or that of
    the newest whole checkpoint of a run that still goes on. Raises UserError where there is none.
    """
    output = Path(config.output)
    what = ADAPTER if config.lora.r else MODEL
    folder = output / what
    if not folder.is_dir():
        found = find_snapshot(output / "checkpoints", "auto")
        if found is None:
            raise UserError(
                f"output={output}: neither {_article(what)} nor a checkpoint is there yet"
            )
        folder = found
    return load_adapter(folder)[0] if config.lora.r else load_weights(folder)


def _article(what: str) -> str:
    return f"an {what}" if what == ADAPTER else f"a {what}"
