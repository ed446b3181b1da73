"""Where the numbers of a run go."""

from dataclasses import dataclass

from fttrain.errors import UserError

KINDS = ("none", "wandb")
MODES = ("auto", "online", "offline")


@dataclass(frozen=True)
class TrackConfig:
    """An experiment tracker beside metrics.jsonl, which is always written."""

    kind: str = "none"  # none | wandb
    project: str = "fttrain"  # project of the tracker
    name: str | None = None  # name of the run there; None: the name of the output folder
    mode: str = "auto"  # auto | online | offline; auto: online when there is a login, else offline

    def __post_init__(self) -> None:
        for key, allowed in (("kind", KINDS), ("mode", MODES)):
            if getattr(self, key) not in allowed:
                raise UserError(
                    f"track.{key}={getattr(self, key)}: must be one of {', '.join(allowed)}"
                )
        if not self.project:
            raise UserError("track.project is empty: give the name of a project")
