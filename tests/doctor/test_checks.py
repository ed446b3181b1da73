"""All checks together: what is said, as text and as JSON, and the exit code."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import tiny_files
import torch

from fttrain.cli import main
from fttrain.doctor import links
from fttrain.doctor.checks import RunNeeds, all_checks, examine, summary
from fttrain.doctor.finding import FAILURE, OK, WARNING, Finding, failure, ok, warning
from fttrain.frozen.config import ModelConfig
from fttrain.model.config import LoraConfig
from fttrain.quant.config import QuantConfig
from fttrain.rig.config import RigConfig


def test_a_check_that_breaks_is_a_failure_and_the_others_go_on() -> None:
    def breaks() -> Finding:
        raise ZeroDivisionError("no such thing")

    seen = []
    checks = [("one", lambda: ok("fine")), ("two", breaks), ("three", lambda: warning("a", "b"))]
    found = list(examine(checks, lambda *progress: seen.append(progress)))
    assert [finding.verdict for _, finding in found] == [OK, FAILURE, WARNING]
    assert "ZeroDivisionError: no such thing" in found[1][1].figure
    assert seen == [("one", 0, 3), ("two", 1, 3), ("three", 2, 3)]
    assert summary(found) | {"checks": None} == {"checks": None, OK: 1, WARNING: 1, FAILURE: 1}


def test_a_secret_in_what_was_found_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "some-private-words")
    leaky = failure("the hub refuses some-private-words", "try some-private-words again")
    ((_, found),) = examine([("hub", lambda: leaky)], lambda *_: None)
    assert (found.figure, found.remedy) == (
        "the hub refuses [redacted]",
        "try [redacted] again",
    )


def test_a_model_that_is_not_there_leaves_the_disk_unknown(tmp_path: Path) -> None:
    model = ModelConfig("none", str(tmp_path / "none"))
    wanted = RunNeeds(model, QuantConfig(), LoraConfig(), str(tmp_path), tmp_path, 2)
    checks = dict(all_checks(RigConfig(), wanted))
    for name in ("disk, cache", "disk, checkpoints"):
        assert checks[name]().verdict == WARNING
        assert "no such folder" in checks[name]().figure


def test_cuda_that_does_not_start_is_a_failure_and_stops_no_other_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch says it of a card that another program has for itself alone."""

    def busy(device: object) -> None:
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", busy)
    model = ModelConfig("none", str(tmp_path / "none"))
    wanted = RunNeeds(model, QuantConfig(), LoraConfig(), str(tmp_path), tmp_path, 2)
    checks = [(name, check) for name, check in all_checks(RigConfig(), wanted) if name != "gloo"]
    quick = [(name, check) for name, check in checks if name != "nccl"]
    found = dict(examine(quick, lambda *_: None))
    assert found["cards"].verdict == FAILURE
    assert "busy or unavailable" in found["cards"].figure
    assert found["python"].verdict == OK


@pytest.fixture
def doctor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """The command on a tiny model, without fresh processes: they have tests of their own, and take
    seconds.
    """
    monkeypatch.setattr(links, "all_reduce", lambda backend, kind: ok("not asked"))
    model = tiny_files.save(tiny.model(num_hidden_layers=1), tmp_path / "model")
    capsys.readouterr()  # what libraries said while it was saved

    def run(*arguments: str) -> tuple[int, str]:
        code = main(["doctor", "rig.device=cpu", "model=local", f"model.path={model}", *arguments])
        return code, capsys.readouterr().out

    return run


def test_as_text_and_as_json(doctor: Callable[..., tuple[int, str]]) -> None:
    code, text = doctor()
    lines = text.splitlines()
    code_of_json, written = doctor("--json")
    figures = json.loads(written)
    assert len(lines) == len(figures["checks"]) + 1
    start = len("warning ") + max(len(one["check"]) for one in figures["checks"]) + 2
    for line, one in zip(lines[:-1], figures["checks"], strict=True):
        assert line[start:].startswith(one["figure"][:9]), "figures stand below each other"
    verdicts = [one["verdict"] for one in figures["checks"]]
    assert [line.split()[0] for line in lines[:-1]] == verdicts
    assert {OK: verdicts.count(OK), FAILURE: verdicts.count(FAILURE)} == {
        OK: figures[OK],
        FAILURE: figures[FAILURE],
    }
    assert code == code_of_json == (1 if figures[FAILURE] else 0)
    named = {one["check"]: one for one in figures["checks"]}
    assert named["quantiser"]["verdict"] == named["attention"]["verdict"] == OK


def test_a_failure_is_exit_code_1_and_says_what_mends_it(
    doctor: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "peft-0.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    code, text = doctor()
    (line,) = [line for line in text.splitlines() if line.startswith("failure")]
    assert code == 1
    assert "peft 0.1, >=0.21 is wanted  -> pip install 'peft>=0.21'" in line


def test_only_its_own_flag_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["doctor", "--jsn"], ["train", "--json"]):
        assert main(arguments) == 2
        assert "write key=value" in capsys.readouterr().err


def test_libraries_that_cannot_be_imported_are_named_and_all_else_is_looked_at(
    tmp_path: Path,
) -> None:
    """In a process of its own, as a user starts it: here they are imported long since."""
    names = ("bitsandbytes", "transformers", "accelerate", "peft")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise OSError('lib{name}.so.9: not there')")
    done = subprocess.run(
        [sys.executable, "-m", "fttrain", "doctor", "rig.device=cpu", "--json"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    found = {one["check"]: one for one in json.loads(done.stdout)["checks"]}
    imports = found["imports"]
    for name in names:
        assert f"{name} cannot be imported: lib{name}.so.9: not there" in imports["figure"]
    assert imports["remedy"].startswith("pip install --force-reinstall --no-deps bitsandbytes ")
    for name in ("disk, cache", "quantiser", "attention"):
        assert found[name]["figure"].startswith("not looked at: lib")
        assert found[name]["remedy"] == "first what imports names"
    assert found["python"]["verdict"] == found["gloo"]["verdict"] == OK
