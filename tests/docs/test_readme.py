"""README: each command in it can be run, and a test runs each command of fttrain that it names."""

from pathlib import Path

import doc_commands
import pytest
import tiny
import tiny_files

from fttrain.cli import main

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = doc_commands.commands(TEXT)
LINES_AT_MOST = 150

# Command -> the test file that runs it on a small model, and the text there that does
RUN_BY = {
    "doctor": ("tests/doctor/test_checks.py", 'main(["doctor"'),
    "evaluate": ("tests/training/test_train.py", 'main(["evaluate"'),
    "measure": ("tests/cli/test_measure.py", '"measure"'),
    "plan": ("tests/cli/test_plan.py", '"plan"'),
    "quantize": ("tests/frozen/test_build.py", '["quantize"'),
    "report": ("tests/track/test_report.py", "from fttrain.cli.report import run"),
    "train": ("tests/helpers/tiny_run.py", '"train"'),
}
RUN_HERE = {"data"}


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= LINES_AT_MOST


def test_the_two_commands_come_first() -> None:
    assert COMMANDS[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_each_command_can_be_run(command: str) -> None:
    doc_commands.check_command(command)


def test_a_command_with_a_mistake_is_seen() -> None:
    for wrong in ("make demos", "fttrain trai", "fttrain train lora.rank=8", "teleport"):
        with pytest.raises(Exception, match=r"demos|trai|rank|teleport"):
            doc_commands.check_command(wrong)


def test_a_test_runs_each_command_of_fttrain() -> None:
    named = {line.split()[1] for line in COMMANDS if line.startswith("fttrain ")}
    assert named <= RUN_BY.keys() | RUN_HERE
    for command, (file, call) in RUN_BY.items():
        assert call in (ROOT / file).read_text(encoding="utf-8"), (command, file)


def test_data_shows_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_files.save(tiny.model(num_hidden_layers=1), tmp_path / "model")
    data = tiny_files.write_data(tmp_path / "examples.jsonl")
    settings = [f"model.path={model}", f"data.path={data}", f"data.cache_dir={tmp_path}"]
    assert main(["data", "model=local", "data=file", "data.seq_len=128", *settings]) == 0
    assert "What is" in capsys.readouterr().out
