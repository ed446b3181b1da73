"""Whether ``fttrain measure`` reports the rate that a link has.

    python benchmarks/link_rate.py [--json FILE] [--mbit 200 800]

Two network namespaces, joined by a link that ``tc`` limits to a known rate, stand for two machines
(root only). The whole command runs on a rank in each of them, once for each rate. TCP's and
Ethernet's headers take 4 % of what the limit counts. Where the privileges are missing it says so
and measures nothing.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from harness.measured import measured
from harness.netns import Veth, veth_pair

from fttrain.rig.profile import LinkProfile, bus_bytes_per_s
from fttrain.util.errors import UserError

WITHIN = 0.1
# Over gloo reduce_scatter is an all_reduce, which sends twice what its bus bandwidth counts.
COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "send_recv")


def main() -> None:
    """Measure, print, write."""
    arguments = _arguments()
    environment, started_s = common.environment(), time.time()
    results = []
    try:
        with veth_pair() as link, tempfile.TemporaryDirectory() as folder:
            for mbit in arguments.mbit:
                common.say(started_s, f"{mbit:g} Mbit/s")
                link.limit(mbit)
                results.append(_result(mbit, _measured(link, Path(folder), arguments)))
    except UserError as error:
        print(f"link_rate.py: nothing was measured: {error}", file=sys.stderr)
        return
    reached = _goals(results)
    _show(results, environment)
    common.show_goals(reached)
    common.write_json(
        arguments.json, {"environment": environment, "results": results, "goals": reached}
    )


def _measured(link: Veth, folder: Path, arguments: argparse.Namespace) -> LinkProfile:
    """What ``fttrain measure`` says of ``link`` as it is limited now."""
    settings = [f"rig.link_s={arguments.link_s}"]
    if arguments.model:
        settings += ["model=local", f"model.path={arguments.model}"]
    (found,) = measured(link, folder, settings, threads=1).links
    return found


def _result(mbit: float, link: LinkProfile) -> dict[str, Any]:
    """By collective: the bus bandwidth of the largest size, in million bits a second."""
    largest = {name: link.samples[name][-1] for name in COLLECTIVES}
    return {
        "mbit": mbit,
        "size_bytes": {name: sample.size_bytes for name, sample in largest.items()},
        "measured_mbit": {
            name: bus_bytes_per_s(name, sample, link.ranks) * 8 / 1e6
            for name, sample in largest.items()
        },
    }


def _goals(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    goals = []
    for result in results:
        ratios = {n: found / result["mbit"] for n, found in result["measured_mbit"].items()}
        met = all(abs(ratio - 1) <= WITHIN for ratio in ratios.values())
        goals.append(
            {"goal": f"{result['mbit']:g} Mbit/s within 10 %", "values": ratios, "met": met}
        )
    return goals


def _show(results: list[dict[str, Any]], environment: dict[str, Any]) -> None:
    rows = [
        [f"{result['mbit']:g}", *(f"{result['measured_mbit'][name]:.1f}" for name in COLLECTIVES)]
        for result in results
    ]
    title = "What `fttrain measure` says of a link, Mbit/s, beside what it is limited to"
    common.show(title, ["limit", *COLLECTIVES], rows, environment)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--json", metavar="FILE", help="write the figures there")
    add("--mbit", type=float, nargs="+", default=[200.0, 800.0], help="limits of the link")
    add("--link-s", type=float, default=20.0, help="seconds for the link, as rig.link_s")
    add("--model", metavar="PATH", help="a small checkpoint; else that of the demo")
    return parser.parse_args()


if __name__ == "__main__":
    main()
