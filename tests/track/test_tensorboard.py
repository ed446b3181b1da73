"""Event files as TensorBoard reads them, after a resume and on a disk that is full."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fttrain.config.run_config import compose
from fttrain.track import Results, Table, TrackConfig
from fttrain.track.tensorboard import open_tensorboard
from fttrain.util.errors import UserError

CONFIG = {"optim": {"lr": 1e-4, "offload": False}, "model": {"name": "tiny"}, "output": None}


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


def write(
    folder: Path, steps: range, resumed_step: int = 0, results: Results | None = None
) -> None:
    said: list[str] = []
    tracker = open_tensorboard(folder, resumed_step, CONFIG, said.append)
    for step in steps:
        tracker.log(step, {"loss": 100 * (resumed_step + 1) + step, "bad": float("nan")})
    if results is not None:
        tracker.show(steps[-1], results)
    tracker.finish()
    assert said == []


def text(found: EventAccumulator, name: str) -> str:
    return found.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()


def test_what_tensorboard_shows(tmp_path: Path) -> None:
    plot = tmp_path / "loss.png"
    Image.new("RGB", (7, 5), "red").save(plot)
    samples = Table(("prompt", "after"), [["one | two", "three\nfour"]])
    summary = {"holdout_nll_best": 3.5}
    write(tmp_path, range(1, 4), 0, Results(None, {"samples": samples}, summary, {"loss": plot}))
    found = read(tmp_path)
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [
        (1, 101),
        (2, 102),
        (3, 103),
    ]
    assert "bad" not in found.Tags()["scalars"], "what is no number is no point"
    assert "lr: 0.0001" in text(found, "config")
    rows = text(found, "samples").splitlines()
    assert rows == ["| prompt | after |", "| --- | --- |", "| one \\| two | three<br>four |"]
    (image,) = found.Images("plots/loss")
    assert (image.width, image.height) == (7, 5)
    assert found.Scalars("summary/holdout_nll_best")[0].value == 3.5
    told = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"optim.lr" in told


def test_what_a_resume_takes_again_replaces_what_came_after_the_snapshot(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    write(tmp_path, range(5, 7), resumed_step=4)
    losses = [(event.step, event.value) for event in read(tmp_path).Scalars("loss")]
    assert losses == [(1, 101), (2, 102), (3, 103), (4, 104), (5, 505), (6, 506)]


def test_a_run_from_its_start_keeps_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    write(tmp_path, range(0, 8))
    write(tmp_path, range(1, 3))
    assert [event.step for event in read(tmp_path).Scalars("loss")] == [1, 2]


FULL = """
import resource, sys
from fttrain.track.tensorboard import open_tensorboard
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
tracker = open_tensorboard(sys.argv[1], 0, {})
for step in range(1, 900):
    tracker.log(step, {"loss": 1.0})
tracker.finish()
print("trained to the end")
"""


def test_a_full_disk_costs_one_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "trained to the end\n"
    assert done.stderr == (
        "warning: TensorBoard failed and is off from here (OSError: [Errno 27] File too large)\n"
    )


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("not a folder")
    said: list[str] = []
    tracker = open_tensorboard(tmp_path, 0, {}, said.append)
    tracker.log(1, {"loss": 1.0})
    tracker.finish()
    (warning,) = said
    assert warning.startswith("TensorBoard failed and is off from here (FileExistsError: ")


def test_a_missing_package_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"pip install 'fttrain\[tensorboard\]'"):
        TrackConfig(kind=("wandb", "tensorboard"))
    assert TrackConfig(kind="wandb").kinds == ("wandb",)


@pytest.mark.parametrize(
    ("override", "kinds"),
    [
        ("track=none", ()),
        ("track=wandb", ("wandb",)),
        ("track=tensorboard", ("tensorboard",)),
        ("track=wandb_tensorboard", ("wandb", "tensorboard")),
        ("track.kind=wandb", ("wandb",)),
        ("track.kind=[tensorboard,wandb,tensorboard]", ("tensorboard", "wandb")),
    ],
)
def test_how_trackers_are_chosen(override: str, kinds: tuple[str, ...]) -> None:
    assert compose([override]).track.kinds == kinds


def test_a_list_of_options_is_pointed_to_the_one_that_has_both() -> None:
    with pytest.raises(UserError, match="did you mean wandb_tensorboard"):
        compose(["track=[wandb,tensorboard]"])
