"""The commands of Markdown pages, and a cheap check of each: nothing is trained or downloaded.

A ``fttrain`` command has its settings composed, a make target has to exist, what torchrun and
accelerate are given is parsed. A kind of command that nothing here knows fails.
"""

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterable
from pathlib import Path

from fttrain.cli import COMMANDS, FLAGS, SWEEP
from fttrain.config.run_config import compose
from fttrain.sweep import axes, check

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = ("", "bash", "sh")  # languages of blocks that are typed
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")
BEST = "experiment/best.yaml"  # which a finished sweep leaves


def commands(markdown: str) -> list[str]:
    """Each command of the fenced blocks, without its comment; continued lines are joined."""
    lines = []
    for fence in FENCE.finditer(markdown):
        if fence["language"] in SHELL:
            body = re.sub(r"\\\n\s*", "", fence["body"])
            lines += [re.sub(r"(^|\s)#.*$", "", line).strip() for line in body.splitlines()]
    return [line for line in lines if line]


def check_command(command: str) -> None:
    """Raise AssertionError or UserError for a command that would not run as it stands."""
    for part in re.split(r"\s*(?:;|&&)\s*", command):
        _check_part(shlex.split(part))


def _check_part(words: list[str]) -> None:
    name, arguments = words[0], words[1:]
    if name == "fttrain":
        _check_fttrain(arguments)
    elif name == "make":
        for target in (word for word in arguments if "=" not in word):
            assert target in make_targets(), f"make {target}"
    elif name in ("accelerate", "torchrun"):
        _check_launcher(name, arguments)
    elif name in ("python", "pytest"):
        files = [word for word in arguments if "/" in word and not word.startswith("-")]
        for file in files[:1]:
            assert (ROOT / file).exists(), file
    elif name == "bash" or "/" in name:
        script = ROOT / (arguments[0] if name == "bash" else name)
        subprocess.run(["bash", "-n", str(script)], check=True)
    elif name == "pip":
        for extra in re.findall(r"fttrain\[(\w+)\]", " ".join(arguments)):
            assert extra in extras(), extra
    elif name == ".":
        if not arguments[0].startswith(".venv"):
            assert (ROOT / arguments[0]).is_file(), arguments
    elif name == "export":
        assert all(ASSIGNMENT.fullmatch(word) for word in arguments), arguments
    else:
        assert name in ("set", "git", "cd", "source", "mkdocs"), f"nothing checks {words}"


def _check_fttrain(arguments: list[str]) -> None:
    if arguments == ["--help"]:
        return
    command, *rest = arguments
    assert command in COMMANDS, command
    assert rest != ["..."], "an ellipsis cannot be run"
    settings = [word for word in rest if word not in ("--help", *FLAGS.get(command, ()), *SWEEP)]
    if {*SWEEP} & {*rest}:
        request = axes.read(settings)
        check.check_axes(request.axes, takes_intervals=False)
        for trial in check.samples(request.axes):
            compose([*request.fixed, *trial])
        return
    compose([word for word in settings if not word.endswith(BEST)])


def _check_launcher(name: str, arguments: list[str]) -> None:
    """``accelerate launch`` or ``torchrun`` with fttrain or with a script of examples/."""
    if name == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(arguments)
        if not parsed.module:
            assert (ROOT / parsed.training_script).is_file()
            return
        module, rest = parsed.training_script, parsed.training_script_args
    else:
        assert arguments[:2] == ["launch", "--config_file"]
        assert (ROOT / arguments[2]).is_file(), arguments[2]
        at = arguments.index("-m")
        module, rest = arguments[at + 1], arguments[at + 2 :]
    assert module == "fttrain"
    _check_fttrain(rest)


def make_targets() -> set[str]:
    """The targets of the Makefile that are for users: those with a comment."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):.*## ", text, flags=re.MULTILINE))


def extras() -> Iterable[str]:
    """The optional parts that pyproject.toml names."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        names: Iterable[str] = tomllib.load(file)["project"]["optional-dependencies"]
    return names
