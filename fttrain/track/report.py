"""report.md of a run: settings, speed, losses, memory, answers and a verdict. A run need not be
over.

metrics.jsonl     one line a step: loss, tokens (of this step, all ranks), tokens_per_s, step_s,
                  peak_device_bytes, peak_host_bytes; holdout_nll of a step with a held-out loss
memory.jsonl,     see track/memory.py
memory.json
evaluation.json   {"base": {"nll", "tokens"}, "tuned": {"nll", "tokens"},
                   "history": [{"step", "nll"}], "samples": [{"prompt", "reference", "before",
                   "after"}]}; nll in nats per token
config.yaml       names of model and data
plan.json         see track/plan.py
"""

import re
import statistics
from pathlib import Path
from typing import Any

import yaml

from fttrain.track.cards import cards_section
from fttrain.track.memory import memory_section, read_samples
from fttrain.track.metrics import read_metrics
from fttrain.track.plan import plan_section
from fttrain.track.plots import plot_loss, plot_memory, plot_rate
from fttrain.track.results import held_out, holdout_nll, read_evaluation, series
from fttrain.util.atomic_files import write_text
from fttrain.util.errors import UserError
from fttrain.util.units import duration, gib

REAL_FALL = 0.5  # nats per token that count as a real improvement
LOSS_PLOT, RATE_PLOT, MEMORY_PLOT = "loss.png", "throughput.png", "memory.png"


def verdict(base_nll: float, tuned_nll: float) -> str:
    """The verdict on the change of the held-out loss (nats per token), in one line."""
    fall = base_nll - tuned_nll
    change = f"held-out loss {base_nll:.4f} -> {tuned_nll:.4f} nats/token"
    if not abs(fall) < float("inf"):
        return f"no verdict: {change} is not a number"
    if fall >= REAL_FALL:
        return f"a real improvement: {change}, a fall of {fall:.4f} (0.5 or more counts as real)"
    if fall > 0:
        return f"a small improvement: {change}, a fall of {fall:.4f} (0.5 would count as real)"
    return f"no improvement: {change}, a rise of {-fall:.4f}"


def write_report(folder: Path | str) -> Path:
    """Write report.md and its plots into the run's folder and return the path of report.md.

    Raises:
        UserError: there is no run in ``folder``.
    """
    folder = Path(folder)
    lines = read_metrics(folder / "metrics.jsonl")
    evaluation = read_evaluation(folder / "evaluation.json")
    if not lines and not evaluation:
        raise UserError(f"output={folder}: no metrics.jsonl with steps here: nothing to report")
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    parts = [f"# {folder.resolve().name}", _status(folder, lines, evaluation)]
    parts.append(_table(_summary(folder, lines, evaluation)))
    planned = plan_section(folder, lines)
    if planned is not None:
        parts.append(planned)
    losses, rates = series(lines, "loss"), series(lines, "tokens_per_s")
    heldout = held_out(lines, evaluation)
    if losses or heldout:
        plot_loss(plots / LOSS_PLOT, losses, heldout)
        parts.append(f"## Loss\n\n![loss](plots/{LOSS_PLOT})")
    if rates:
        plot_rate(plots / RATE_PLOT, rates)
        parts.append(f"## Throughput\n\n![tokens per second](plots/{RATE_PLOT})")
    samples = read_samples(folder / "memory.jsonl")
    if samples:
        plot_memory(plots / MEMORY_PLOT, samples)
        parts.append(f"## Memory over the steps\n\n![memory](plots/{MEMORY_PLOT})")
    parts += cards_section(folder / "memory.jsonl", plots)
    memory = memory_section(folder / "memory.json")
    if memory is not None:
        parts.append(memory)
    answers = evaluation.get("samples") or []
    if answers:
        parts.append("## Answers before and after\n\n" + "\n\n".join(map(_sample, answers)))
    path = folder / "report.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def _read_config(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _status(folder: Path, lines: list[dict[str, Any]], evaluation: dict[str, Any]) -> str:
    both = [holdout_nll(evaluation, name) for name in ("base", "tuned")]
    if both[0] is not None and both[1] is not None:
        return f"Verdict: {verdict(both[0], both[1])}."
    last = lines[-1]["step"] if lines else 0
    return f"Not finished: the last step so far is {last}; there is no verdict yet."


