"""The rig that is planned for: measured on this machine, shipped by name, or a file."""

from pathlib import Path

from fttrain.rig.machine import identity
from fttrain.rig.profile import RigProfile, kept_profile, load_profile
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
    """What ``rig.profile`` names.

    Args:
        cache_dir: as frozen.cache_dir.
        ranks: that will train: of profiles that were measured here, theirs is taken; None: that of
            the most.
        warn: takes a line for each thing for which the figures may not be this machine's.

    Raises UserError where there is none, and where ``measured`` would be another machine's.
    """
    if profile == MEASURED:
        return _measured(cache_dir, ranks, warn)
    if profile in shipped():
        return load_profile(_folder() / f"{profile}.json")
    path = Path(profile).expanduser()
    if path.suffix == ".json" or path.exists():
        found = load_profile(path)
        _flag(found, warn)
        return found
    near = nearest(profile, shipped())
    advice = f"did you mean {near}? " if near else ""
    raise UserError(
        f"rig.profile={profile}: no such rig; {advice}There are: {MEASURED}, "
        f"{', '.join(shipped())}, or the path of a profile"
    )


def shipped() -> list[str]:
    """Names of the profiles in ``conf/rig/profiles/``."""
    return sorted(path.stem for path in _folder().glob("*.json"))


def _measured(cache_dir: str | None, ranks: int | None, warn: Warn) -> RigProfile:
    path = kept_profile(cache_dir, ranks)
    if path is None:
        raise UserError(
            f"rig.profile={MEASURED}: this machine has not been measured; `fttrain measure` does "
            f"it, or take one of {', '.join(shipped())}"
        )
    found = load_profile(path)
    if found.measured is not None and not is_here(found):
        raise UserError(
            f"rig.profile={MEASURED}: {path} is of machine {found.measured.machine} "
            f"({found.name}, {found.measured.date}), this is {identity()}; `fttrain measure` "
            f"measures it, or rig.profile={path} plans for the other one"
        )
    _flag(found, warn)
    if ranks not in (None, len(found.cards)):
        warn(
            f"rig {found.name} was measured with {len(found.cards)} ranks, launch= has {ranks}: "
            "`fttrain measure` with the same launch= measures theirs"
        )
    return found


def _flag(rig: RigProfile, warn: Warn) -> None:
    """Say what makes its figures doubtful."""
    if rig.measured is None:
        return
    if not is_here(rig):
        warn(f"rig {rig.name}: measured on another machine, {rig.measured.date}")
        return
    for line in changes(rig):
        warn(f"rig {rig.name}: {line}; `fttrain measure` measures it anew")


def _folder() -> Path:
    return conf_folder() / "rig" / "profiles"
