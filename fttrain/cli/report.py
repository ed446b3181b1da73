"""``fttrain report output=DIR``: report.md and plots of a run, which need not be over."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fttrain.track.report import write_report

if TYPE_CHECKING:
    from fttrain.config.run_config import RunConfig


def run(config: "RunConfig", argv: Sequence[str] = ()) -> int:
    """Write the report of the run in ``config.output`` and print its path.

    Raises UserError where there is no run.
    """
    print(f"wrote {write_report(config.output)}")
    return 0
