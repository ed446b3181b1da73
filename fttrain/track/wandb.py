"""Weights & Biases: what of a run it is told, and how it is kept from asking, prying and hanging.

Everything here that touches wandb runs in the thread of a ``Background``.

wandb counts its own steps. The optimizer's go along as ``step``, over which all charts are drawn:
so a run that goes on from a snapshot may tell steps again that had been told before, online and in
what is uploaded later.
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
from fttrain.track.metrics import Warn, to_stderr
from fttrain.util.errors import first_line
from fttrain.util.redact import redact

ID_FILE = "wandb_run_id"
INIT_S = 30.0  # how long a server may take to answer before logging goes offline
UPLOAD_SHARE = 0.8  # of the time that the end may take: then wandb gives up, and says what is left
OFFLINE = "offline-"  # how the name of a folder begins whose run wandb has not uploaded
SERVICE = "wandb-core"  # wandb's process beside ours, which it waits for when ours ends


def has_login() -> bool:
    """Whether wandb could log in without asking: an API key in the environment or in the netrc
    file.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    file = os.environ.get("NETRC") or Path.home() / ".netrc"
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def choose_mode(mode: str) -> str:
    """``track.mode`` -> wandb's mode; never online without a login, for that would ask on the
    terminal.
    """
    wanted = os.environ.get("WANDB_MODE") or "online" if mode == "auto" else mode
    if wanted == "disabled":
        return wanted
    return wanted if wanted not in ("offline", "dryrun") and has_login() else "offline"


def run_id(folder: Path) -> str:
    """The id of this folder's run: made once, the same after every resume."""
    path = folder / ID_FILE
    if not path.exists() or not path.read_text().strip():
        path.write_text(f"{uuid.uuid4().hex[:12]}\n")
    return path.read_text().strip()


def open_wandb(
    config: TrackConfig,
    folder: Path | str,
    run_config: Mapping[str, Any],
    warn: Warn = to_stderr,
    tell: Callable[[str], None] = print,
    finish_s: float = FINISH_S,
) -> Background:
    """Logs to wandb from a background thread.

    Args:
        config: what the run is called there, and the mode.
        folder: the run's folder; wandb's own files and the id of the run go there.
        run_config: the settings of the run to show, already without secrets.
        warn: takes the one warning of a failure.
        tell: takes the run's address, or how to upload what was logged offline.
        finish_s: seconds that the end of the run may wait for wandb.
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
    """Ends wandb's process, which a hanging server or disk may hold, and takes back that ours waits
    for it when it ends.
    """
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() == SERVICE:
                child.kill()
                child.wait(1.0)
    module = sys.modules.get("wandb")
    if module is not None:
        farewell = threading.Thread(target=_tear_down, args=(module,), daemon=True)
        farewell.start()
        farewell.join(1.0)


def _tear_down(module: Any) -> None:
    with contextlib.suppress(BaseException):  # the process that it says good-bye to is gone
        module.teardown()


class Upload:
    """How a user uploads what the server may lack; told once."""

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        """``folder``: the run's."""
        self.folder, self.tell, self._told = folder, tell, False

    def tell_how(self, why: str, earlier_only: bool = False) -> None:
        """Nothing where there is nothing to upload; ``earlier_only``: this start has been."""
        parts = [] if self._told else self._parts()
        if parts := parts[:-1] if earlier_only else parts:
            self._told = True
            command = shlex.join(["wandb", "sync", *map(str, parts)])
            self.tell(f"{why}; this uploads it:\n  {command}")

    def _parts(self) -> list[Path]:
        """wandb's folders of this start and of earlier ones that were offline and have not been
        uploaded since, by start: wandb makes one run of them, in this order.
        """
        found = self.folder.glob(f"wandb/*run-*/run-{run_id(self.folder)}.wandb")
        logs = sorted(found, key=_started)
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
    """Orders logs by their start. One that falls offline begins anew, maybe in the same second."""
    name = log.parent.name
    return name.removeprefix(OFFLINE), name.startswith(OFFLINE)


class WandbRun(Tracker):
    """A run in wandb. Every call may take long, hang or raise anything."""

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
        """Starts the run; offline when the server does not answer, for then nothing is lost."""
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
            wandb.teardown()  # else the id counts as being in use
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
            silent=True,  # its lines would tear the progress bar
            console="off",  # it must not capture our output, where a path might be private
            disable_git=True,  # a remote's address may hold a token
            x_disable_meta=True,  # the command line and the user's name are nobody's business
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
        """One row of the run's history."""
        self._run.log({"step": step, **values})

    def show(self, step: int, results: Results) -> None:
        """Tables and plots as such, the summary as columns of the run."""
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
        """Ends the run as finished or, with an exit code other than 0, failed."""
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            self._upload.tell_how("wandb: the server did not take all in time")
        if self._mode == "offline":
            self._upload.tell_how("wandb: logged offline")
        elif self._mode == "online":
            self._upload.tell_how("wandb: earlier steps were logged offline", earlier_only=True)
