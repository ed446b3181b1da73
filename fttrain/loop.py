"""What keeps a training loop safe: settings, a guard against loss spikes, a polite stop."""

import contextlib
import itertools
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Literal, Self

from fttrain.util.errors import UserError

SPIKE_POLICIES = ("stop", "skip", "ignore")


@dataclass(frozen=True)
class LoopConfig:
    """How long to train, in which portions, and when to stop. Shapes of work, not of tensors."""

    max_steps: int | None = None  # optimizer steps at most; None: as many as ``epochs`` gives
    epochs: float = 1.0  # passes over the training rows; fractions are fine
    micro_batch_size: int = 4  # rows of one forward and backward on one rank
    gradient_accumulation_steps: int = 4  # micro-batches of one rank in one optimizer step
    # memory that runs out in a step: True: halve the micro-batches and take it again | False: stop
    halve_on_oom: bool = True
    seed: int = 42  # orders the rows and seeds dropout and the adapter's first weights
    eval_every: int = 0  # steps between held-out evaluations; 0: only before and after
    log_every: int = 1  # steps between lines of metrics
    samples: int = 3  # held-out prompts answered before and after training
    z_loss: float = 0.0  # weight of each token's squared log-sum-exp in what is minimised
    spike_policy: str = "stop"  # stop | skip | ignore: what a loss spike does
    spike_rise: float = 2.0  # nats over the running baseline that count as a spike

    def __post_init__(self) -> None:
        least = {
            "max_steps": 1,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "seed": 0,
            "eval_every": 0,
            "log_every": 1,
            "samples": 0,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"loop.{name}={value}: must be at least {low}")
        for name in ("epochs", "spike_rise"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"loop.{name}={value}: must be a number above 0")
        if not 0 <= self.z_loss < 1:
            raise UserError(f"loop.z_loss={self.z_loss}: a number in [0, 1), such as 1e-4")
        if self.spike_policy not in SPIKE_POLICIES:
            raise UserError(
                f"loop.spike_policy={self.spike_policy}: must be one of {', '.join(SPIKE_POLICIES)}"
            )

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        steps = max(1, round(self.epochs * steps_per_epoch))
        return min(steps, self.max_steps or steps)


@dataclass(frozen=True)
class Verdict:
    """What the guard says about one step, before its update is applied."""

    action: Literal["ok", "skip", "stop"]
    message: str = ""  # one line for the user; empty when there is nothing to say


WARMUP_STEPS = 5  # accepted losses before a rise is judged
SMOOTHING = 0.1  # weight of the newest loss in the running mean: it remembers about 10 steps
WINDOW = 12  # losses looked at for oscillation
SWINGS = 6  # turns within the window that count as oscillation
MAX_SKIPPED = 10  # skipped steps in a row after which skipping plainly does not help
ADVICE = "lower optim.lr (a third is a good next try), or train with quant=fp4"


