"""Snapshots: the exact state of a run, of which at least one is whole at every moment.

    checkpoints/
        step_00000100/               loads in plain PEFT as it is
            adapter_config.json          } of a run with lora=none, all weights in fp32:
            adapter_model.safetensors    } weights.safetensors
            optimizer.safetensors        every tensor of the optimizer
            state.json                   step, scalars (data position ...), settings, base model
            manifest.json                sizes and SHA-256 of the above, written last
        .part_step_00000200/         a save under way, or one that was killed: never looked at
        .left_step_00000300/         of a lineage that the run has left, see lineage.py: likewise

There is no pointer to the latest: the newest folder that verifies is the latest. Which snapshot a
run resumes from is decided in discovery.py.
"""

import dataclasses
import json
import re
import shutil
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
from fttrain.util.warn import Warn, warn

FORM = {"format": "fttrain-snapshot", "version": 1}
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
FOLDER = re.compile(r"step_(?P<step>\d{8,})(?P<aside>\.replaced)?")
PART, LEFT = ".part_", ".left_"


@dataclass(frozen=True)
class Snapshot:
    """The state from which a run goes on as if it had never stopped."""

    step: int  # optimizer steps done
    adapter: dict[str, Tensor]  # fp32 masters under our names (adapter_peft.py), or all weights
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


def save_snapshot(
    checkpoints: Path | str, snapshot: Snapshot, keep_last: int = 2, warn: Warn = warn
) -> Path:
    """Save ``snapshot`` and delete old ones; one rank calls it.

    When it returns, the snapshot is on the disk, has been read back and verified. Killed at any
    moment it leaves the earlier snapshots as they were. Snapshots of later steps are of a lineage
    that this run has left (it was resumed from an earlier step) and are deleted, too.

    Returns:
        the folder of the snapshot.

    Raises:
        UserError: no room on the disk (with the bytes needed and free), a tensor that is not
            finite, or a disk that reads back other bytes than were written. Nothing half-written
            stays; older snapshots do.
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
            # A rename cannot replace a folder; the old one can be found in the meantime.
            if final.exists():
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


def later_than(checkpoints: Path, step: int) -> list[Path]:
    """The folders of snapshots of later steps, whole or not."""
    return [path for path in newest_first(checkpoints) if _step_and_standing(path)[0] > step]


def step_of(path: Path) -> int:
    """The number of optimizer steps done, of a whole snapshot."""
    return int(json.loads((path / STATE).read_bytes())["step"])


def scalars_of(path: Path) -> dict[str, Any]:
    """``Snapshot.scalars`` of a whole snapshot."""
    scalars: dict[str, Any] = json.loads((path / STATE).read_bytes())["scalars"]
    return scalars


def load_snapshot(path: Path | str) -> Snapshot:
    """Read a snapshot, verified first. Its tensors are on the CPU, bit for bit as they were saved.

    Raises:
        UserError: a file is missing or damaged, by name.
    """
    path = Path(path)
    reason = fault(path, FORM)
    if reason is not None:
        raise UserError(f"{path}: not a whole checkpoint: {reason}")
    state = json.loads((path / STATE).read_bytes())
    all_weights = state["adapter_info"] is None
    trained = load_weights(path) if all_weights else load_adapter(path)[0]
    return assemble(state, trained, load_file(path / OPTIMIZER))


def state_of(snapshot: Snapshot) -> dict[str, Any]:
    """Everything but the tensors, as JSON values."""
    info = snapshot.adapter_info
    return {
        "step": snapshot.step,
        "base_model": snapshot.base_model,
        "revision": snapshot.revision,
        "adapter_info": None if info is None else dataclasses.asdict(info),
        "scalars": snapshot.scalars,
    }


def assemble(
    state: dict[str, Any], adapter: dict[str, Tensor], optimizer: dict[str, Tensor]
) -> Snapshot:
    """The snapshot with this ``state_of`` and these tensors."""
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
    """Write all files of a snapshot, each synced, the manifest last."""
    info = snapshot.adapter_info
    if info is None:
        save_weights(part, snapshot.adapter)
    else:
        save_adapter(part, snapshot.adapter, info, snapshot.base_model, snapshot.revision)
    write_tensors(part / OPTIMIZER, snapshot.optimizer)
    atomic_files.write_json(part / STATE, state_of(snapshot))
    seal_folder(part, FORM, step=snapshot.step)


def newest_first(checkpoints: Path) -> list[Path]:
    """The folders of snapshots, whole or not; one that was set aside comes after its
    replacement.
    """
    folders = [path for path in checkpoints.glob("step_*") if path.is_dir()]
    snapshots = [path for path in folders if FOLDER.fullmatch(path.name)]
    return sorted(snapshots, key=_step_and_standing, reverse=True)


def _step_and_standing(path: Path) -> tuple[int, bool]:
    """The step of a snapshot's folder, and whether the folder stands and was not set aside."""
    match = FOLDER.fullmatch(path.name)
    assert match is not None
    return int(match["step"]), match["aside"] is None


def _rotate(checkpoints: Path, step: int, keep_last: int, warn: Warn) -> None:
    """Delete all snapshots but that of ``step``, just verified, and ``keep_last`` - 1 whole ones
    before it.
    """
    retained, old = 1, list(checkpoints.glob(f"{LEFT}*"))
    for path in newest_first(checkpoints):
        at, standing = _step_and_standing(path)
        if at == step and standing:
            continue
        older = at < step and standing and retained < keep_last
        if older and fault(path, FORM, contents=False) is None:
            retained += 1
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
    """Delete the remains of killed saves and deletions; only the owner of the run's folder may."""
    for path in checkpoints.glob(f"{PART}*"):
        shutil.rmtree(path, ignore_errors=True)
