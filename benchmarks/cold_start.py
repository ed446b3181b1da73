"""The start of a run from the frozen cache on disk, beside plain reading of the same bytes.

    python benchmarks/cold_start.py [--json FILE] [--layers 8] [--layer-mb 441] [--folder DIR]

Files as large as layers of Llama-3-70B in NF4 are written once and taken out of the page cache
before each turn. ``plain`` reads each of them once, in order, files divided among the ranks: what
the disk delivers. The others fill the stores of two ranks as a run does. Each rank does its work
twice and the second time counts: a virtual machine may take longer to hand out memory that nobody
has touched yet than the disk takes. Bytes a second are those of the files, each counted once,
whoever reads them and how often; a turn lasts until the last rank has ended. The files should be on
the disk that holds the cache (``--folder``).
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

SIDES = ("plain", "replicate", "shard", "stream")
PIECE_BYTES = 16 << 20  # plain reads that much at once
UNIT_BYTES = 1 << 20  # a layer is a multiple of it, so that ranks can share it


def main() -> None:
    """Measure, print, write."""
    arguments = _arguments()
    if arguments.rank:
        _run_rank(arguments.rank)
        return
    environment = common.environment()
    with tempfile.TemporaryDirectory(prefix="fttrain-cold-", dir=arguments.folder) as name:
        folder = Path(name)
        job = {
            "ranks": arguments.ranks,
            "threads": 1,
            "layers": arguments.layers,
            "layer_bytes": arguments.layer_mb * 10**6 // UNIT_BYTES * UNIT_BYTES,
            "folder": name,
        }
        _write_files(job)
        taken: dict[str, list[float]] = {side: [] for side in SIDES}
        for turn in range(arguments.turns):
            for side in SIDES:
                print(f"turn {turn + 1}: {side}", flush=True)
                ranks = common.run_ranks(__file__, job | {"side": side}, folder)
                taken[side].append(max(rank["seconds"] for rank in ranks))
    total_bytes = job["layers"] * job["layer_bytes"]
    results = [_figures(side, taken, total_bytes) for side in SIDES]
    common.show(
        f"Start from a cold cache: {arguments.layers} layers of {job['layer_bytes'] / 1e6:.0f} MB, "
        f"{arguments.ranks} ranks, {arguments.turns} turn(s)",
        ("side", "s", "GB/s", "rate to plain's (median over turns)"),
        [
            [r["side"], f"{r['seconds']:.2f}", f"{r['gb_per_s']:.2f}", f"{r['to_plain']:.2f}"]
            for r in results
        ],
        environment,
    )
    common.write_json(
        arguments.json, {"environment": environment, "settings": job, "results": results}
    )


def _figures(side: str, taken: dict[str, list[float]], total_bytes: int) -> dict[str, Any]:
    seconds = statistics.median(taken[side])
    pairs = zip(taken["plain"], taken[side], strict=True)
    return {
        "side": side,
        "turn_s": taken[side],
        "seconds": seconds,
        "gb_per_s": total_bytes / seconds / 1e9,
        "to_plain": statistics.median(plain / own for plain, own in pairs),
    }


def _files(job: dict[str, Any]) -> list[Path]:
    """Named as the frozen cache names them."""
    from fttrain.frozen.cache import file_of, layer_name

    return [file_of(Path(job["folder"]), layer_name(layer)) for layer in range(job["layers"])]


def _write_files(job: dict[str, Any]) -> None:
    """Bytes that no disk can compress."""
    piece = os.urandom(UNIT_BYTES)
    for number, path in enumerate(_files(job)):
        with open(path, "wb") as file:
            for unit in range(job["layer_bytes"] // UNIT_BYTES):
                file.write(unit.to_bytes(4, "little") + number.to_bytes(4, "little") + piece[8:])
            file.flush()
            os.fsync(file.fileno())


def _leave_page_cache(job: dict[str, Any]) -> None:
    for path in _files(job):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _run_rank(job_file: str) -> None:
    job = common.read_job(job_file)
    import torch

    from fttrain.distributed.process_group import process_group
    from fttrain.rig.config import RigConfig
    from fttrain.rig.device_setup import set_up

    set_up(RigConfig("cpu", 1), 0, job["ranks"])
    with process_group(torch.device("cpu")) as group:
        work = _work(job, group)
        work()
        group.barrier()
        if group.is_main:
            _leave_page_cache(job)
        group.barrier()
        started = time.perf_counter()
        kept = work()
        group.barrier()
        figures = {"seconds": time.perf_counter() - started}
        del kept
        group.barrier()
        common.report(job_file, figures)


def _work(job: dict[str, Any], group: Any) -> Callable[[], Any]:
    """What the clock measures, on this rank."""
    from fttrain.frozen.cache import FrozenCache
    from fttrain.memory.ledger import MemoryLedger
    from fttrain.memory.parts import MemoryPart
    from fttrain.store.loading import in_turn, reserve_layers, to_device

    layers, layer_bytes = job["layers"], job["layer_bytes"]
    base = FrozenCache(Path(job["folder"]), {})
    own = range(layers)[group.rank :: group.world_size]
    ledger, side = MemoryLedger(group), job["side"]
    if side == "plain":
        return lambda: [_read(base.path(layer)) for layer in own]
    if side == "stream":
        ledger.reserve(MemoryPart.HOST_LAYERS, layers * layer_bytes)
        on_host = ledger.allocate(MemoryPart.HOST_LAYERS).view(layers, layer_bytes)
        return lambda: [base.read(layer, on_host[layer]) for layer in own]
    size_bytes = layer_bytes // (group.world_size if side == "shard" else 1)
    offset_bytes = group.rank * size_bytes if side == "shard" else 0
    reserve_layers(ledger, layers, size_bytes)
    order = range(layers)
    if side == "replicate":
        order = in_turn(order, group.rank, group.world_size)
    return lambda: to_device(
        base, order, size_bytes, ledger, lambda done, total: None, offset_bytes
    )


def _read(path: Path) -> None:
    piece = bytearray(PIECE_BYTES)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(piece):
            pass


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--json", metavar="FILE", help="write the figures there")
    add("--layers", type=int, default=8)
    add("--layer-mb", type=int, default=441, help="million bytes of a layer")
    add("--ranks", type=int, default=2)
    add("--turns", type=int, default=3)
    add("--folder", metavar="DIR", help="where the files are put (default: TMPDIR)")
    add("--rank", metavar="JOB", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
