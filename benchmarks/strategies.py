"""fttrain's strategies beside transformers + PEFT + bitsandbytes under FSDP2 and FSDP1.

    python benchmarks/strategies.py [--json FILE] [--quick] [--mbit 200]

All sides train the demo's model on the same packed rows from the same initial adapter. Of 8
micro-batches a step, what is gathered for each of them counts eight times, as it does in use. What
is measured and how: see ``step.py``. The first turn has every setting of the peers; the later ones
have the fastest of them only, beside all of fttrain's strategies.

``--deepspeed`` compares strategy=deepspeed with the native strategies that do the same work.

``--mbit`` puts the two ranks into network namespaces that a link of that rate joins (root only).
Every side then runs over that link twice, one after the other: without the limit and with it. How
much of its speed it keeps is the question. Bytes are counted at the link.
"""

import argparse
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
from harness import turns
from harness.netns import Veth, veth_pair
from harness.rank import run_rank
from harness.turns import Side, Turn, native
from peers.work import Work

from fttrain.util.errors import UserError

USUAL = {  # with --quick
    "warmup": (1, 1),
    "steps": (2, 2),
    "turns": (3, 1),
    "gradient_accumulation_steps": (8, 2),
}


def fsdp(version: int, reshard: bool, checkpointing: bool) -> Side:
    """``reshard``: a layer is dropped after forward and gathered again for backward."""
    name = f"FSDP{version}" + ("" if reshard else ", kept until backward")
    if not checkpointing:
        name += ", no checkpointing"
    settings = {"side": "peer", "peer": f"fsdp{version}", "checkpointing": checkpointing}
    return Side(name, settings | {"reshard_after_forward": reshard})


STRATEGIES = (
    native("replicate", {"name": "replicate"}, {"micro_batch_group": "all"}),
    native("shard", {"name": "shard"}, {"micro_batch_group": "all"}),
    native("stream", {"name": "stream", "resident_layers": 0}, {"micro_batch_group": "all"}),
    native("pipeline", {"name": "pipeline"}, {"kind": "one_f_one_b"}),
)
KEPT = tuple(  # as peers without checkpointing do; in groups of 1, as they do
    native(
        f"{name}, kept activations",
        {"name": name},
        {"micro_batch_group": 1},
        {"activations": "keep"},
    )
    for name in ("replicate", "shard", "stream")
)
PLAIN = {"kind": "none", "double_quant": False}
ZERO = (  # DeepSpeed beside native strategies that do the same work
    native("zero 2, NF4", {"name": "deepspeed", "zero": {"stage": 2}}, {}),
    native("zero 2, bf16 base", {"name": "deepspeed", "zero": {"stage": 2}}, {}, quant=PLAIN),
    native("zero 3, bf16 base", {"name": "deepspeed", "zero": {"stage": 3}}, {}, quant=PLAIN),
    native(
        "replicate, bf16 base", {"name": "replicate"}, {"micro_batch_group": "all"}, quant=PLAIN
    ),
    native("shard, bf16 base", {"name": "shard"}, {"micro_batch_group": "all"}, quant=PLAIN),
)
FSDP2 = tuple(
    fsdp(2, reshard, checkpointing) for checkpointing in (True, False) for reshard in (True, False)
)
FSDP1 = (fsdp(1, True, True), fsdp(1, True, False))  # FULL_SHARD
PEERS = (*FSDP2, *FSDP1)
QUICK_PEERS = (FSDP2[0], FSDP1[0])


