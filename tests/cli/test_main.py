"""The command line: help, exit codes, and mistakes told in one line."""

import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable

import pytest

from fttrain import __version__, cli
from fttrain.config.groups import groups
from fttrain.config.run_config import RunConfig
from fttrain.sweep.config import SweepConfig
from fttrain.util.errors import UserError
from fttrain.util.schema import keys_of, lookup


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """Puts a function in the place of the command ``train``: what is tested is who calls it."""

    def put(function: Callable[[], int]) -> None:
        module = types.ModuleType("fttrain.cli.train")
        module.run = lambda config, argv: function()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fttrain.cli.train", module)

    return put


def fail(error: BaseException) -> Callable[[], int]:
    def function() -> int:
        raise error

    return function


def test_every_command_has_its_module() -> None:
    for name in cli.COMMANDS:
        assert importlib.util.find_spec(f"fttrain.cli.{name}"), name


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in cli.COMMANDS)
    assert cli.main([]) == 2


def test_help_of_a_command_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for group, options in groups().items():
        assert f"{group}={'|'.join(options)}" in text
        own = SweepConfig if group == "sweep" else RunConfig
        if group != "experiment":
            for key in keys_of(own if group == "sweep" else lookup(own, [group])):
                assert f"  {group}.{key}=" in text
    assert "fttrain train -m" in text
    assert all(f"  {key}=" in text for key in ("activations", "resume", "output"))


def test_help_does_without_the_slow_imports() -> None:
    program = (
        "import sys; from fttrain.cli import main; main(['train', '--help']);"
        "sys.exit(bool({'torch', 'transformers', 'hydra'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


def test_who_only_starts_ranks_or_trials_does_without_the_libraries_of_training() -> None:
    program = (
        "import sys; from fttrain.launcher import launch\n"
        "from fttrain.config.run_config import compose\n"
        "from fttrain.cli import evaluate, measure, plan, quantize, sweep, train\n"
        "launch.start = lambda config, argv: 0  # the ranks\n"
        "config = compose(['launch.processes=2'])\n"
        "for command in (train, quantize, evaluate, measure): command.run(config, [])\n"
        "print(*{'torch', 'transformers', 'bitsandbytes', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    shell = f"set -o pipefail; {sys.executable} -m fttrain train --help | head -n 1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.stdout.startswith("usage: fttrain train")
    assert done.stderr == ""


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fttrain {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "trian: no such command; did you mean train?"),
        (["optim.lr=3"], "no such command; there are: train"),
        (["train", "optim.lr=fast"], "optim.lr='fast': a number is wanted"),
        (["train", "train"], "'train': write key=value"),
        (["report", "outptu=x"], "outptu: no such key; did you mean output?"),
        (["evaluate", "-m", "lora.r=8,16"], "evaluate -m: only `fttrain train` sweeps"),
        (["train", "hydra/sweeper=optuna"], "(a sweep's search and launcher with -m)"),
    ],
)
def test_a_mistake_is_one_line_and_no_traceback(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("fttrain: error: ")
    assert message in written.err
    assert written.err.count("\n") == 1


def test_exit_codes(train, capsys: pytest.CaptureFixture[str]) -> None:
    train(lambda: 7)
    assert cli.main(["train"]) == 7
    train(fail(UserError("two\nlines", exit_code=3)))
    assert cli.main(["train"]) == 3
    assert capsys.readouterr().err == "fttrain: error: two lines\n"
    train(fail(KeyboardInterrupt()))
    assert cli.main(["train"]) == 130


def test_what_is_no_mistake_of_the_user_keeps_its_traceback(train) -> None:
    train(fail(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_debugging_shows_where_a_mistake_was_found(train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTTRAIN_DEBUG", "1")
    train(fail(UserError("wrong")))
    with pytest.raises(UserError):
        cli.main(["train"])


def test_an_error_does_not_repeat_a_secret(
    train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "some-private-words")
    train(fail(UserError("the hub says no to some-private-words")))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "fttrain: error: the hub says no to [redacted]\n"


def test_a_rank_that_fails_alone_says_which_it_is(
    train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli, "die_with_parent", lambda: None)  # the tests may go on without theirs
    monkeypatch.setattr(cli, "_LATER_S", 0.0)
    train(fail(UserError("disk full")))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "fttrain: error: rank 1: disk full\n"
