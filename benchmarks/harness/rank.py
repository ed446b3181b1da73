"""What one rank of a benchmark does: the steps of its job, against the clock."""

import importlib
import time
from typing import Any

import common


def run_rank(job_file: str) -> None:
    """Do the steps of a job on this rank and report the figures."""
    memory = common.HostMemory()
    job = common.read_job(job_file)
    for name in job.get("imports", ()):
        importlib.import_module(name)
    import torch

    from fttrain.distributed.process_group import process_group
    from fttrain.rig.config import RigConfig
    from fttrain.rig.device_setup import set_up

    device = torch.device("cpu")
    torch.set_num_threads(job["threads"])
    if job["side"] == "fttrain" or job["peer_host_settings"]:
        set_up(RigConfig("cpu", job["threads"]), 0, job["ranks"])
    with process_group(device) as group:
        side = _side(job, group)
        steps = [side.prepare(ranks) for ranks in job["steps"]]
        step_s: list[float] = []
        losses: list[float] = []
        sent = 0.0
        for number, batches in enumerate(steps):
            if number == job["warmup"]:
                memory.restart_peak()
                group.barrier()
                sent = common.sent_bytes()
            group.barrier()
            started = time.perf_counter()
            losses.append(side.step(batches, number))
            step_s.append(time.perf_counter() - started)
        sent = common.sent_bytes() - sent
        timed_s = step_s[job["warmup"] :]
        figures = {
            "step_s": timed_s,
            "losses": losses,
            "sent_bytes_per_step": sent / len(timed_s),
            "peak_host_bytes": memory.peak_bytes(),
            "step_peak_host_bytes": memory.recent_peak_bytes(),
            "interpreter_bytes": memory.interpreter_bytes,
        }
        group.barrier()  # nobody hangs up while another rank still talks
        common.report(job_file, figures)


def _side(job: dict[str, Any], group: Any) -> Any:
    """Who does the work; only its own libraries are imported."""
    if job["side"] == "fttrain":
        from peers.native import Native

        return Native(job, group)
    if job["peer"] == "ddp":
        from peers.ddp import Ddp

        return Ddp(job)
    from peers.fsdp import Fsdp1, Fsdp2

    return {"fsdp1": Fsdp1, "fsdp2": Fsdp2}[job["peer"]](job)
