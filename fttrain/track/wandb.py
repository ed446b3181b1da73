"""Weights & Biases: the tracker, with its prompts, its collection of private data and its waits
turned off.

All code that calls wandb runs in the thread of a ``Background``.

wandb counts steps of its own. The optimizer's step is logged as ``step``, the x-axis of all charts:
so a resumed run may log steps again, online and in later uploads.
"""

import contextlib
import importlib
import netrc
import os
import shlex
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from fttrain.track.background import FINISH_S, Background
from fttrain.track.base import Results, TrackConfig, Tracker
from fttrain.util.errors import first_line
from fttrain.util.redact import redact
from fttrain.util.warn import Warn, warn

ID_FILE = "wandb_run_id"
INIT_S = 30.0  # longest wait for the server's answer before logging goes offline
UPLOAD_SHARE = 0.8  # of the longest wait at the end: after it wandb gives up and lists the rest
OFFLINE = "offline-"  # prefix of the folders of runs that wandb has not uploaded
SERVICE = "wandb-core"  # wandb's process; it is awaited when this process ends


def has_login() -> bool:
    """Whether wandb has a login: an API key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    file = os.environ.get("NETRC") or Path.home() / ".netrc"
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def choose_mode(mode: str) -> str:
    """The mode of wandb for ``track.mode``: never online without a login, for then wandb would
    prompt on the terminal.
    """
    asked = os.environ.get("WANDB_MODE") or "online" if mode == "auto" else mode
    if asked == "disabled":
        return asked
    return asked if asked not in ("offline", "dryrun") and has_login() else "offline"


def run_id(folder: Path) -> str:
    """The id of the folder's run. It is created once and stays the same after each resume."""
    path = folder / ID_FILE
    if not path.exists() or not path.read_text().strip():
        path.write_text(f"{uuid.uuid4().hex[:12]}\n")
    return path.read_text().strip()


def open_wandb(
    config: TrackConfig,
    folder: Path | str,
    run_config: Mapping[str, Any],
    warn: Warn = warn,
    tell: Callable[[str], None] = print,
    finish_s: float = FINISH_S,
) -> Background:
    """Open a tracker that logs to wandb from a background thread.

    Args:
        config: the run's names there, and the mode.
        folder: the run's folder; wandb's files and the id of the run lie there.
        run_config: the run's settings to show, without secrets.
        warn: called with the one warning of a failure.
        tell: called with the run's address, or with the command that uploads an offline run.
        finish_s: longest wait for wandb at the end of the run, in seconds.
    """
    folder = Path(folder).resolve()
    mode = choose_mode(config.mode)
    if config.mode == "online" and mode == "offline":
        warn("track.mode=online, but wandb has no login: logging offline (wandb login mends it)")

    upload = Upload(folder, tell)

    def start() -> Tracker:
        return WandbRun(config, folder, run_config, mode, warn, upload, finish_s)

    def release() -> None:
        end_service()
        upload.tell_how("wandb: what it has may not be uploaded whole")

    return Background("wandb", start, warn, finish_s, release)


def end_service() -> None:
    """End wandb's process, which may hang with its server or disk, and cancel this process's wait
    for it at exit.
    """
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() == SERVICE:
                child.kill()
                child.wait(1.0)
    module = sys.modules.get("wandb")
    if module is not None:
        teardown = threading.Thread(target=_tear_down, args=(module,), daemon=True)
        teardown.start()
        teardown.join(1.0)


def _tear_down(module: Any) -> None:
    with contextlib.suppress(BaseException):  # wandb's process is gone
        module.teardown()


