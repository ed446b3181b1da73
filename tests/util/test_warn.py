"""One line on stderr, from rank 0, without secrets."""

import pytest

from fttrain.util.warn import warn, warn_of_rank


@pytest.mark.parametrize("rank", [None, "0"])
def test_a_warning_is_one_line_without_secrets(
    rank: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    warn(f"the login hf_{'a' * 30}\nwas refused")
    assert capsys.readouterr() == ("", "warning: the login [redacted] was refused\n")
    warn_of_rank("a fact")
    assert capsys.readouterr() == ("", "warning: a fact\n")


def test_other_ranks_warn_of_themselves_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    warn("a fact of all ranks")
    warn_of_rank("a fact of this one")
    assert capsys.readouterr() == ("", "warning: rank 3: a fact of this one\n")
