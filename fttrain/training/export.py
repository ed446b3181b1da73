"""The result of a run: an adapter, or with lora=none a whole model."""

from pathlib import Path

import torch
from torch import Tensor

from fttrain.checkpoint.adapter_peft import load_adapter, save_adapter
from fttrain.checkpoint.discovery import AUTO, find_snapshot
from fttrain.checkpoint.full_model import load_weights, save_model
from fttrain.checkpoint.snapshot import load_snapshot
from fttrain.config.run_config import RunConfig
from fttrain.frozen.source import Source, load_config, load_tokenizer, resolve
from fttrain.training.checkpointing import CHECKPOINTS, lock_on_main
from fttrain.training.session import TrainSession, adapter_info
from fttrain.util.errors import UserError

ADAPTER, MODEL = "adapter", "model"  # folders in the run's output


def export(config: RunConfig, folder: Path | str | None = None) -> Path:
    """Write the adapter (or the model, with lora=none) of the newest whole snapshot of the run in
    ``config.output``, and return its folder. One process calls it; nothing is loaded on a device.

    ``folder``: where to; None: adapter/ or model/ in the run's folder, as the end of a run leaves
    it. What is there is replaced. Raises UserError where the run has no whole snapshot, another
    process writes into its folder, or the disk is full.
    """
    output = Path(config.output)
    target = _result_folder(config) if folder is None else Path(folder)
    if not output.is_dir():
        raise UserError(f"output={output}: no run is there")
    with lock_on_main(config.output, AUTO):
        path = find_snapshot(output / CHECKPOINTS, AUTO)
        if path is None:
            raise UserError(f"output={output}: no checkpoint is there yet")
        snapshot = load_snapshot(path)
        if snapshot.adapter_info is None:
            _save_model(target, config, snapshot.adapter, resolve(config.model))
        else:
            base, revision = snapshot.base_model, snapshot.revision
            save_adapter(target, snapshot.adapter, snapshot.adapter_info, base, revision)
    return target


def export_result(session: TrainSession) -> Path:
    """Write the session's adapter (or model) into the run's folder, on rank 0, and return its
    folder. Every rank calls it.
    """
    config, source = session.config, session.inputs.source
    state, folder = session.strategy.adapter_state(), _result_folder(config)
    if not session.group.is_main:
        return folder
    info = adapter_info(config)
    if info is None:
        _save_model(folder, config, state, source, session.inputs.tokenizer)
    else:
        save_adapter(folder, state, info, source.name, config.model.revision)
    return folder


def usage(session: TrainSession, folder: Path) -> str:
    """The code that loads the exported ``folder`` with plain PEFT or transformers."""
    if not session.config.lora.r:
        return (
            f"model: {folder}\nload it with plain transformers:\n"
            f"  model = AutoModelForCausalLM.from_pretrained({str(folder)!r})"
        )
    arguments = ", ".join(
        repr(value) if i == 0 else f"{key}={value!r}"
        for i, (key, value) in enumerate(session.inputs.source.pretrained_arguments.items())
    )
    return (
        f"adapter: {folder}\nload it with plain PEFT:\n"
        f"  base = AutoModelForCausalLM.from_pretrained({arguments})\n"
        f"  model = PeftModel.from_pretrained(base, {str(folder)!r})"
    )


def find_trained(config: RunConfig) -> dict[str, Tensor]:
    """The trained tensors of the run in ``config.output``, fp32 by name: those of the finished
    result, or of the newest whole snapshot of a run that still goes on.

    Raises UserError where there is neither.
    """
    folder = _result_folder(config)
    if not folder.is_dir():
        output = Path(config.output)
        path = find_snapshot(output / CHECKPOINTS, AUTO)
        if path is None:
            article = "an" if folder.name == ADAPTER else "a"
            raise UserError(
                f"output={output}: neither {article} {folder.name} nor a checkpoint is there yet"
            )
        folder = path
    return load_adapter(folder)[0] if config.lora.r else load_weights(folder)


def _result_folder(config: RunConfig) -> Path:
    return Path(config.output) / (ADAPTER if config.lora.r else MODEL)


def _save_model(
    folder: Path,
    config: RunConfig,
    weights: dict[str, Tensor],
    source: Source,
    tokenizer: object = None,
) -> None:
    """``tokenizer``: loaded where it is None."""
    tokenizer = tokenizer or load_tokenizer(config.model)[0]
    dtype = getattr(torch, config.model.dtype)
    save_model(folder, weights, load_config(source), tokenizer, source, dtype)
