"""The rig of a plan: measured on this machine, shipped by name, or a file."""

from pathlib import Path

from fttrain.rig.machine import identity
from fttrain.rig.profile import RigProfile, load_profile, measured_profile_path
from fttrain.rig.profile_drift import changes, is_here
from fttrain.util.errors import UserError
from fttrain.util.paths import conf_folder
from fttrain.util.schema import nearest
from fttrain.util.warn import Warn, warn

MEASURED = "measured"


def find_rig(
    profile: str,
    cache_dir: str | None = None,
    ranks: int | None = None,
    warn: Warn = warn,
) -> RigProfile:
    """The profile that ``rig.profile`` names.

    Args:
        cache_dir: as frozen.cache_dir. ranks: the ranks of the run: chooses among the profiles
        measured here; None: the profile with
            the most ranks.
        warn: called with a line for each reason for which the figures may not be this machine's.

    Raises UserError where there is none, and where ``measured`` is of another machine.
    """
    if profile == MEASURED:
        return _measured(cache_dir, ranks, warn)
    if profile in shipped():
        return load_profile(_folder() / f"{profile}.json")
    path = Path(profile).expanduser()
    if path.suffix == ".json" or path.exists():
        rig = load_profile(path)
        _flag(rig, warn)
        return rig
    suggestion = nearest(profile, shipped())
    advice = f"did you mean {suggestion}? " if suggestion else ""
    raise UserError(
        f"rig.profile={profile}: no such rig; {advice}There are: {MEASURED}, "
        f"{', '.join(shipped())}, or the path of a profile"
    )


def shipped() -> list[str]:
    """Names of the profiles in ``conf/rig/profiles/``."""
    return sorted(path.stem for path in _folder().glob("*.json"))


def _measured(cache_dir: str | None, ranks: int | None, warn: Warn) -> RigProfile:
    path = measured_profile_path(cache_dir, ranks)
    if path is None:
        raise UserError(
            f"rig.profile={MEASURED}: this machine has not been measured; `fttrain measure` does "
            f"it, or take one of {', '.join(shipped())}"
        )
    rig = load_profile(path)
    if rig.measured is not None and not is_here(rig):
        raise UserError(
            f"rig.profile={MEASURED}: {path} is of machine {rig.measured.machine} "
            f"({rig.name}, {rig.measured.date}), this is {identity()}; `fttrain measure` "
            f"measures it, or rig.profile={path} plans for the other one"
        )
    _flag(rig, warn)
    if ranks not in (None, len(rig.cards)):
        warn(
            f"rig {rig.name} was measured with {len(rig.cards)} ranks, launch= has {ranks}: "
            "`fttrain measure` with the same launch= measures theirs"
        )
    return rig


def _flag(rig: RigProfile, warn: Warn) -> None:
    """Warn of each reason to doubt the figures of ``rig``."""
    if rig.measured is None:
        return
    if not is_here(rig):
        warn(f"rig {rig.name}: measured on another machine, {rig.measured.date}")
        return
    for line in changes(rig):
        warn(f"rig {rig.name}: {line}; `fttrain measure` measures it anew")


def _folder() -> Path:
    return conf_folder() / "rig" / "profiles"
