"""temporary stub"""

from dataclasses import dataclass


@dataclass(frozen=True)
class FrozenConfig:
    cache_dir: str | None = None
    verify_every: int = 50


class FrozenCache: ...


def open_or_build(*a): ...
