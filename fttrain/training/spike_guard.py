"""The guard against loss spikes, which judges each step before its update."""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class StepVerdict:
    """The guard's judgement of a step, before its update is applied."""

    action: Literal["ok", "skip", "stop"]
    message: str = ""  # one line for the user; empty when there is nothing to say


WARMUP_STEPS = 5  # accepted losses before a rise is judged
SMOOTHING = 0.1  # weight of the newest loss in the running mean: it remembers about 10 steps
WINDOW = 12  # losses looked at for oscillation
SWINGS = 6  # turns within the window that count as oscillation
MAX_SKIPPED = 10  # steps in a row; more of them would not help either
ADVICE = "lower optim.lr (a third is a good next try), or train with quant=fp4"


@dataclass
class SpikeGuard:
    """The watch over the loss of each optimizer step (nats per token, the same on every rank).

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

    def observe(self, loss: float, grad_norm: float | None = None) -> StepVerdict:
        """Judge a step. Call it once a step, after the reduction and before the update."""
        reason = self._judge(loss, grad_norm)
        if reason is None:
            self.abnormal = 0
            self._accept(loss)
            return StepVerdict("ok")
        self.abnormal += 1
        if self.policy == "ignore":
            if math.isfinite(loss):
                self._accept(loss)
            first = self.abnormal == 1
            return StepVerdict(
                "ok", f"{reason}; going on, as loop.spike_policy=ignore says" if first else ""
            )
        if self.policy == "skip" and self.abnormal < MAX_SKIPPED:
            return StepVerdict("skip", f"{reason}; this step is skipped (loop.spike_policy=skip)")
        if self.policy == "skip":
            reason = f"{reason}; {MAX_SKIPPED} steps in a row were abnormal, skipping does not help"
        return StepVerdict(
            "stop",
            f"{reason}. What helps: {ADVICE}; then resume from a checkpoint before the spike",
        )

    def _judge(self, loss: float, grad_norm: float | None) -> str | None:
        """The reason why this step is abnormal; None where it is not."""
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
        """Turns in ``recent`` with moves of at least half of ``rise`` on both sides."""
        moves = [later - earlier for earlier, later in itertools.pairwise(self.recent)]
        big = self.rise / 2
        return sum(
            before * after < 0 and abs(before) >= big and abs(after) >= big
            for before, after in itertools.pairwise(moves)
        )

    def state(self) -> dict[str, Any]:
        """The state that a resumed run needs, as JSON values (finite numbers, lists)."""
        lowest = self.lowest if math.isfinite(self.lowest) else None
        return {
            "accepted": self.accepted,
            "mean": self.mean,
            "lowest": lowest,
            "recent": list(self.recent),
            "abnormal": self.abnormal,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a ``state``; policy and rise stay those of the new configuration."""
        self.accepted, self.mean, self.abnormal = (
            state["accepted"],
            state["mean"],
            state["abnormal"],
        )
        self.lowest = math.inf if state["lowest"] is None else state["lowest"]
        self.recent = list(state["recent"])
