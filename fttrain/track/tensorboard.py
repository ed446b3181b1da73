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
from fttrain.util.warn import Warn, warn

FOLDER = "tensorboard"
FLUSH_S = 30  # longest delay of TensorBoard's figures
FINISH_S = 20.0  # longest wait for the disk at the end of a run


def open_tensorboard(
    folder: Path | str,
    resumed_step: int,
    run_config: Mapping[str, Any],
    warn: Warn = warn,
    finish_s: float = FINISH_S,
) -> Background:
    """Open a tracker that writes event files from a background thread.

    Args:
        folder: the run's folder.
        resumed_step: steps done before; events past it are dropped, for these steps run again.
        run_config: the run's settings to show, without secrets.
        warn: called with the one warning of a failure.
        finish_s: longest wait for the disk at the end of the run, in seconds.
    """
    path = Path(folder).resolve() / FOLDER
    return Background(
        "TensorBoard", lambda: EventFiles(path, resumed_step, run_config), warn, finish_s
    )


class EventFiles(Tracker):
    """The tracker that writes a run's event files."""

    def __init__(self, folder: Path, resumed_step: int, run_config: Mapping[str, Any]) -> None:
        """Open a new event file in ``folder``. Raises OSError where it cannot be written."""
        from torch.utils.tensorboard import SummaryWriter  # slow, and few runs need it

        _hush_writer_thread()
        self._run_config = run_config
        self._writer = SummaryWriter(
            str(folder),
            # Events from this step on are void; a run from its start voids all.
            purge_step=resumed_step + 1 if resumed_step else 0,
            flush_secs=FLUSH_S,
        )
        self._events: Any = self._writer.file_writer
        text = yaml.safe_dump(dict(run_config), sort_keys=False, allow_unicode=True)
        self._writer.add_text("config", f"```yaml\n{text}```", resumed_step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a point to each figure's chart; figures that are no number are left out."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def show(self, step: int, results: Results) -> None:
        """Write tables as text, plots as images, and the summary beside the settings."""
        for name, table in results.tables.items():
            self._writer.add_text(name, table.markdown(), step)
        for name, path in results.plots.items():
            self._writer.add_image(f"plots/{name}", _pixels(path), step, dataformats="HWC")
        if results.summary:
            self._compare(step, results.summary)

    def finish(self, exit_code: int = 0) -> None:
        """Write pending events and close the file."""
        self._writer.close()

    def _compare(self, step: int, summary: Mapping[str, float]) -> None:
        """Write a line of the HPARAMS page to this event file: ``add_hparams`` opens another."""
        from torch.utils.tensorboard.summary import hparams

        figures = {f"summary/{name}": value for name, value in summary.items()}
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        for part in hparams(dict(_flat(self._run_config)), figures):
            self._events.add_summary(part, step)


def _hush_writer_thread() -> None:
    """Silence exceptions in the thread of tensorboard's writer: its next call raises them again,
    and they are reported once, in one line.
    """
    default_hook = threading.excepthook

    def report(failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard."):
            default_hook(failed)

    threading.excepthook = report


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each setting by its dotted name, as a bool, a number or text."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value if isinstance(value, bool | int | float) else str(value)


def _pixels(path: Path) -> Any:
    """The image as RGB, uint8 (height, width, 3)."""
    import numpy
    from PIL import Image

    with Image.open(path) as image:
        return numpy.asarray(image.convert("RGB"))
