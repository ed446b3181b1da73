"""Each wait that orders streams is needed: the real code loses one, and a race must be found where
it was. That nothing races with all of them is what ``test_stream_order`` is for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import simulated_streams
import tiny
import torch
from tiny_streams import GROUPS, OFFLOAD, ON_HOST, PIPELINE, SHARD, STREAM, Settings, races

from fttrain.distributed.collectives import Handle, HandleGroup
from fttrain.model import projection
from fttrain.model.layer_adapters import LayerAdapters
from fttrain.schedule.pipeline_p2p import PendingRecv, PipelineP2P
from fttrain.store import side_stream
from fttrain.store.activations import HostActivations
from fttrain.store.host import HostStore
from fttrain.store.layer_inputs import HostLayerInputs
from fttrain.store.sharded import ShardedStore
from fttrain.store.side_stream import CudaSideStream, Task
from fttrain.store.slots import Slots
from fttrain.strategy import grad_reduce, optimizer_step
from fttrain.strategy.gradients import DoubleBufferedGradients


class Deaf(CudaSideStream):
    """Whoever waits for its work goes on at once."""

    def run(self, work: Task, after: Any = None) -> Handle:
        super().run(work, after)
        return HandleGroup(())


class Rash(CudaSideStream):
    """Its work does not wait for what the compute was asked before."""

    def run(self, work: Task, after: Any = None) -> Handle:
        return super().run(work, torch.cuda.Event())


Break = Callable[[pytest.MonkeyPatch], None]


def given(owner: Any, **streams: type[CudaSideStream]) -> Break:
    """``owner`` has these ``streams``."""
    make = owner.__init__

    def broken(self: Any, *args: Any) -> None:
        make(self, *args, **{name: kind(tiny.CPU, timed=True) for name, kind in streams.items()})

    return lambda patch: patch.setattr(owner, "__init__", broken)


def makes(module: Any, kind: type[CudaSideStream]) -> Break:
    """All side streams that ``module`` makes for copies are of that kind."""
    return lambda patch: patch.setattr(module, "copy_stream", lambda *_, **__: kind(tiny.CPU, True))


def does(owner: Any, name: str, instead: Callable[..., Any] = lambda *_: None) -> Break:
    """The method ``name`` of ``owner`` does nothing, or ``instead``."""
    return lambda patch: patch.setattr(owner, name, instead)


SLOT = "uint8 (2, *) of Slots.__init__"
BUFFER = "float32 (4096,) of DoubleBufferedGradients.__init__*"
NORMS = "float32 (4,) of DoubleBufferedGradients.__init__"
GRADIENT = "float32 (4096,) of ResidentGradients.__init__"
COPIES = "bfloat16 (4096,) of LayerAdapters.__init__"
LAYER_INPUT = "bfloat16 (64, 64) of Layer.__call__"
LAYER_INPUT_BACK = "bfloat16 (64, 64) of HostLayerInputs.prefetch"
GATE_UP = "bfloat16 (64, 256) of _ApplyLinears.forward*"
ACTIVATIONS_BACK = "uint8 (*) of HostActivations.bring"
HEAD = "bfloat16 (300, 64) of StreamedHead.on_device"
FREED = "it is freed on compute"


@dataclass(frozen=True)
class Fault:
    """What the real code has lost; of each race that must come of it (memory, the earlier access,
    the later one), with * for anything.
    """

    settings: Settings
    lose: Break
    found: Sequence[tuple[str, str, str]]


FAULTS = {
    "a side stream's handles": Fault(
        SHARD,
        does(side_stream._StreamHandle, "wait"),
        [
            (
                SLOT,
                "copy_ in *.all_gather writes *",
                "dequantize_4bit * reads it on compute",
            )
        ],
    ),
    "layers gathered at once": Fault(
        SHARD,
        given(ShardedStore, stream=Rash),
        [
            (
                SLOT,
                "dequantize_4bit * reads it on compute",
                "copy_ in *.all_gather writes *",
            )
        ],
    ),
    "layers copied": Fault(
        STREAM,
        given(HostStore, stream=Deaf),
        [(SLOT, "copy_ in HostStore._copy writes *", "dequantize_4bit * reads it on compute")],
    ),
    "layers copied at once": Fault(
        STREAM,
        given(HostStore, stream=Rash),
        [(SLOT, "dequantize_4bit * reads it on compute", "copy_ in HostStore._copy writes *")],
    ),
    "slots released": Fault(
        STREAM,
        does(Slots, "release", lambda self, layer: self._in_use.remove(layer)),
        [(SLOT, "dequantize_4bit * reads it on compute", "copy_ in HostStore._copy writes *")],
    ),
    "layer inputs out": Fault(
        ON_HOST,
        given(HostLayerInputs, out=Deaf),
        [
            (LAYER_INPUT, "copy_ * reads *", FREED),
            ("layer inputs", "copy_ * writes *", "copy_ in HostLayerInputs.prefetch reads *"),
        ],
    ),
    "layer inputs out at once": Fault(
        ON_HOST,
        given(HostLayerInputs, out=Rash),
        [(LAYER_INPUT, "add in Layer.__call__ writes it on compute", "copy_ * reads *")],
    ),
    "layer inputs back": Fault(
        ON_HOST,
        given(HostLayerInputs, back=Deaf),
        [
            (LAYER_INPUT_BACK, "copy_ * writes *", "_to_copy in rms_norm reads it on compute"),
            ("layer inputs", "copy_ * reads *", "copy_ in HostLayerInputs.save writes *"),
        ],
    ),
    "layer inputs back at once": Fault(
        ON_HOST,
        given(HostLayerInputs, back=Rash),
        [
            (LAYER_INPUT_BACK, "empty in * writes it on compute", "copy_ * writes *"),
            ("layer inputs", "copy_ in HostLayerInputs.save writes *", "copy_ * reads *"),
        ],
    ),
    "activations out": Fault(
        OFFLOAD,
        given(HostActivations, out=Deaf),
        [
            (GATE_UP, "copy_ * reads *", FREED),
            ("activations on the host", "copy_ * writes *", "copy_ * reads *"),
        ],
    ),
    "activations out at once": Fault(
        OFFLOAD,
        given(HostActivations, out=Rash),
        [(GATE_UP, "addmm_ * writes it on compute", "copy_ * reads *")],
    ),
    "activations back": Fault(
        OFFLOAD,
        given(HostActivations, back=Deaf),
        [(ACTIVATIONS_BACK, "copy_ * writes *", "silu_backward * reads it on compute")],
    ),
    "activations back at once": Fault(
        OFFLOAD,
        given(HostActivations, back=Rash),
        [(ACTIVATIONS_BACK, "empty_like * writes it on compute", "copy_ * writes *")],
    ),
    "gradients out": Fault(
        GROUPS,
        given(DoubleBufferedGradients, out=Deaf),
        [
            (
                BUFFER,
                "copy_ in DoubleBufferedGradients._leave reads *",
                "zero_ * writes it on compute",
            ),
            (
                "adapter gradients",
                "copy_ * writes *",
                "copy_ in DoubleBufferedGradients.begin_layer reads *",
            ),
        ],
    ),
    "gradients out at once": Fault(
        GROUPS,
        given(DoubleBufferedGradients, out=Rash),
        [
            (
                BUFFER,
                "add_ * writes it on compute",
                "copy_ in DoubleBufferedGradients._leave reads *",
            )
        ],
    ),
    "gradients back": Fault(
        GROUPS,
        given(DoubleBufferedGradients, back=Deaf),
        [(BUFFER, "copy_ * writes *", "add_ in * reads it on compute")],
    ),
    "gradients back at once": Fault(
        GROUPS,
        given(DoubleBufferedGradients, back=Rash),
        [
            (BUFFER, "copy_ in DoubleBufferedGradients._leave reads *", "copy_ * writes *"),
            (
                "adapter gradients",
                "copy_ in DoubleBufferedGradients._leave writes *",
                "copy_ * reads *",
            ),
        ],
    ),
    "gradients before the update": Fault(
        ON_HOST,
        does(DoubleBufferedGradients, "finish", lambda self: (self._norms, self._sync.wait())),
        [
            ("adapter gradients", "copy_ * writes *", "mul_ * reads it on thread optimizer"),
            (NORMS, "copy_ * writes *", "* reads it on compute"),
        ],
    ),
    "weights before the forward": Fault(
        ON_HOST,
        makes(optimizer_step, Deaf),
        [(COPIES, "copy_ in LayerAdapters.send writes *", "addmm_ * reads it on compute")],
    ),
    "an update before the next one": Fault(
        ON_HOST,
        does(optimizer_step._WeightsHandle, "wait"),
        [("adapter copies on *", "copy_ * reads *", "copy_ * writes it on thread optimizer")],
    ),
    "the head": Fault(
        ON_HOST,
        makes(projection, Deaf),
        [(HEAD, "copy_ * writes *", "mm in ResidentHead.project reads it on compute")],
    ),
    "the head at once": Fault(
        ON_HOST,
        makes(projection, Rash),
        [(HEAD, "empty_like * writes it on compute", "copy_ * writes *")],
    ),
    "sums before the norms": Fault(
        {},
        does(grad_reduce._CudaTimer, "wait", lambda self: (0.0, 0.0)),
        [(GRADIENT, "mul_ in * writes *", "linalg_vector_norm * reads it on compute")],
    ),
    "sums before they leave": Fault(
        ON_HOST,
        does(grad_reduce._EventHandle, "wait"),
        [(BUFFER, "mul_ in * writes *", "copy_ in DoubleBufferedGradients._leave reads *")],
    ),
    "backward before the sums": Fault(
        {},
        does(simulated_streams.Stream, "wait_stream"),
        [(GRADIENT, "add_ in * writes it on compute", "mul_ in * reads *")],
    ),
    "gathers on their side stream": Fault(
        SHARD,
        does(side_stream, "_finish", lambda work: work()),
        [(SLOT, "copy_ in *.all_gather writes *", "* reads it on compute")],
    ),
    "parts of weights": Fault(
        {**SHARD, "shard": True},
        does(LayerAdapters, "ready"),
        [(COPIES, "mul_ in *.all_gather writes *", "addmm_ * reads it on compute")],
    ),
    "what a stage receives": Fault(
        PIPELINE,
        does(PendingRecv, "tensor", lambda self: self.buffer),
        [("* of PipelineP2P.receive*", "fill_ * writes *", "* reads it on compute")],
    ),
    "what a stage sends": Fault(
        PIPELINE,
        does(PipelineP2P, "flush", lambda self: self._sending.clear()),
        [(LAYER_INPUT, "clone in Communicator.send reads *", FREED)],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wait_that_is_missing_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    fault.lose(monkeypatch)
    found = races(fault.settings)
    for expected in fault.found:
        assert any(race.is_like(*expected) for race in found), (expected, found)
