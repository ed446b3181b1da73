"""The settings of the machine."""

from dataclasses import dataclass

from fttrain.util.errors import UserError

BACKENDS = ("auto", "nccl", "gloo")


@dataclass(frozen=True)
class RigConfig:
    """The device, threads and backend of a rank, and the profile for plans."""

    device: str = "auto"  # auto (a GPU a rank if there is one) | cpu | cuda
    threads: int | None = None  # CPU threads of a rank; None: cores / ranks of this machine
    # backend of collectives: auto (nccl between GPUs, gloo between CPUs) | nccl | gloo (also
    # between GPUs, through host memory; ranks may share a GPU)
    backend: str = "auto"
    link_s: float = 60.0  # seconds in which `fttrain measure` tries sizes over each transport
    # the profile that `fttrain plan` uses: measured (by `fttrain measure`, on this machine) | a
    # name in conf/rig/profiles/ | path of a profile
    profile: str = "measured"

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"rig.device={self.device}: auto, cpu or cuda")
        if self.backend not in BACKENDS:
            raise UserError(f"rig.backend={self.backend}: {', '.join(BACKENDS)}")
        if (self.device, self.backend) == ("cpu", "nccl"):
            raise UserError("rig.backend=nccl: it needs a GPU; rig.device=cpu goes with gloo")
        if not self.profile:
            raise UserError("rig.profile is empty: measured, the name of a rig, or a path")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"rig.threads={self.threads}: a whole number of 1 or more, or null")
        if not 0 <= self.link_s < float("inf"):
            raise UserError(f"rig.link_s={self.link_s}: a number of 0 or more seconds")
