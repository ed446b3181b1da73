"""Llama-3-70B on two cards of 24 GB: does it fit, how fast is it, how long may a row be?

    python benchmarks/gpu_fit70b.py [--json FILE] [--longest]
    python benchmarks/gpu_fit70b.py --shape tiny --device cpu     # a smoke run

The model's exact shape with random NF4 bytes, made directly in the stores: nothing is downloaded.
Two ranks, each with torch's allocator capped such that it and the context stay within --cap-gib,
train r=16 on all linears for some real optimizer steps, each strategy at several accumulations,
each in processes of its own. ``out of memory`` is an answer, not an error.

Two ranks may share one GPU. NCCL then takes them only as if on two hosts and over sockets: seconds
waited and tokens/s mean nothing for a rig (the table says so), memory does.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common

OUT_OF_MEMORY = 9  # exit code of a rank
CONTEXT_GIB = 0.6  # CUDA's context and NCCL's buffers, outside torch's allocator
SHAPES = {  # as config.json has them
    "llama3_70b": {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
ROPE = {"rope_type": "default", "rope_theta": 500000.0}
LAYERS_ON_CARD = {"llama3_70b": 30, "tiny": 2}  # of stream, chosen to fit beside the rest
LONGER = (1.5, 2, 3, 4, 6, 8, 12, 16)  # times --seq-len, in search of the longest row
COLUMNS = (
    "strategy",
    "fits",
    "peak GiB allocator",
    "GiB NVML",
    "host GiB, all",
    "tokens/s",
    "s a step",
    "s waited",
    "GB moved a step",
    "longest T",
)


def sides(shape: str) -> dict[str, dict[str, Any]]:
    """Settings of each side. What is not frozen layers is where 24 GB need it to be."""
    some = LAYERS_ON_CARD[shape]
    return {
        "shard": {"name": "shard"},
        f"stream, {some} layers on the card": {"name": "stream", "resident_layers": some},
        "stream, 0 layers on the card": {"name": "stream", "resident_layers": 0},
        "pipeline": {"name": "pipeline"},
    }


def main() -> None:
    """Measure, print, write."""
    arguments = _arguments()
    if arguments.rank:
        run_rank(arguments.rank)
        return
    environment = common.environment()
    results = []
    with tempfile.TemporaryDirectory(prefix="fttrain-fit-") as folder:
        for accumulation in arguments.accumulation:
            for name, strategy in sides(arguments.shape).items():
                job = _job(arguments, strategy, accumulation)
                label = f"{name}, accumulation {accumulation}"
                print(f"{label}: T={job['seq_len']}", flush=True)
                found = _run(job, Path(folder))
                result = {"side": label, "strategy": strategy, "ranks": found}
                if arguments.longest and found and accumulation == arguments.accumulation[0]:
                    result["longest_seq_len"] = _longest(job, label, Path(folder))
                results.append(result)
    settings = vars(arguments) | {"device_name": _device_name(results)}
    _show(results, settings, environment)
    figures = {"environment": environment, "settings": settings, "results": results}
    common.write_json(arguments.json, figures)


def _run(job: dict[str, Any], folder: Path) -> list[dict[str, Any]] | None:
    """What the ranks report; None where one of them ran out of memory."""
    try:
        return common.run_ranks(__file__, job, folder)
    except SystemExit as failure:
        if failure.code != OUT_OF_MEMORY:
            raise
        return None


def _longest(job: dict[str, Any], label: str, folder: Path) -> int:
    """The longest row, among multiples of the first one, with which a step still fits."""
    longest = job["seq_len"]
    for times in LONGER:
        seq_len = int(times * job["seq_len"])
        print(f"{label}: T={seq_len}", flush=True)
        if _run({**job, "seq_len": seq_len, "steps": 1}, folder) is None:
            break
        longest = seq_len
    return int(longest)


def run_rank(job_file: str) -> None:
    """The steps of a job on this rank."""
    memory = common.HostMemory()
    job = common.read_job(job_file)
    import torch

    rank = int(os.environ["RANK"])
    if job["device"] == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        _cap(device, job["cap_gib"])
        if torch.cuda.device_count() < job["ranks"]:
            # NCCL refuses two ranks of one host on one GPU: say that they are on two.
            os.environ |= {"NCCL_HOSTID": f"host{rank}", "NCCL_SOCKET_IFNAME": "lo"}
    else:
        device = torch.device("cpu")
    from fttrain.dist import process_group

    with process_group(device) as group, _told_apart():
        figures = _steps(job, group)
        figures |= {
            "peak_host_bytes": memory.peak_bytes(),
            "reserved_bytes": 0,
            "nvml_bytes": 0,
            "device_name": "CPU",
        }
        if device.type == "cuda":
            figures["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
            figures["nvml_bytes"] = _nvml_bytes(device)
            figures["device_name"] = torch.cuda.get_device_name(device)
            figures["shared_device"] = torch.cuda.device_count() < job["ranks"]
        group.barrier()  # nobody hangs up while another rank still talks
        common.report(job_file, figures)


def _steps(job: dict[str, Any], group: Any) -> dict[str, Any]:
    """Build the strategy on random bytes and train."""
    import torch
    from harness.random_base import RandomBase
    from transformers import LlamaConfig

    from fttrain.checkpoint.frozen_cache import FrozenConfig
    from fttrain.data.batch import collate
    from fttrain.model.decoder import Architecture
    from fttrain.model.lora import LoraConfig
    from fttrain.optim.factory import OptimConfig
    from fttrain.quant.scheme import QuantConfig
    from fttrain.schedule import ScheduleConfig
    from fttrain.strategy.build import Blueprint
    from fttrain.strategy.protocol import SCHEDULES, StrategyConfig
    from fttrain.strategy.recipe import Placement, Recipe, StepSize

    strategy, accumulation = StrategyConfig(**job["strategy"]), job["accumulation"]
    recipe = Recipe(
        strategy,
        QuantConfig(),
        LoraConfig(r=16),
        OptimConfig(offload=True),
        ScheduleConfig(kind=SCHEDULES[strategy.name]),
        Placement("recompute", boundaries="host", embedding="host", head="streamed"),
        FrozenConfig(),
        StepSize(1, job["seq_len"], accumulation),
        "bfloat16",
        seed=0,
    )
    # Where a row is longer than the model was made for, only the rotary angles are extrapolated.
    shape = {**SHAPES[job["shape"]], "rope_parameters": ROPE, "max_position_embeddings": 1 << 20}
    architecture = Architecture(LlamaConfig(**shape))
    frozen_format = architecture.frozen_format(recipe.quant, torch.bfloat16)
    started = time.perf_counter()
    blueprint = Blueprint(recipe, architecture, frozen_format, group)
    base = RandomBase(architecture.layers, frozen_format)
    trained = blueprint.build(base, lambda done, total: None)
    loading_s = time.perf_counter() - started
    place, places = trained.data_parallel
    generator = torch.Generator().manual_seed(1)
    batches = []
    for index in range(accumulation * job["ranks"]):
        ids = torch.randint(shape["vocab_size"], (job["seq_len"],), generator=generator).tolist()
        if index % places == place:
            batches.append(collate([(ids, ids)], index))
    steps = []
    for number in range(job["steps"]):
        group.barrier()
        started = time.perf_counter()
        stats = trained.train_step(batches, number, 1e-4, lambda loss, norm: True)
        if group.device.type == "cuda":
            torch.cuda.synchronize()
        traffic = stats.traffic
        steps.append(
            {
                "step_s": time.perf_counter() - started,
                "loss": stats.loss,
                "tokens": stats.tokens,
                "wait_s": traffic.wait_s,
                "gather_bytes": traffic.gather_bytes,
                "h2d_bytes": traffic.h2d_bytes,
                "stage_bytes": stats.stage_bytes,
                "sync_bytes": stats.sync.sync_bytes,
            }
        )
    return {"loading_s": loading_s, "steps": steps}


@contextmanager
def _told_apart() -> Iterator[None]:
    """A card that is too small ends the rank with a code of its own."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        print(str(error).splitlines()[0], file=sys.stderr, flush=True)
        os._exit(OUT_OF_MEMORY)


