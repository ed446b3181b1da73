"""An optimizer step, here and in a plain transformers + PEFT + bitsandbytes loop under DDP.

    python benchmarks/step.py [--json FILE] [--quick]

Both sides train the demo's model on the demo's data: the same token ids in the same order from the
same initial adapter, on gloo ranks with equally many threads. In ``padded`` a row is one document
and the peer pads a micro-batch to its longest; in ``packed`` a row is filled with several, and both
sides keep attention inside a document. Only tokens that are not padding count.

The sides take turns, and each turn has processes of its own. Figures are medians over steps and
turns; the best step's speed stands beside them, which other work on the machine disturbs least. A
step lasts until the last rank has ended it. Memory is the most that any rank reached since its
start (VmHWM), above the interpreter with torch, transformers and bitsandbytes imported; fttrain
loads from its cache of the quantised base, which is made before the turns. Traffic is what the
loopback interface counted during the timed steps, headers included, so nothing else should use it
meanwhile.
"""

import argparse
from pathlib import Path
from typing import Any

import common
from harness import turns
from harness.rank import run_rank
from harness.turns import Side, ddp, native
from peers.work import Work

KINDS = ("padded", "packed")
USUAL = {"warmup": (1, 1), "steps": (3, 2), "turns": (3, 1)}  # with --quick


def replicate(activations: str, group: str | int) -> Side:
    name = f"{activations}, group={group}"
    return native(
        name, {"name": "replicate"}, {"micro_batch_group": group}, {"activations": activations}
    )


SIDES = (
    ddp(True),
    ddp(False),
    replicate("recompute", "all"),
    replicate("keep", "all"),
    replicate("keep", 1),
)
QUICK_SIDES = (ddp(True), replicate("recompute", "all"))


def main() -> None:
    """Measure, print, write."""
    arguments = _arguments()
    if arguments.rank:
        run_rank(arguments.rank)
        return
    environment = common.environment()
    with turns.prepared(arguments, arguments.data) as (work, folder):
        results = [
            result for kind in arguments.data for result in compare(kind, work, arguments, folder)
        ]
        settings = turns.settings(work, arguments)
    _show(results, settings, environment)
    common.write_json(
        arguments.json,
        {"environment": environment, "settings": settings, "results": results},
    )


def compare(
    kind: str, work: Work, arguments: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """The figures of all sides on one kind of data, beside those of the faster peer."""
    sides = QUICK_SIDES if arguments.quick else SIDES
    job = work.job | {"data": kind, "steps": work.steps[kind]}
    taken = turns.take_turns(
        sides,
        range(1, arguments.turns + 1),
        lambda side: common.run_ranks(__file__, job | side.settings, folder),
        f"{kind}, ",
    )
    tokens = work.tokens(kind)[arguments.warmup :]
    figures = {side: turns.figures(side, taken[side], tokens) for side in sides}
    faster_peer = turns.fastest([figures[side] for side in sides if side.is_peer])
    return [
        {"data": kind, **own, "ratios": turns.ratios(own, faster_peer)} for own in figures.values()
    ]


def _show(
    results: list[dict[str, Any]], settings: dict[str, Any], environment: dict[str, Any]
) -> None:
    rows: list[list[str]] = []
    for result in results:
        if rows and result["data"] != rows[-1][0].split(":")[0]:
            rows.append([])
        rows.append([f"{result['data']}: {result['side']}", *turns.cells(result)])
    title = (
        f"An optimizer step on {turns.described(settings)}; "
        "ratios to the peer with the higher median"
    )
    common.show(title, ("data, side", *turns.COLUMNS), rows, environment)


def _arguments() -> argparse.Namespace:
    parser = turns.parser((__doc__ or "").splitlines()[0], USUAL)
    parser.add_argument("--data", nargs="+", choices=KINDS, default=list(KINDS))
    return turns.parse(parser, USUAL)


if __name__ == "__main__":
    main()
