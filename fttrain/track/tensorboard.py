"""TensorBoard: event files in the run's folder.

A folder may lie on a disk that is full or does not answer, so all of this runs in the thread of a
``Background``.
"""

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fttrain.track.background import Background
from fttrain.track.base import Results, Tracker
from fttrain.track.metrics import Warn, to_stderr

FOLDER = "tensorboard"
FLUSH_S = 30  # how old what TensorBoard shows may be
FINISH_S = 20.0  # how long the end of a run may wait for the disk


def open_tensorboard(
    folder: Path | str,
    resumed_step: int,
    run_config: Mapping[str, Any],
    warn: Warn = to_stderr,
    finish_s: float = FINISH_S,
) -> Background:
    """Writes event files from a background thread.

    Args:
        folder: the run's folder.
        resumed_step: steps done before; what was written past it is dropped, for it comes again.
        run_config: the settings of the run to show, already without secrets.
        warn: takes the one warning of a failure.
        finish_s: seconds that the end of the run may wait for the disk.
    """
    path = Path(folder).resolve() / FOLDER
    return Background(
        "TensorBoard", lambda: EventFiles(path, resumed_step, run_config), warn, finish_s
    )


class EventFiles(Tracker):
    """A run in TensorBoard."""

    def __init__(self, folder: Path, resumed_step: int, run_config: Mapping[str, Any]) -> None:
        """Opens a new event file in ``folder``. Raises OSError where it cannot be written."""
        from torch.utils.tensorboard import SummaryWriter  # slow, and few runs need it

        _hush_writer_thread()
        self._run_config = run_config
        self._writer = SummaryWriter(
            str(folder),
            # The first step whose earlier events are void; a run from its start has none to keep.
            purge_step=resumed_step + 1 if resumed_step else 0,
            flush_secs=FLUSH_S,
        )
        self._events: Any = self._writer.file_writer
        text = yaml.safe_dump(dict(run_config), sort_keys=False, allow_unicode=True)
        self._writer.add_text("config", f"```yaml\n{text}```", resumed_step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """A point of each figure's chart; none where a figure is no number."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def show(self, step: int, results: Results) -> None:
        """Tables as text, plots as images; the summary beside the settings, to compare runs by."""
        for name, table in results.tables.items():
            self._writer.add_text(name, table.markdown(), step)
        for name, path in results.plots.items():
            self._writer.add_image(f"plots/{name}", _pixels(path), step, dataformats="HWC")
        if results.summary:
            self._compare(step, results.summary)

    def finish(self, exit_code: int = 0) -> None:
        """Writes what is left and closes the file."""
        self._writer.close()

    def _compare(self, step: int, summary: Mapping[str, float]) -> None:
        """A line of the HPARAMS page, in this event file: ``add_hparams`` would begin a second."""
        from torch.utils.tensorboard.summary import hparams

        figures = {f"summary/{name}": value for name, value in summary.items()}
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        for part in hparams(dict(_flat(self._run_config)), figures):
            self._events.add_summary(part, step)


def _hush_writer_thread() -> None:
    """What fails in the thread of tensorboard's writer is raised again by the next call: so that
    it is told once, in one line.
    """
    usual = threading.excepthook

    def tell(failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard."):
            usual(failed)

    threading.excepthook = tell


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting by its dotted name, as a number, true or false, or text."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value if isinstance(value, bool | int | float) else str(value)


def _pixels(path: Path) -> Any:
    """uint8 (height, width, 3)."""
    import numpy
    from PIL import Image

    with Image.open(path) as image:
        return numpy.asarray(image.convert("RGB"))
