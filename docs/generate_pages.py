"""The pages of the documentation site that are made from other files, at build time.

mkdocs calls ``on_files`` and ``on_page_markdown`` (``hooks`` in mkdocs.yml). By hand,
``python docs/generate_pages.py`` prints the page of all settings.

Generated: settings.md from conf/ and launch/, benchmarks/ from the Markdown and JSON there,
contributing.md and changelog.md from the files at the root.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CONF, LAUNCH = ROOT / "conf", ROOT / "launch"
COPIED = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# A comment that says no more than that the key belongs to another option of the group
ELSEWHERE = ("of strategy=", "unused", "always: there are no groups")
GIB = 2**30

INTRODUCTION = """\
# Every setting

This page is made from `conf/` each time the site is built. On the command line

```
fttrain train GROUP=OPTION GROUP.KEY=VALUE KEY=VALUE
```

chooses an option of a group, changes a key of a group, and changes a key without a group.
`fttrain train --help` prints the same list. A key that does not exist is refused, with the nearest
one that does. Values are those of YAML; a list is written `'lora.target_modules=[q_proj,v_proj]'`,
in quotes for the shell.
"""
ENVIRONMENT = """\
## Environment variables

| variable | meaning |
|---|---|
| `HF_TOKEN` | login of the model hub, for gated models |
| `WANDB_API_KEY` | login of Weights & Biases; `wandb login` does the same |
| `XDG_CACHE_HOME` | parent of the cache folder; `~/.cache` without it |
| `FTTRAIN_DEBUG=1` | errors keep their traceback |
"""


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site (a hook of mkdocs)."""
    from mkdocs.structure.files import File

    for name, content in pages().items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links that leave docs/ at the pages of the site (a hook of mkdocs)."""
    depth = page.file.src_uri.count("/")
    up = "../" * depth
    for name, target in COPIED.items():
        markdown = markdown.replace(f"]({up}../{name})", f"]({up}{target})")
    markdown = markdown.replace(f"]({up}../benchmarks/README.md", f"]({up}benchmarks/README.md")
    return markdown.replace(f"]({up}../benchmarks/results/", f"]({up}benchmarks/results/")


def pages() -> dict[str, str]:
    """The name of each generated file of the site, and its content."""
    generated = {"settings.md": settings()}
    for name, target in COPIED.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        generated[target] = re.sub(r"\]\(docs/", "](", text)
    benchmarks = ROOT / "benchmarks"
    for file in (benchmarks / "README.md", *sorted((benchmarks / "results").glob("*.*"))):
        target = file.relative_to(ROOT).as_posix()
        generated[target] = file.read_text(encoding="utf-8")
    return generated


def settings() -> str:
    """The page of all settings, as Markdown."""
    root = (CONF / "config.yaml").read_text(encoding="utf-8")
    groups = [item for item in yaml.safe_load(root)["defaults"] if isinstance(item, dict)]
    parts = [INTRODUCTION, "## Without a group", _table(root.split("\n\n", 1)[1], "")]
    for item in groups:
        (group, default), *_ = item.items()
        parts.append(f"## {group}")
        parts += _group(group, default)
    return "\n\n".join([*parts, _launch_files(), _rigs(), ENVIRONMENT])


def _group(group: str, default: str | None) -> Iterator[str]:
    """The tables of a group: options, keys of the default one, changes of the others."""
    texts = {
        file.stem: file.read_text(encoding="utf-8")
        for file in sorted((CONF / group).glob("*.yaml"))
    }
    rows = []
    for option, text in texts.items():
        mark = " (the default)" if option == default else ""
        rows.append(f"| `{group}={option}`{mark} | {_cell(_description(text))} |")
    yield "| option | what it is |\n|---|---|\n" + "\n".join(rows)
    if default is None or any("@package _global_" in text for text in texts.values()):
        yield from _recipes(group, texts, default)
        return
    yield _table(texts[default], f"{group}.")
    main, different = dict(_keys(texts[default])), []
    for option, text in texts.items():
        for key, (value, comment) in _keys(text):
            named = key in ("name", "kind") and value == option  # says no more than the option does
            if named or (value, comment) == main.get(key) or comment.startswith(ELSEWHERE):
                continue
            meaning = "" if key in main and comment == main[key][1] else _cell(comment)
            different.append(f"| `{group}={option}` | `{group}.{key}` | `{value}` | {meaning} |")
    if different:
        yield "What other options change:"
        yield (
            "| option | key | value | meaning, where it differs |\n|---|---|---|---|\n"
            + "\n".join(different)
        )


def _recipes(group: str, texts: dict[str, str], default: str | None) -> Iterator[str]:
    """Options that change settings of several groups, each as its file."""
    if default is not None:
        yield _table(texts[default], f"{group}.")
    for option, text in texts.items():
        if option != default:
            body = "\n".join(line for line in text.splitlines() if line and line[0] != "#")
            yield f"`{group}={option}`:"
            yield f"```yaml\n{body}\n```"


def _table(text: str, prefix: str) -> str:
    return _rows(list(_keys(text)), prefix)


def _rows(keys: list[tuple[str, tuple[str, str]]], prefix: str) -> str:
    rows = [
        f"| `{prefix}{key}` | `{value or ' '}` | {_cell(comment)} |"
        for key, (value, comment) in keys
    ]
    return "| key | default | meaning |\n|---|---|---|\n" + "\n".join(rows)


def _keys(text: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """(key, (value, comment)) of an option file's lines; keys of a nested group by their path."""
    parent = ""
    for line in re.sub(r"^defaults:\n(?:  .*\n)+", "", text, flags=re.MULTILINE).splitlines():
        match = re.match(r"( *)([A-Za-z_0-9]+):(?: +([^#]*?))?(?: *# ?(.*))?$", line)
        if match is None or line.startswith("#"):
            continue
        indent, key, value, comment = match.groups()
        if not indent:
            parent = "" if value else f"{key}."
        if value:
            yield (f"{parent}{key}" if indent else key), (value, comment or "")


def _description(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("# ") and "@package" not in line]
    return lines[0].removeprefix("# ")


def _launch_files() -> str:
    """The variables of launch/*.env, each with its reason and the files that set it."""
    files: dict[tuple[str, str], list[str]] = {}
    for file in sorted(LAUNCH.glob("*.env")):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                variable, _, reason = line.partition("#")
                files.setdefault((variable.strip(), reason.strip()), []).append(file.stem)
    rows = [
        f"| `{variable}` | {', '.join(f'`{name}`' for name in names)} | {_cell(reason)} |"
        for (variable, reason), names in files.items()
    ]
    head = "`launch=NAME` sets the variables of `launch/NAME.env`, unless the shell has set them."
    table = "| variable | launch= | reason |\n|---|---|---|\n" + "\n".join(rows)
    return f"## Environment of launch files\n\n{head}\n\n{table}"


def _rigs() -> str:
    rows = []
    for file in sorted((CONF / "rig" / "profiles").glob("*.json")):
        cards = json.loads(file.read_text(encoding="utf-8"))["cards"]
        memory = cards[0]["memory_bytes"] / GIB
        rows.append(f"| `{file.stem}` | {len(cards)} x {cards[0]['name']}, {memory:.0f} GiB each |")
    head = "## Shipped rigs\n\nValues of `rig.profile=`; their rates are ceilings from whitepapers."
    return head + "\n\n| profile | cards |\n|---|---|\n" + "\n".join(rows)


def _cell(text: str) -> str:
    """``text`` as a cell of a table."""
    return re.sub(r"([|*])", r"\\\1", text).replace("<", "&lt;")


if __name__ == "__main__":
    print(settings())
