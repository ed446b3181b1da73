"""What a check says: how it went, the figure, and what mends it."""

from dataclasses import dataclass

OK, WARNING, FAILURE = "ok", "warning", "failure"
NOT_AVAILABLE = "not available"


@dataclass(frozen=True)
class Finding:
    """The answer of one check."""

    verdict: str  # ok | warning (a run works, but slower or less safely) | failure
    figure: str  # what was found
    remedy: str = ""  # the command or setting that mends it; empty where nothing is to be mended


def ok(figure: str) -> Finding:
    return Finding(OK, figure)


def warning(figure: str, remedy: str) -> Finding:
    return Finding(WARNING, figure, remedy)


def failure(figure: str, remedy: str) -> Finding:
    return Finding(FAILURE, figure, remedy)
