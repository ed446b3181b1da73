"""Snapshots: the exact state of a run, of which at least one is whole at every moment.

    checkpoints/
        step_00000100/               loads in plain PEFT as it is
            adapter_config.json          } of a run with lora=none, all weights in fp32:
            adapter_model.safetensors    } weights.safetensors
            optimizer.safetensors        every tensor of the optimizer
            state.json                   step, scalars (data position ...), settings, base model
            manifest.json                sizes and SHA-256 of the above, written last
        .part_step_00000200/         a save under way, or one that was killed: never looked at
        .left_step_00000300/         of a course that the run has left, see course.py: likewise

There is no pointer to the latest: the newest folder that verifies is the latest.
"""

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fttrain.checkpoint.adapter_peft import AdapterInfo, load_adapter, save_adapter
from fttrain.checkpoint.full_model import load_weights, save_weights
from fttrain.util import atomic_files
from fttrain.util.errors import UserError
from fttrain.util.manifest import fault, seal_folder
from fttrain.util.tensor_files import tensor_bytes, write_tensors

FORM = {"format": "fttrain-snapshot", "version": 1}
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
FOLDER = re.compile(r"step_(?P<step>\d{8,})(?P<aside>\.replaced)?")
WORDS = ("auto", "none")  # what ``resume`` may be beside the path of a snapshot
PART, LEFT = ".part_", ".left_"

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Snapshot:
    """Everything that a run must know to go on as if it had never stopped."""

    step: int  # optimizer steps done
    adapter: dict[str, Tensor]  # fp32 masters under our names, see adapter.py, or all weights
    optimizer: dict[str, Tensor]  # any names, shapes and dtypes
    scalars: dict[str, Any] = field(
        default_factory=dict
    )  # JSON: finite numbers, strings, lists, dicts
    # None: no adapter, ``adapter`` has all weights under transformers' names
    adapter_info: AdapterInfo | None = field(
        default_factory=lambda: AdapterInfo(r=16, lora_alpha=32.0)
    )
    base_model: str = ""  # name or path of the frozen base
    revision: str | None = None  # of the base on its hub


