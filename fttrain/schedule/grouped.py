"""grouped(G): G micro-batches pass a layer together.

G = 1 runs all layers for one micro-batch, then for the next. G = all micro-batches of the step runs
one layer for all of them: its bytes are brought and dequantised once a pass, and its adapter
gradient is complete as soon as its backward ends.
"""

from fttrain.data.batch import MicroBatch
from fttrain.model.decoder import Decoder
from fttrain.schedule import layer_pass
from fttrain.schedule.activations import Policies
from fttrain.schedule.layer_pass import Gradients
from fttrain.schedule.step_runner import Dropout, StepRunner
from fttrain.store import Store


def forward_backward(
    decoder: Decoder,
    store: Store,
    micro_batches: list[MicroBatch],
    group_size: int,
    policies: Policies,
    dropout: Dropout,
    gradients: Gradients,
) -> StepRunner:
    """Forward and backward of one optimizer step. Return the runner, with the loss sum and whether
    memory ran out.

    Adapter gradients, of the loss SUM over all targets, are added to the buffer that ``gradients``
    binds in ``begin_layer``. A layer begins and ends once a group; the last end comes as soon as
    its last backward has been issued.
    """
    runner = StepRunner(decoder, policies, dropout)
    groups = [micro_batches[i : i + group_size] for i in range(0, len(micro_batches), group_size)]
    for number, group in enumerate(groups):
        for micro_batch in _with_tokens(group):
            runner.start(micro_batch)
        for layer in layer_pass.iterate_layers(decoder, store, range(len(store))):
            runner.forward(layer)
        runner.head()
        for layer in layer_pass.iterate_layers(decoder, store, range(len(store) - 1, -1, -1)):
            gradients.begin_layer(layer)
            runner.backward(layer)
            gradients.end_layer(layer, last=number == len(groups) - 1)
        runner.in_flight.clear()
    return runner


def evaluate(
    decoder: Decoder, store: Store, micro_batches: list[MicroBatch], group_size: int
) -> StepRunner:
    """Forward alone. Return the runner, with the loss sum over all targets and whether memory ran
    out.
    """
    runner = StepRunner(decoder, (), lambda micro_batch: None)
    for i in range(0, len(micro_batches), group_size):
        for micro_batch in _with_tokens(micro_batches[i : i + group_size]):
            runner.start(micro_batch)
        for layer in layer_pass.iterate_layers(decoder, store, range(len(store))):
            runner.forward_only(layer)
        runner.head_only()
        runner.in_flight.clear()
    return runner


def _with_tokens(group: list[MicroBatch]) -> list[MicroBatch]:
    return [micro_batch for micro_batch in group if micro_batch.lengths]
