"""The result of a check: verdict, figure and remedy."""

from dataclasses import dataclass

OK, WARNING, FAILURE = "ok", "warning", "failure"
NOT_AVAILABLE = "not available"


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    verdict: str  # ok | warning (a run works, but slower or less safely) | failure
    figure: str  # the measured value
    remedy: str = ""  # the command or setting that helps; "" where nothing is wrong


def ok(figure: str) -> Finding:
    return Finding(OK, figure)


def warning(figure: str, remedy: str) -> Finding:
    return Finding(WARNING, figure, remedy)


def failure(figure: str, remedy: str) -> Finding:
    return Finding(FAILURE, figure, remedy)
