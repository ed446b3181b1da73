"""How fast a machine multiplies and copies, under the limits that ``fit70b.py`` sets it."""

import time
from functools import partial
from typing import Any

import common
import torch
from harness.fit_rank import end_by
from harness.link import GB, direction, paced
from harness.multiprocessors import limited, why_not_green

from fttrain.store import side_stream

# On CUDA and on the CPU: of each side of the matrices; of each buffer; seconds of multiplying
GEMM_SIZE = {"cuda": 8192, "cpu": 256}
COPY_BYTES = {"cuda": 1 << 28, "cpu": 1 << 22}
GEMM_S = {"cuda": 1.0, "cpu": 0.05}
GEMMS, COPIES = 10, 4  # between two looks at the clock
SLEEP_CYCLES = 1 << 28


def run_gauge(job_file: str) -> None:
    """Measure under the limits of a job, report."""
    job = common.read_job(job_file)
    end_by(job["ends_s"])
    torch.set_num_threads(job["threads"])
    device = torch.device("cuda", 0) if job["device"] == "cuda" else torch.device("cpu")
    with limited(job["limits"]["multiprocessors"], device), paced(job["limits"]["link"]):
        figures = rates(device)
    common.report(job_file, figures)


def rates(device: torch.device) -> dict[str, Any]:
    """Of bf16 GEMMs, and of copies each way; on CUDA also what limits are made of."""
    figures: dict[str, Any] = {"gemm_tflops": _gemm_tflops(device), "copy_gb_s": _copy_gb_s(device)}
    if device.type == "cuda":  # the clocks are up by now
        properties = torch.cuda.get_device_properties(device)
        figures["multiprocessors"] = properties.multi_processor_count
        figures["cycles_per_s"] = _cycles_per_s()
        figures["why_not_green"] = why_not_green(device)
    return figures


def _gemm_tflops(device: torch.device) -> float:
    size = GEMM_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.mm(a, b)  # bf16 (size, size); the library's own start is over
    _synchronize(device)
    began, done, taken_s = time.perf_counter(), 0, 0.0
    while taken_s < GEMM_S[device.type]:
        for _ in range(GEMMS):
            torch.mm(a, b, out=out)
        _synchronize(device)
        done, taken_s = done + GEMMS, time.perf_counter() - began
    return 2 * size**3 * done / taken_s / 1e12


def _copy_gb_s(device: torch.device) -> dict[str, float]:
    """Work of a side stream, out of page-locked memory and into it."""
    pinned = device.type == "cuda"
    size_bytes = COPY_BYTES[device.type]
    on_host = torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=pinned)
    other = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    return {
        direction(into, source): _rate(device, into, source) / GB
        for into, source in ((on_host, other), (other, on_host))
    }


def _rate(device: torch.device, into: torch.Tensor, source: torch.Tensor) -> float:
    """bytes/s."""
    own = side_stream.copy_stream(device)
    own.run(partial(side_stream.copy, into, source))
    own.synchronize()
    began = time.perf_counter()
    for _ in range(COPIES):
        own.run(partial(side_stream.copy, into, source))
    own.synchronize()
    return COPIES * into.nbytes / (time.perf_counter() - began)


def _cycles_per_s() -> float:
    """Of the clock that a waiting kernel counts."""
    torch.cuda._sleep(SLEEP_CYCLES // 8)
    torch.cuda.synchronize()
    began = time.perf_counter()
    torch.cuda._sleep(SLEEP_CYCLES)
    torch.cuda.synchronize()
    return SLEEP_CYCLES / (time.perf_counter() - began)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