def _to_stderr(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def save_snapshot(
    checkpoints: Path | str, snapshot: Snapshot, keep_last: int = 2, warn: Warn = _to_stderr
) -> Path:
    """Saves ``snapshot`` and drops old ones; call it on one rank.

    When it returns, the snapshot is on the disk, has been read back and verified. Killed at any
    moment it leaves the earlier snapshots as they were. Snapshots of later steps belong to a course
    that this run has left (it was resumed from an earlier step) and go, too.

    Returns:
        the folder of the snapshot.

    Raises:
        UserError: no room on the disk (with the bytes needed and free), a tensor that is not
            finite, or a disk that gives back something else than what was written. Nothing
            half-written stays; older snapshots do.
    """
    checkpoints = Path(checkpoints)
    name = f"step_{snapshot.step:08d}"
    part, final = checkpoints / f"{PART}{name}", checkpoints / name
    needed = tensor_bytes(snapshot.adapter) + tensor_bytes(snapshot.optimizer)
    _sweep(checkpoints)
    try:
        with atomic_files.room_for(
            checkpoints, needed, f"saving the checkpoint of step {snapshot.step}"
        ):
            atomic_files.make_folder(checkpoints)
            part.mkdir()
            _write(part, snapshot)
            if (
                final.exists()
            ):  # a rename cannot replace a folder; the old one stays findable meanwhile
                aside = final.with_name(f"{name}.replaced")
                shutil.rmtree(aside, ignore_errors=True)
                final.rename(aside)
            part.rename(final)
            atomic_files.sync(checkpoints)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    reason = fault(final, FORM)
    if reason is not None:
        raise UserError(
            f"{final}: reads back differently from what was written ({reason}); the disk or the "
            "memory is failing; "
            "older checkpoints were kept"
        )
    _rotate(checkpoints, snapshot.step, keep_last, warn)
    return final


def find_snapshot(checkpoints: Path | str, resume: str, warn: Warn = _to_stderr) -> Path | None:
    """The verified snapshot that ``resume`` (auto, none or a path) asks for, or None to start
    afresh.

    Raises:
        UserError: the path is no whole snapshot, or with auto there are snapshots and none is
            whole.
    """
    if resume == "none":
        return None
    if resume != "auto":
        path = Path(resume)
        reason = fault(path, FORM)
        if reason is not None:
            inside = [
                found.name
                for folder in (path, path / "checkpoints")
                for found in _newest_first(folder)
            ]
            hint = f"; it holds {', '.join(inside)}: give one of these" if inside else ""
            raise UserError(f"resume={resume}: not a whole checkpoint: {reason}{hint}")
        return path
    found = _newest_first(Path(checkpoints))
    for path in found:
        reason = fault(path, FORM)
        if reason is None:
            return path
        warn(f"checkpoint {path} is refused: {reason}")
    if found:
        raise UserError(
            f"{checkpoints}: none of the {len(found)} checkpoints is whole; to start afresh "
            "give another output="
        )
    return None


def later_than(checkpoints: Path, step: int) -> list[Path]:
    """Snapshots of later steps, whole or not."""
    return [path for path in _newest_first(checkpoints) if _place(path)[0] > step]


def step_of(path: Path) -> int:
    """Optimizer steps done, of a whole snapshot."""
    return int(json.loads((path / STATE).read_bytes())["step"])


def scalars_of(path: Path) -> dict[str, Any]:
    """``Snapshot.scalars`` of a whole snapshot."""
    found: dict[str, Any] = json.loads((path / STATE).read_bytes())["scalars"]
    return found


def load_snapshot(path: Path | str) -> Snapshot:
    """Reads a snapshot, verified first. Tensors come back on the CPU, bit for bit as they were
    saved.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    path = Path(path)
    reason = fault(path, FORM)
    if reason is not None:
        raise UserError(f"{path}: not a whole checkpoint: {reason}")
    state = json.loads((path / STATE).read_bytes())
    whole = state["adapter_info"] is None
    trained = load_weights(path) if whole else load_adapter(path)[0]
    return put_together(state, trained, load_file(path / OPTIMIZER))


def state_of(snapshot: Snapshot) -> dict[str, Any]:
    """All but the tensors, as JSON has it."""
    info = snapshot.adapter_info
    return {
        "step": snapshot.step,
        "base_model": snapshot.base_model,
        "revision": snapshot.revision,
        "adapter_info": None if info is None else dataclasses.asdict(info),
        "scalars": snapshot.scalars,
    }


def put_together(
    state: dict[str, Any], adapter: dict[str, Tensor], optimizer: dict[str, Tensor]
) -> Snapshot:
    """A snapshot of its ``state_of`` and tensors."""
    return Snapshot(
        step=state["step"],
        adapter=adapter,
        optimizer=optimizer,
        scalars=state["scalars"],
        adapter_info=_info(state["adapter_info"]),
        base_model=state["base_model"],
        revision=state["revision"],
    )


def _info(stored: dict[str, Any] | None) -> AdapterInfo | None:
    if stored is None:
        return None
    targets = stored["target_modules"]
    named = targets if isinstance(targets, str) else tuple(targets)
    return AdapterInfo(**{**stored, "target_modules": named})


def _write(part: Path, snapshot: Snapshot) -> None:
    """All files of a snapshot, each synced, the manifest last."""
    info = snapshot.adapter_info
    if info is None:
        save_weights(part, snapshot.adapter)
    else:
        save_adapter(part, snapshot.adapter, info, snapshot.base_model, snapshot.revision)
    write_tensors(part / OPTIMIZER, snapshot.optimizer)
    atomic_files.write_json(part / STATE, state_of(snapshot))
    seal_folder(part, FORM, step=snapshot.step)


def _newest_first(checkpoints: Path) -> list[Path]:
    """Snapshot folders, whole or not; one that was set aside comes after its replacement."""
    folders = [path for path in checkpoints.glob("step_*") if path.is_dir()]
    found = [path for path in folders if FOLDER.fullmatch(path.name)]
    return sorted(found, key=_place, reverse=True)


def _place(path: Path) -> tuple[int, bool]:
    """Step of a snapshot's folder, and whether it is in its place, not set aside."""
    match = FOLDER.fullmatch(path.name)
    assert match is not None
    return int(match["step"]), match["aside"] is None


def _rotate(checkpoints: Path, step: int, keep_last: int, warn: Warn) -> None:
    """Keeps the snapshot of ``step``, just verified, and ``keep_last`` - 1 whole ones before it."""
    kept, old = 1, list(checkpoints.glob(f"{LEFT}*"))
    for path in _newest_first(checkpoints):
        at, in_place = _place(path)
        if at == step and in_place:
            continue
        if (
            at < step
            and in_place
            and kept < keep_last
            and fault(path, FORM, contents=False) is None
        ):
            kept += 1
        else:
            old.append(path)
    for path in old:
        try:
            gone = path.with_name(f"{PART}{path.name}")
            path.rename(gone)  # from here on it is no snapshot, however far the deletion gets
            shutil.rmtree(gone)
        except OSError as error:
            warn(f"old checkpoint {path} could not be deleted ({error.strerror})")


def _sweep(checkpoints: Path) -> None:
    """Deletes what killed saves and deletions left; only the owner of the run's folder may."""
    for path in checkpoints.glob(f"{PART}*"):
        shutil.rmtree(path, ignore_errors=True)
