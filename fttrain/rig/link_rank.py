"""One rank of a transport, in a process that ``transports.py`` starts."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import psutil
import torch

from fttrain.distributed.process_group import process_group
from fttrain.distributed.rank_group import RankGroup
from fttrain.launcher.launch import die_with_parent
from fttrain.rig.card import beside_allocator_bytes
from fttrain.rig.config import RigConfig
from fttrain.rig.device_setup import set_up_rank
from fttrain.rig.link import WrongResult, gradients_s, measure_link
from fttrain.rig.topology import nvlink_bytes
from fttrain.rig.transports import LinkJob
from fttrain.track import counting
from fttrain.util.errors import UserError


def main(argument: str, load_run: Callable[[], object]) -> int:
    """Do the job and write the result; return the exit code of the process.

    argument: a ``LinkJob`` as JSON. load_run: imports what the process of a run imports.
    """
    die_with_parent()
    job = LinkJob(**json.loads(argument))
    try:
        device = set_up_rank(RigConfig(job.device, job.threads, job.backend))
        with process_group(device, job.backend) as group:
            result = _measure(job, group, load_run)
    except UserError as error:
        print(f"fttrain: error: {error}", file=sys.stderr)
        return error.exit_code
    Path(job.result_file).write_text(json.dumps(result))
    return 0


def _measure(job: LinkJob, group: RankGroup, load_run: Callable[[], object]) -> dict[str, Any]:
    result: dict[str, Any] = {"wrong": "", "samples": {}, "gradients_s": None}
    group.barrier()  # creates the communicator
    result["overhead_bytes"] = _overhead_bytes(job, group.device, load_run)
    group.barrier()  # no rank makes a tensor before all have measured
    nvlink_before, started = nvlink_bytes(group.device), time.monotonic()
    show = counting(job.label) if group.is_main else lambda done, total: None
    try:
        by_collective = measure_link(group, job.true_bytes, job.most_bytes, job.budget_s, show)
        if "all_reduce" in job.true_bytes:
            gradient_bytes = job.true_bytes["all_reduce"]
            result["gradients_s"] = gradients_s(group, job.layers, gradient_bytes)
    except WrongResult as error:
        result["wrong"] = str(error)
        return result
    result["samples"] = {
        name: [list(astuple(sample)) for sample in samples]
        for name, samples in by_collective.items()
    }
    nvlink_after, seconds = nvlink_bytes(group.device), time.monotonic() - started
    if nvlink_before is not None and nvlink_after is not None:
        result["nvlink_bytes_per_s"] = (nvlink_after - nvlink_before) / seconds
    if group.device.type == "cuda":  # NCCL connects for each collective at its first use
        group.barrier()
        result["overhead_bytes"] = _overhead_bytes(job, group.device, load_run)
        group.barrier()
    return result


def _overhead_bytes(job: LinkJob, device: torch.device, load_run: Callable[[], object]) -> int:
    """Bytes of this process on the card outside torch's allocator; on the CPU the resident bytes of
    the process with everything that a run imports.
    """
    if device.type != "cuda":
        load_run()
        return psutil.Process().memory_info().rss
    return beside_allocator_bytes(device, job.taken_bytes)
