"""The folders that ship beside the code: ``conf/`` and ``launch/``."""

from pathlib import Path

from fttrain.util.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]


def conf_folder() -> Path:
    """The folder of the configuration groups."""
    return _find("conf", "config.yaml")


def launch_folder() -> Path:
    """The folder of the launch files."""
    return _find("launch", "cpu_demo.yaml")


def _find(name: str, witness: str) -> Path:
    """The folder ``name`` with the file ``witness``."""
    # A checkout has the folder beside the package, a wheel inside it.
    for folder in (_PACKAGE.parent / name, _PACKAGE / "_files" / name):
        if (folder / witness).is_file() and (folder.parent.name == "_files" or _is_checkout()):
            return folder
    raise UserError(f"{name}/{witness} was not found beside {_PACKAGE}: reinstall fttrain")


def _is_checkout() -> bool:
    # In site-packages, conf/ beside the package would be that of some other project.
    return (_PACKAGE.parent / "pyproject.toml").is_file()
