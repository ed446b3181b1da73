"""Stands in for ``python -m fttrain`` where a test is about the sweep around it: the same files,
exit codes and words, without the seconds that a model takes.

While the file ``broken`` lies in the sweep's folder, loop.seed=13 fails and loop.seed=14 is killed.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from fttrain.launcher.launch import die_with_parent

die_with_parent()
settings = dict(text.split("=", 1) for text in sys.argv[2:])
output = Path(settings["output"].strip("'"))
lr, seed = float(settings.get("optim.lr", "1e-4")), settings.get("loop.seed", "42")
steps, every = int(settings["loop.max_steps"]), int(settings.get("loop.eval_every", "0"))
got: list[int] = []
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, lambda signum, frame: got.append(signum))
(output / "told.json").write_text(json.dumps(sys.argv[2:]))
with (output / "starts").open("a") as file:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    file.write(f"{os.getpid()} {cores} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}\n")
print(f"{steps} steps of 4 rows of up to 96 tokens -> {output}", flush=True)
if (output.parent / "broken").exists():
    if seed == "13":
        print("fttrain: error: the loss ran away", flush=True)
        sys.exit(3)
    if seed == "14":
        os.kill(os.getpid(), signal.SIGKILL)
metrics = output / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0


def nll(step: int) -> float:
    """Falls towards how far the learning rate is from 1e-3, in decades."""
    return 2 + abs(math.log10(lr) + 3) + 1 / (1 + step)


for step in range(done + 1, steps + 1):
    time.sleep(float(settings.get("loop.epochs", "0.02")))  # of a step
    line = {"step": step, "loss": nll(step), "step_s": 0.02, "tokens_per_s": 100.0 + step}
    if every and step % every == 0:
        line["holdout_nll"] = nll(step)
    with metrics.open("a") as file:
        file.write(json.dumps(line) + "\n")
    if got:
        sys.exit(128 + got[0])
(output / "evaluation.json").write_text(json.dumps({"tuned": {"nll": nll(steps), "tokens": 9}}))