def _cap(device: Any, cap_gib: float) -> None:
    import torch

    torch.cuda.set_device(device)
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction((cap_gib - CONTEXT_GIB) * 2**30 / total, device)


def _nvml_bytes(device: Any) -> int:
    """What the driver counts for this process; 0 where it does not say (some containers)."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(device.index)
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    own = [process.usedGpuMemory or 0 for process in processes if process.pid == os.getpid()]
    return own[0] if own else 0


def _job(
    arguments: argparse.Namespace, strategy: dict[str, Any], accumulation: int
) -> dict[str, Any]:
    names = ("device", "shape", "cap_gib", "seq_len", "steps", "ranks", "threads")
    own = {name: getattr(arguments, name) for name in names}
    return {**own, "strategy": strategy, "accumulation": accumulation}


def _device_name(results: list[dict[str, Any]]) -> str:
    names = {rank["device_name"] for result in results for rank in result["ranks"] or []}
    shared = any(rank.get("shared_device") for r in results for rank in r["ranks"] or [])
    return ", ".join(sorted(names)) + (", shared by the ranks" if shared else "")


def _show(
    results: list[dict[str, Any]], settings: dict[str, Any], environment: dict[str, Any]
) -> None:
    title = (
        f"{settings['shape']} on {settings['ranks']} x {settings['device_name']}, capped at "
        f"{settings['cap_gib']} GiB a rank: T={settings['seq_len']}, {settings['steps']} steps, of "
        "which the first is left out of the times; the higher of the ranks' figures"
    )
    common.show(title, COLUMNS, [_row(result) for result in results], environment)


def _row(result: dict[str, Any]) -> list[str]:
    ranks = result["ranks"]
    if ranks is None:
        return [result["side"], "no", *["-"] * (len(COLUMNS) - 2)]
    timed = [rank["steps"][1:] or rank["steps"] for rank in ranks]
    step_s = max(sum(step["step_s"] for step in steps) / len(steps) for steps in timed)
    wait_s = max(sum(step["wait_s"] for step in steps) / len(steps) for steps in timed)
    last = [steps[-1] for steps in timed]
    moved = max(s["gather_bytes"] + s["h2d_bytes"] + s["stage_bytes"] for s in last)
    host = sum(rank["peak_host_bytes"] for rank in ranks)
    return [
        result["side"],
        "yes",
        f"{max(rank['reserved_bytes'] for rank in ranks) / 2**30:.2f}",
        f"{max(rank['nvml_bytes'] for rank in ranks) / 2**30:.2f}",
        f"{host / 2**30:.2f}",
        f"{last[0]['tokens'] / step_s:.0f}",
        f"{step_s:.2f}",
        f"{wait_s:.2f}",
        f"{moved / 1e9:.2f}",
        str(result.get("longest_seq_len", "-")),
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--json", metavar="FILE", help="write the figures there")
    add("--shape", choices=SHAPES, default="llama3_70b")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--cap-gib", type=float, default=23.4, help="of each rank, context included")
    add("--seq-len", type=int, default=2048)
    add("--steps", type=int, default=5)
    add("--accumulation", type=int, nargs="+", default=[1, 8])
    add("--longest", action="store_true", help="also look for the longest row that fits")
    add("--ranks", type=int, default=2)
    add("--threads", type=int, default=4, help="of each rank")
    add("--rank", metavar="JOB", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