MOVED = {  # metric -> label of its row; median over the steps
    "gather_bytes": "frozen base gathered from other ranks, a step of all ranks",
    "h2d_bytes": "frozen base copied from host memory, a step of all ranks",
    "activation_bytes": "activations back from host memory, a step of all ranks",
    "optim_bytes": "gradients to and weights from host memory, a step of all ranks",
    "stage_bytes": "sent to other stages, a step of all ranks",
    "sync_bytes": "adapter gradients summed over ranks, a step",
}


def _moved(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Rows of the bytes moved and of the time that compute waited for them; without any, none."""
    rows = []
    for key, label in MOVED.items():
        values = [value for _, value in series(lines, key)]
        if any(values):
            rows.append((label, f"{statistics.median(values) / 1e6:,.1f} MB"))
    waits = [value for _, value in series(lines, "wait_s")]
    if any(waits):
        rows.append(
            (
                "waited for layers or stages, a step of the rank that waited most",
                f"{statistics.median(waits):.3f} s",
            )
        )
    return rows


def _summary(
    folder: Path, lines: list[dict[str, Any]], evaluation: dict[str, Any]
) -> list[tuple[str, str]]:
    """Rows of the summary table; unknown figures are left out."""
    config = _read_config(folder / "config.yaml")
    rates = [rate for _, rate in series(lines, "tokens_per_s")]
    steps = [value for _, value in series(lines, "step_s")]
    rows = [("model", _named(config, "model", "name")), ("data", _named(config, "data", "kind"))]
    if lines:
        rows.append(("steps", str(lines[-1]["step"])))
        rows.append(("tokens", f"{sum(value for _, value in series(lines, 'tokens')):,.0f}"))
    if rates:
        rows.append(("tokens/s, median", f"{statistics.median(rates):,.0f}"))
    for key, label in (
        ("peak_device_bytes", "peak device memory of a rank"),
        ("peak_host_bytes", "peak host memory of a rank"),
    ):
        peak = max((value for _, value in series(lines, key)), default=0)
        if peak:
            rows.append((label, gib(peak)))
    rows += _moved(lines)
    if steps:
        rows.append(("time in steps", duration(sum(steps))))
    losses = series(lines, "loss")
    if losses:
        rows.append(("training loss, first and last", f"{losses[0][1]:.4f}, {losses[-1][1]:.4f}"))
    bad = sum(1 for line in lines if "loss" in line and line["loss"] is None)
    if bad:
        rows.append(("steps whose loss is no number", str(bad)))
    for name in ("base", "tuned"):
        nll = holdout_nll(evaluation, name)
        if nll is not None:
            rows.append((f"held-out loss, {name} model", f"{nll:.4f} nats/token"))
    return [(label, text) for label, text in rows if text]


def _named(config: dict[str, Any], group: str, key: str) -> str:
    """``name (path)`` of a group of config.yaml; '' where it is unknown."""
    settings = config.get(group)
    if not isinstance(settings, dict):
        return ""
    name, path = settings.get(key), settings.get("path")
    return f"{name} ({path})" if name and path else str(name or path or "")


def _table(rows: list[tuple[str, str]]) -> str:
    cells = [f"| {label} | {text.replace('|', chr(92) + '|')} |" for label, text in rows]
    return "\n".join(["| | |", "|---|---|", *cells])


def _sample(sample: dict[str, str]) -> str:
    """One prompt and its answers, fenced so that their text cannot break the page."""
    parts = []
    for key in ("prompt", "reference", "before", "after"):
        text = str(sample.get(key) or "")
        longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
        fence = "`" * max(3, longest + 1)
        parts.append(f"**{key}**\n\n{fence}text\n{text}\n{fence}")
    return "\n\n".join(parts)
