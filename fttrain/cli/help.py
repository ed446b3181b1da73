"""What ``fttrain COMMAND --help`` prints: the groups, their options, their keys with the comments
of ``conf/``.
"""

import yaml

from fttrain.paths import conf_folder


def settings() -> str:
    """Every group with its options, and the file of the default one as it stands."""
    root = (conf_folder() / "config.yaml").read_text(encoding="utf-8")
    defaults = [item for item in yaml.safe_load(root)["defaults"] if isinstance(item, dict)]
    pages = ["settings without a group:\n" + _indent(root.split("\n\n", 1)[1])]
    for item in defaults:
        (group, chosen), *_ = item.items()
        options = sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))
        head = f"{group}={'|'.join(options)}  (default: {chosen or 'none'})"
        body = _keys(group, chosen) if chosen else "  a recipe that changes several groups at once"
        pages.append(f"{head}\n{body}")
    return "\n\n".join(pages)


def _keys(group: str, option: str) -> str:
    text = (conf_folder() / group / f"{option}.yaml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return _indent("\n".join(f"{group}.{line}" for line in lines))


def _indent(text: str) -> str:
    return "\n".join(f"  {line.replace(': ', '=', 1)}" for line in text.splitlines() if line)
