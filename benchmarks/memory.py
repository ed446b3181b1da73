"""What each lever of memory takes and gives: peak memory and tokens/s, on and off, in one table.

    python benchmarks/memory.py [--json FILE] [--quick]

The first side has everything at its default; every other one changes what its name says and nothing
else. Beside them stands plain transformers + PEFT + bitsandbytes under DistributedDataParallel,
with and without gradient checkpointing, on the same packed rows from the same initial adapter. How
speed, memory and traffic are measured: see ``step.py``. On a CPU the device's memory is the host's:
what a lever moves there is only moved within it, and the table shows what that costs. On a card the
same levers free its memory. The demo's micro-batches have 1024 tokens: tiles of as many show with
--micro-batch-size 16.
"""

import argparse
from typing import Any

import common
from harness import turns
from harness.rank import run_rank
from harness.turns import Side, ddp, native

USUAL = {  # with --quick
    "warmup": (1, 1),
    "steps": (2, 2),
    "turns": (2, 1),
    "gradient_accumulation_steps": (4, 2),
}


def lever(
    name: str, group: str | int = "all", strategy: str = "replicate", **settings: Any
) -> Side:
    """``settings``: of the placement, or ``job`` for others."""
    job = settings.pop("job", {})
    return native(name, {"name": strategy}, {"micro_batch_group": group}, settings, **job)


SIDES = (
    ddp(True),
    ddp(False),
    lever("default"),
    lever("nothing skipped", job={"skip": False}),
    lever("group=1", group=1),
    lever("activations=keep", activations="keep"),
    lever("activations=keep, group=1", group=1, activations="keep"),
    lever("activations=offload, group=1", group=1, activations="offload"),
    lever("layer_inputs=host", layer_inputs="host"),
    lever("embedding=host", embedding="host"),
    lever("lm_head=host", lm_head="host"),
    lever("lm_head=quantized", lm_head="quantized"),
    lever("mlp_tile_tokens=1024", mlp_tile_tokens=1024),
    lever("optim.offload", job={"changes": {"optim": {"offload": True}}}),
    lever("optim.shard", job={"changes": {"optim": {"shard": True}}}),
    lever("optim=adamw8bit", job={"changes": {"optim": {"kind": "adamw8bit"}}}),
    lever("lora=dora", job={"changes": {"lora": {"use_dora": True}}}),
    lever("quant.dequant=tile", job={"changes": {"quant": {"dequant": "tile"}}}),
    lever("strategy=stream", strategy="stream"),
)
QUICK = ("peer, with checkpointing", "fttrain default", "fttrain activations=offload, group=1")


def main() -> None:
    """Measure, print, write."""
    parser = turns.parser((__doc__ or "").partition("\n\n")[0], USUAL)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="sides with one of these in it")
    arguments = turns.parse(parser, USUAL)
    if arguments.rank:
        run_rank(arguments.rank)
        return
    environment = common.environment()
    with turns.prepared(arguments, ["packed"]) as (work, folder):
        job = work.job | {"data": "packed", "steps": work.steps["packed"]}
        sides = chosen_sides(arguments)
        taken = turns.take_turns(
            sides,
            range(1, arguments.turns + 1),
            lambda side: common.run_ranks(__file__, changed(job, side), folder),
        )
        tokens = work.tokens("packed")[arguments.warmup :]
        settings = turns.settings(work, arguments)
    results = [turns.figures(side, taken[side], tokens) for side in sides]
    for result in results:
        reference = next((r for r in results if r["side"] == "fttrain default"), results[0])
        result["ratios"] = turns.ratios(result, reference)
        result["ratios"]["tokens_per_s"] = turns.paired_ratio(result, reference)
    common.show(
        f"Levers of memory on {turns.described(settings)}; ratios to fttrain's default, those of "
        "tokens/s medians over turns",
        ("side", *turns.COLUMNS),
        [[result["side"], *turns.cells(result)] for result in results],
        environment,
    )
    figures = {"environment": environment, "settings": settings, "results": results}
    common.write_json(arguments.json, figures)


def chosen_sides(arguments: argparse.Namespace) -> list[Side]:
    """In the order in which they take turns."""
    words = arguments.only or (QUICK if arguments.quick else [""])
    return [side for side in SIDES if any(word in side.name for word in words)]


def changed(job: dict[str, Any], side: Side) -> dict[str, Any]:
    """The job of ``side``: with its settings, and its changes to groups of settings."""
    job = job | side.settings
    for group, changes in job.pop("changes", {}).items():
        job[group] = job[group] | changes
    return job


if __name__ == "__main__":
    main()