@dataclass
class SpikeGuard:
    """Watches the loss of each optimizer step (nats per token, the same value on every rank).

    A step is abnormal when its loss or gradient norm is not finite, when the loss lies ``rise``
    nats over the running mean of the accepted losses, when that mean itself has climbed ``rise``
    nats over its lowest value, or when the loss swings to and fro by half of ``rise`` again and
    again. Every rank sees the same reduced numbers, so every rank decides the same without asking
    the others.
    """

    policy: str = "stop"  # stop | skip | ignore
    rise: float = 2.0  # nats
    accepted: int = 0  # losses that made the running mean
    mean: float = 0.0  # running mean of the accepted losses, nats
    lowest: float = math.inf  # lowest running mean after the warm-up, nats
    recent: list[float] = field(default_factory=list)  # the last WINDOW finite losses
    abnormal: int = 0  # abnormal steps in a row

    def observe(self, loss: float, grad_norm: float | None = None) -> Verdict:
        """Judges one step; call it once a step, after the reduction and before the update."""
        reason = self._judge(loss, grad_norm)
        if reason is None:
            self.abnormal = 0
            self._accept(loss)
            return Verdict("ok")
        self.abnormal += 1
        if self.policy == "ignore":
            if math.isfinite(loss):
                self._accept(loss)
            first = self.abnormal == 1
            return Verdict(
                "ok", f"{reason}; going on, as loop.spike_policy=ignore says" if first else ""
            )
        if self.policy == "skip" and self.abnormal < MAX_SKIPPED:
            return Verdict("skip", f"{reason}; this step is skipped (loop.spike_policy=skip)")
        if self.policy == "skip":
            reason = f"{reason}; {MAX_SKIPPED} steps in a row were abnormal, skipping does not help"
        return Verdict(
            "stop",
            f"{reason}. What helps: {ADVICE}; then resume from a checkpoint before the spike",
        )

    def _judge(self, loss: float, grad_norm: float | None) -> str | None:
        """Why this step is abnormal, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm} (loss {loss:.3f})"
        self.recent = [*self.recent, loss][-WINDOW:]
        if self.accepted < WARMUP_STEPS:
            return None
        if loss - self.mean >= self.rise:
            over = loss - self.mean
            return f"the loss rose to {loss:.3f}, {over:.2f} over its running mean {self.mean:.3f}"
        if self.mean - self.lowest >= self.rise:
            return f"the running mean of the loss climbed from {self.lowest:.3f} to {self.mean:.3f}"
        if self._swings() >= SWINGS:
            low, high = min(self.recent), max(self.recent)
            self.recent = []  # the next verdict needs new evidence
            return f"the loss oscillates between {low:.3f} and {high:.3f}"
        return None

    def _accept(self, loss: float) -> None:
        self.accepted += 1
        weight = max(1 / self.accepted, SMOOTHING)  # a plain mean at first, then exponential
        self.mean += weight * (loss - self.mean)
        if self.accepted >= WARMUP_STEPS:
            self.lowest = min(self.lowest, self.mean)

    def _swings(self) -> int:
        """Turns in ``recent`` with a move of half of ``rise`` or more both before and after."""
        moves = [after - before for before, after in itertools.pairwise(self.recent)]
        big = self.rise / 2
        return sum(
            one * two < 0 and abs(one) >= big and abs(two) >= big
            for one, two in itertools.pairwise(moves)
        )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON values (finite numbers, lists)."""
        lowest = self.lowest if math.isfinite(self.lowest) else None
        return {
            "accepted": self.accepted,
            "mean": self.mean,
            "lowest": lowest,
            "recent": list(self.recent),
            "abnormal": self.abnormal,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes what ``state`` gave; policy and rise stay those of the new configuration."""
        self.accepted, self.mean, self.abnormal = (
            state["accepted"],
            state["mean"],
            state["abnormal"],
        )
        self.lowest = math.inf if state["lowest"] is None else state["lowest"]
        self.recent = list(state["recent"])


Handler = Callable[[int, FrameType | None], Any] | int | None


class StopSignals:
    """Turns SIGINT and SIGTERM into a wish that the loop reads between steps.

    Nothing is ever interrupted: no exception is raised, so neither the first nor any later signal
    can break a save. Enter it in the main thread. ``signum`` is the first signal received, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Handler] = {}

    @property
    def requested(self) -> bool:
        """True once a signal has come."""
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, 0 when no signal came."""
        return 0 if self.signum is None else 128 + self.signum

    def __enter__(self) -> Self:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        again = self.signum is not None
        self.signum = self.signum or signum
        if os.environ.get("RANK", "0") != "0":
            return  # rank 0 speaks for all
        name = signal.Signals(signum).name
        pid = os.getpid()
        text = (
            f"\n{name} again: still finishing and saving; kill -9 {pid} ends it without saving\n"
            if again
            else f"\n{name}: finishing this step, saving, then stopping\n"
        )
        with contextlib.suppress(OSError):  # the terminal may be gone: nobody left to tell
            os.write(2, text.encode())  # print() is not safe inside a signal handler
