"""What ``fttrain measure`` and ``fttrain plan`` say of the ranks that a benchmark compares."""

import os
import sys
from pathlib import Path
from typing import Any

import common

from fttrain.launcher.launch import PARENT_PID, free_port, supervise
from fttrain.rig.profile import RigProfile, load_profile


def measured(link: common.Link, folder: Path, settings: list[str], threads: int) -> RigProfile:
    """The profile of two ranks on CPUs over ``link``; what is written goes into ``folder``."""
    variables = os.environ | {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": link.address,
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": link.interface,
        "OMP_NUM_THREADS": str(threads),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # as common.run_ranks
        PARENT_PID: str(os.getpid()),
    }
    output = folder / "measured"
    settings = [*settings, "rig.device=cpu", f"frozen.cache_dir={folder}", f"output={output}"]
    command = [sys.executable, "-m", "fttrain", "measure", *settings]
    code = supervise(
        [
            ([*link.command(r), *command], variables | {"RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(2)
        ]
    )
    if code:
        raise SystemExit(code)
    return load_profile(output / "profile.json")


def model_settings(job: dict[str, Any]) -> list[str]:
    """What makes ``fttrain measure`` measure at the sizes of ``job``'s work."""
    return [
        "model=local",
        f"model.path={job['model']}",
        f"data.seq_len={job['seq_len']}",
        f"lora.r={job['lora']['r']}",
        f"loop.micro_batch_size={job['micro_batch_size']}",
        f"loop.gradient_accumulation_steps={job['gradient_accumulation_steps']}",
    ]


def planned(job: dict[str, Any], rig: RigProfile) -> Any:
    """The planner's ``Verdict`` of ``job``, which is one of fttrain's own sides."""
    from peers.native import trial_spec

    from fttrain.frozen.config import ModelConfig
    from fttrain.frozen.source import load_config, resolve
    from fttrain.model.decoder import Architecture
    from fttrain.plan.choose import judge

    model = load_config(resolve(ModelConfig("benchmark", job["model"])))
    return judge(trial_spec(job), Architecture(model), rig)