def main() -> None:
    """Measure, print, write."""
    arguments = _arguments()
    if arguments.rank:
        run_rank(arguments.rank)
        return
    try:
        with nullcontext() if arguments.mbit is None else veth_pair() as link:
            measure(arguments, link)
    except UserError as error:
        print(f"strategies.py: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def measure(arguments: argparse.Namespace, link: Veth | None) -> None:
    """All turns; then the table, the goals and the JSON."""
    environment = common.environment()
    with turns.prepared(arguments, ["packed"]) as (work, folder):
        taken = take_turns(work, folder, arguments, link)
        tokens = work.tokens("packed")[arguments.warmup :]
        settings = turns.settings(work, arguments) | {"mbit": arguments.mbit}
    results = with_ratios([turns.figures(side, taken[side], tokens) for side in taken])
    reached = goals(results, arguments.mbit)
    _show(results, reached, settings, environment)
    common.write_json(
        arguments.json,
        {
            "environment": environment,
            "settings": settings,
            "results": results,
            "goals": reached,
        },
    )


def chosen_sides(arguments: argparse.Namespace) -> list[Side]:
    """In the order in which they take turns."""
    peers = QUICK_PEERS if arguments.quick else PEERS
    if arguments.mbit is not None:
        peers = FSDP2[:1] if arguments.quick else FSDP2[:2]
    words = arguments.only or [""]
    own = (*STRATEGIES, *KEPT) if arguments.mbit is None and not arguments.quick else STRATEGIES
    every = (STRATEGIES[0], *ZERO) if arguments.deepspeed else (*peers, *own)
    sides = [side for side in every if any(word in side.name for word in words)]
    if arguments.mbit is None:
        return sides
    return [
        replace(side, settings=side.settings | {"mbit": mbit})
        for side in sides
        for mbit in (None, arguments.mbit)
    ]


def take_turns(
    work: Work, folder: Path, arguments: argparse.Namespace, link: Veth | None
) -> dict[Side, list[Turn]]:
    """What the ranks of each side reported, turn by turn."""
    job = work.job | {"data": "packed", "steps": work.steps["packed"]}

    def run(side: Side) -> Turn:
        if link is not None:
            link.limit(side.settings["mbit"])
        return common.run_ranks(__file__, job | side.settings, folder, link)

    sides = chosen_sides(arguments)
    taken = turns.take_turns(sides, [1], run)
    first_s = {  # over the slow link where there is one: the setting that it slows least
        side: sum(taken[side][0][0]["step_s"])
        for side in sides
        if side.is_peer and side.settings.get("mbit") == arguments.mbit
    }
    fastest = min(first_s, key=lambda side: first_s[side]).name if first_s else None
    going_on = [side for side in sides if not side.is_peer or side.name == fastest]
    for side, more in turns.take_turns(going_on, range(2, arguments.turns + 1), run).items():
        taken[side] += more
    return taken


def with_ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each one to the fastest peer over the same link, to replicate, to itself without a limit."""
    for own in results:
        mbit = _mbit(own)
        alike = [other for other in results if _mbit(other) == mbit]
        peers = [other for other in alike if other["settings"]["side"] == "peer"]
        own["ratios"] = turns.ratios(own, turns.fastest(peers)) if peers else {}
        for name, references in (
            ("to_replicate", [other for other in alike if other["side"] == STRATEGIES[0].name]),
            ("kept", [r for r in results if r["side"] == own["side"] and _mbit(r) is None]),
        ):
            if references:
                own["ratios"][name] = turns.paired_ratio(own, references[0])
    return results


def goals(results: list[dict[str, Any]], mbit: float | None) -> list[dict[str, Any]]:
    """What was aimed at, and what came out."""
    limited = [result for result in results if _mbit(result) == mbit]
    own = [  # not those beside DeepSpeed, some of which train on another base
        result
        for result in limited
        if result["settings"]["side"] == "fttrain"
        and result["side"] not in [side.name for side in ZERO]
    ]
    peers = [result for result in limited if result["settings"]["side"] == "peer"]
    shard, stream = ([r for r in own if name in r["side"]] for name in ("shard", "stream"))
    of_peer = "of the fastest peer's"
    if mbit is not None:
        fastest = [turns.fastest(peers)] if peers else []
        return [
            _goal("shard keeps 0.9 or more of its tokens/s", shard, "kept", least=0.9),
            _goal("FSDP2 keeps 0.5 or less", fastest, "kept", most=0.5),
        ]
    return [
        _goal(f"tokens/s: 2 or more {of_peer}", own, "tokens_per_s", least=2),
        _goal(f"peak memory: 0.5 or less {of_peer}", own, "peak_host_bytes", most=0.5),
        _goal(f"bytes sent: 0.125 or less {of_peer}", own, "sent_bytes_per_step", most=0.125),
        _goal("tokens/s: 0.9 or more of replicate's", shard + stream, "to_replicate", least=0.9),
        _goal(f"final loss: within 0.01 {of_peer}", own + peers, "final_loss", 0.99, 1.01),
    ]


def _goal(
    what: str,
    results: list[dict[str, Any]],
    ratio: str,
    least: float = -math.inf,
    most: float = math.inf,
) -> dict[str, Any]:
    values = {r["side"]: r["ratios"][ratio] for r in results if ratio in r["ratios"]}
    met = all(least <= value <= most for value in values.values()) if values else None
    return {"goal": what, "values": values, "met": met}


def _mbit(result: dict[str, Any]) -> float | None:
    return result["settings"].get("mbit")


def _show(
    results: list[dict[str, Any]],
    reached: list[dict[str, Any]],
    settings: dict[str, Any],
    environment: dict[str, Any],
) -> None:
    slow = settings["mbit"] is not None
    columns = ["side", *turns.COLUMNS, "to replicate", *(["kept"] if slow else [])]
    rows = []
    for result in results:
        name, mbit, ratios = result["side"], _mbit(result), result["ratios"]
        if slow:
            name += ", no limit" if mbit is None else f", {mbit:g} Mbit/s"
        row = [name, *turns.cells(result)]
        for ratio in ("to_replicate", "kept") if slow else ("to_replicate",):
            row.append(f"{ratios[ratio]:.2f}" if ratio in ratios else "-")
        rows.append(row)
    title = (
        f"Strategies on {turns.described(settings)}; ratios to the peer with the highest median; "
        "`to replicate`: median over turns"
    )
    common.show(title, columns, rows, environment)
    common.show_goals(reached)


def _arguments() -> argparse.Namespace:
    parser = turns.parser((__doc__ or "").partition("\n\n")[0], USUAL)
    parser.add_argument("--mbit", type=float, help="limit of the link, million bits a second")
    parser.add_argument(
        "--deepspeed",
        action="store_true",
        help="strategy=deepspeed beside what does the same work, instead of the usual sides",
    )
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="sides with one of these in it")
    return turns.parse(parser, USUAL)


if __name__ == "__main__":
    main()
