"""The rig that is planned for: measured on this machine, shipped by name, or a file."""

from pathlib import Path

from fttrain.errors import UserError
from fttrain.paths import conf_folder
from fttrain.rig.profile import RigProfile, load_profile, profile_path
from fttrain.schema import nearest

MEASURED = "measured"


def find_rig(profile: str, cache_dir: str | None = None) -> RigProfile:
    """What ``rig.profile`` names. ``cache_dir``: as frozen.cache_dir.

    Raises UserError where there is none.
    """
    if profile == MEASURED:
        path = profile_path(cache_dir)
        if not path.is_file():
            raise UserError(
                f"rig.profile={MEASURED}: {path} is not there; `fttrain measure` makes it, or take "
                f"one of {', '.join(shipped())}"
            )
        return load_profile(path)
    if profile in shipped():
        return load_profile(_folder() / f"{profile}.json")
    path = Path(profile).expanduser()
    if path.suffix == ".json" or path.exists():
        return load_profile(path)
    near = nearest(profile, shipped())
    advice = f"did you mean {near}? " if near else ""
    raise UserError(
        f"rig.profile={profile}: no such rig; {advice}There are: {MEASURED}, "
        f"{', '.join(shipped())}, or the path of a profile"
    )


def shipped() -> list[str]:
    """Names of the profiles in ``conf/rig/profiles/``."""
    return sorted(path.stem for path in _folder().glob("*.json"))


def _folder() -> Path:
    return conf_folder() / "rig" / "profiles"
