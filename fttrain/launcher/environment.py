"""Environment variables that fttrain sets: one table. Never loads torch.

    variable                      set by        reason
    RANK, LOCAL_RANK, WORLD_SIZE, the launcher  a rank's place among the ranks of the run, as
    LOCAL_WORLD_SIZE                            torchrun and accelerate set it
    MASTER_ADDR, MASTER_PORT      the launcher  the rendezvous of the ranks
    FTTRAIN_LAUNCHER_PID          the launcher  a rank ends with its launcher
    OMP_NUM_THREADS               the launcher  ranks share the machine's cores
    CUDA_VISIBLE_DEVICES          the launcher  gpu_ids of the launch file
    variables of the launch file  the launcher  settings of a rig, such as NCCL's
    WANDB_ERROR_REPORTING=false   each rank     usage reports wait 20 s for a dead server at the end
    WANDB_SILENT=true             each rank     wandb's lines tear the progress bar
    DS_ACCELERATOR                deepspeed     read while DeepSpeed is imported: without it,
                                                DeepSpeed warns of a machine without a GPU, and
                                                takes a GPU that rig.device=cpu leaves alone
    LOCAL_RANK                    deepspeed     DeepSpeed reads it, also where no launcher started
                                                the only rank

What the user has set stays, but for the ranks' places, the rendezvous and DS_ACCELERATOR. A rank
that accelerate or torchrun started has the launcher's variables from there.
"""

import os

PARENT_PID = "FTTRAIN_LAUNCHER_PID"  # the process that started this rank or this trial
LIBRARY_DEFAULTS = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}


def rank_variables(rank: int, processes: int, port: int) -> dict[str, str]:
    """The variables of ``rank``, one of ``processes`` on this machine, for its environment."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        PARENT_PID: str(os.getpid()),
    }


def set_library_variables() -> None:
    """Set the variables of libraries in this process, before the libraries are imported."""
    for name, value in LIBRARY_DEFAULTS.items():
        os.environ.setdefault(name, value)


def set_deepspeed_variables(device_type: str, local_rank: int) -> None:
    """Set DeepSpeed's variables in this process, before DeepSpeed is imported. ``device_type``: of
    the rank's device, cpu | cuda.
    """
    os.environ["DS_ACCELERATOR"] = device_type
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
