"""Weights & Biases, kept at arm's length: a slow, hanging, broken or missing wandb costs a warning.

Everything of wandb, the import included, runs in one background thread that is fed by a bounded
queue.
"""

import contextlib
import importlib
import netrc
import os
import queue
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fttrain.track.base import TrackConfig, plain
from fttrain.track.metrics import Warn, to_stderr

ID_FILE = "wandb_run_id"
QUEUE_LENGTH = 1000  # steps that may wait for a slow wandb before new ones are dropped
INIT_S = 30.0  # how long a server may take to answer before logging goes offline
FINISH_S = 60.0  # how long the end of a run may wait for the last upload


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
    quiet = ("offline", "dryrun", "disabled")
    return wanted if wanted in quiet or has_login() else "offline"


def run_id(folder: Path) -> str:
    """The id of this folder's run: made once, the same after every resume."""
    path = folder / ID_FILE
    if not path.exists() or not path.read_text().strip():
        path.write_text(f"{uuid.uuid4().hex[:12]}\n")
    return path.read_text().strip()


def _short(error: BaseException) -> str:
    """One line that names the kind of ``error`` and what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


class WandbTracker:
    """Logs to wandb from a background thread.

    ``log`` never waits; ``finish`` waits a limited time.
    """

    def __init__(
        self,
        config: TrackConfig,
        folder: Path | str,
        run_config: Mapping[str, Any],
        warn: Warn = to_stderr,
        finish_s: float = FINISH_S,
    ) -> None:
        """Starts the thread.

        Args:
            config: project, name and mode.
            folder: the run's folder; wandb's own files and the id of the run go there.
            run_config: the settings of the run to show, already without secrets.
            warn: takes the one warning of a failure.
            finish_s: seconds that the end of the run may wait for wandb.
        """
        self._config, self._folder = config, Path(folder).resolve()
        self._run_config, self._warn, self._finish_s = dict(run_config), warn, finish_s
        self._records: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(QUEUE_LENGTH)
        self._dropped = 0
        self._failed = self._finished = False
        self._mode = choose_mode(config.mode)
        if config.mode == "online" and self._mode == "offline":
            warn(
                "track.mode=online, but wandb has no login: logging offline (wandb login mends it)"
            )
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Hands the metrics to the thread; drops them when it cannot keep up."""
        if self._failed or self._finished:
            return
        try:
            self._records.put_nowait((step, plain(values)))
        except queue.Full:
            self._dropped += 1

    def finish(self) -> None:
        """Waits for what is queued: ``finish_s`` seconds to hand it over, as many to upload it."""
        if self._finished:
            return
        self._finished = True
        with contextlib.suppress(queue.Full):
            self._records.put(None, timeout=self._finish_s)
        self._thread.join(self._finish_s)
        if self._thread.is_alive() and not self._failed:
            self._failed = True
            self._warn(f"wandb did not finish within {self._finish_s:.0f} s and was left behind")
        elif self._dropped and not self._failed:  # a failure has had its one warning
            self._warn(f"wandb was too slow: {self._dropped} steps are missing there")

    def _work(self) -> None:
        """The thread: everything that touches wandb, and the only place that does."""
        try:
            run = self._start()
            while (record := self._records.get()) is not None:
                step, values = record
                run.log(values, step=step)
            run.finish()
        except BaseException as error:  # wandb may even raise SystemExit; it must not end training
            if not self._failed:
                self._failed = True
                self._warn(f"wandb failed and is off from here ({_short(error)})")
            with contextlib.suppress(queue.Empty):
                while True:  # make room: nobody may wait for a queue that is not read any more
                    self._records.get_nowait()

    def _start(self) -> Any:
        """Starts the run; offline when the server does not answer, for then nothing is lost."""
        wandb = importlib.import_module("wandb")
        try:
            return self._init(wandb, self._mode)
        except Exception as error:
            if self._mode != "online":
                raise
            self._warn(f"wandb cannot reach its server and logs offline ({_short(error)})")
            wandb.teardown()  # else the id counts as being in use
            return self._init(wandb, "offline")

    def _init(self, wandb: Any, mode: str) -> Any:
        settings = wandb.Settings(
            silent=True,  # its lines would tear the progress bar
            console="off",  # it must not capture our output, where a path might be private
            disable_git=True,  # a remote's address may hold a token
            x_disable_meta=True,  # the command line and the user's name are nobody's business
            disable_code=True,
            save_code=False,
            init_timeout=min(INIT_S, self._finish_s),
            finish_timeout=self._finish_s,
        )
        return wandb.init(
            project=self._config.project,
            name=self._config.name or self._folder.name,
            id=run_id(self._folder),
            resume="allow",
            mode=mode,
            dir=str(self._folder),
            config=self._run_config,
            settings=settings,
        )
