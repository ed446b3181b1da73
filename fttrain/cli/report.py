"""``fttrain report output=DIR``: report.md and plots of a run, also of one that still goes on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fttrain.track.report import write_report

if TYPE_CHECKING:
    from fttrain.config.run_config import RunConfig


def run(config: "RunConfig", argv: Sequence[str] = ()) -> int:
    """Writes the report of the run in ``config.output`` and says where it is.

    Raises UserError when there is no run.
    """
    print(f"wrote {write_report(config.output)}")
    return 0