class Upload:
    """The hint for the user: the command that uploads data the server may lack. Printed once."""

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        """``folder``: the run's folder; ``tell``: called with the hint."""
        self.folder, self.tell, self._is_shown = folder, tell, False

    def tell_how(self, why: str, earlier_only: bool = False) -> None:
        """Show the hint after ``why``, if there is data to upload; ``earlier_only``: this start's
        data is uploaded.
        """
        parts = [] if self._is_shown else self._parts()
        if parts := parts[:-1] if earlier_only else parts:
            self._is_shown = True
            command = shlex.join(["wandb", "sync", *map(str, parts)])
            self.tell(f"{why}; this uploads it:\n  {command}")

    def _parts(self) -> list[Path]:
        """wandb's folders of this start and of earlier offline starts that were not uploaded, in
        the order of their starts: in this order wandb makes one run of them.
        """
        candidates = self.folder.glob(f"wandb/*run-*/run-{run_id(self.folder)}.wandb")
        logs = sorted(candidates, key=_started)
        if not logs:
            return []
        *earlier, last = logs
        return [
            log.parent
            for log in earlier
            if log.parent.name.startswith(OFFLINE)
            and not log.with_name(f"{log.name}.synced").exists()
        ] + [last.parent]


def _started(log: Path) -> tuple[str, bool]:
    """The sort key of a log: its start, then offline last. A log that falls offline starts anew,
    maybe in the same second.
    """
    name = log.parent.name
    return name.removeprefix(OFFLINE), name.startswith(OFFLINE)


class WandbRun(Tracker):
    """The tracker of a run in wandb. Every call may take long, hang or raise any exception."""

    def __init__(
        self,
        config: TrackConfig,
        folder: Path,
        run_config: Mapping[str, Any],
        mode: str,
        warn: Warn,
        upload: Upload,
        finish_s: float,
    ) -> None:
        """Start the run; offline when the server does not answer, so that no data is lost."""
        self._config, self._folder, self._run_config = config, folder, dict(run_config)
        self._mode, self._upload, self._finish_s = mode, upload, finish_s
        self._wandb = wandb = importlib.import_module("wandb")
        try:
            self._run = self._init()
        except Exception as error:
            if mode != "online":
                raise
            warn(
                "wandb cannot reach its server and logs offline "
                f"({type(error).__name__}: {first_line(error)})"
            )
            wandb.teardown()  # otherwise the id is still in use
            self._mode = "offline"
            self._run = self._init()
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        if self._mode == "online":
            upload.tell(f"wandb: {self._run.url}")

    def _init(self) -> Any:
        wandb, config = self._wandb, self._config
        upload_s = UPLOAD_SHARE * self._finish_s
        settings = wandb.Settings(
            silent=True,  # wandb's lines would tear the progress bar
            console="off",  # no capture of the output: paths in it may be private
            disable_git=True,  # a remote's address may contain a token
            x_disable_meta=True,  # the command line and the user's name are private
            disable_code=True,
            save_code=False,
            init_timeout=min(INIT_S, upload_s / 2),
            finish_timeout=upload_s,
            finish_timeout_raises=True,
        )
        texts = {
            "name": config.name or self._folder.name,
            "group": config.group,
            "notes": config.notes,
        }
        return wandb.init(
            project=config.project,
            entity=config.entity,
            **{key: redact(text) if text else None for key, text in texts.items()},
            tags=[redact(tag) for tag in config.tags] or None,
            id=run_id(self._folder),
            resume="allow",
            mode=self._mode,
            dir=str(self._folder),
            config=self._run_config,
            settings=settings,
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log one row of the run's history."""
        self._run.log({"step": step, **values})

    def show(self, step: int, results: Results) -> None:
        """Log tables and plots as such, the summary as columns of the run."""
        wandb = self._wandb
        shown: dict[str, Any] = {
            name: wandb.Table(
                columns=list(table.columns),
                data=[list(row) for row in table.rows],
                allow_mixed_types=True,
            )
            for name, table in results.tables.items()
        }
        shown |= {f"plots/{name}": wandb.Image(str(path)) for name, path in results.plots.items()}
        if shown:
            self._run.log({"step": step, **shown})
        self._run.summary.update(dict(results.summary))

    def finish(self, exit_code: int = 0) -> None:
        """End the run as finished or, with an exit code other than 0, failed."""
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            self._upload.tell_how("wandb: the server did not take all in time")
        if self._mode == "offline":
            self._upload.tell_how("wandb: logged offline")
        elif self._mode == "online":
            self._upload.tell_how("wandb: earlier steps were logged offline", earlier_only=True)
