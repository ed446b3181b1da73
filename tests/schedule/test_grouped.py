"""Packing, accumulation, grouping and what a layer keeps, through the whole schedule."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from fttrain.data.batch import IGNORE, MicroBatch, collate
from fttrain.model.config import LoraConfig
from fttrain.model.decoder import Decoder
from fttrain.model.linears import DropoutKey
from fttrain.quant.config import QuantConfig
from fttrain.schedule import grouped, layer_pass
from fttrain.schedule.activations import Keep, Policy, Recompute
from fttrain.schedule.config import ScheduleConfig
from fttrain.util.errors import UserError

LORA = LoraConfig(r=4, lora_alpha=10)
DROPOUT = LoraConfig(r=4, lora_alpha=10, lora_dropout=0.25)


def micro_batches(count: int = 4) -> list[MicroBatch]:
    return [collate(tiny.documents((9, 17, 4), seed=i, masked=0.3), i) for i in range(count)]


def masks_by_index(batch: MicroBatch) -> DropoutKey:
    return DropoutKey(seed=3, step=5, micro_batch=batch.index)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3_sliding"])
def test_packing_equals_separate_documents(name: str) -> None:
    decoder, store = tiny.build(tiny.model(name), QuantConfig(), LORA)
    documents = tiny.documents((20, 3, 1, 31), masked=0.2)
    loss, packed = tiny.run(decoder, store, [collate(documents, 0)])
    separate = [collate([document], i) for i, document in enumerate(documents)]
    separate_loss, apart = tiny.run(decoder, store, separate, group_size=4)
    assert loss == pytest.approx(separate_loss, rel=1e-6)
    assert tiny.difference(packed, apart) < 1e-5


def test_packing_never_trains_across_a_border() -> None:
    decoder, store = tiny.build(tiny.model(), tiny.PLAIN, LORA)
    first, second, other = tiny.documents((12, 15, 12))
    silent = (first[0], [IGNORE] * 12)
    loss, gradients = tiny.run(decoder, store, [collate([silent, second], 0)])
    alone_loss, alone = tiny.run(decoder, store, [collate([second], 0)])
    assert loss == pytest.approx(alone_loss, rel=1e-6)
    assert tiny.difference(gradients, alone) < 1e-5
    changed_loss, _ = tiny.run(decoder, store, [collate([(other[0], silent[1]), second], 0)])
    assert changed_loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("activations", ["recompute", "keep"])
def test_masked_and_empty_micro_batches_contribute_nothing(activations: str) -> None:
    decoder, store = tiny.build(tiny.model(), QuantConfig(), LORA)
    batches = micro_batches(2)
    ids, _ = tiny.documents((14,))[0]
    masked, empty = collate([(ids, [IGNORE] * 14)], 2), collate([], 3)
    loss, gradients = tiny.run(decoder, store, batches, 2, activations)
    more_loss, more = tiny.run(decoder, store, [*batches, masked, empty], 4, activations)
    assert more_loss == pytest.approx(loss, rel=1e-9)
    assert tiny.difference(more, gradients) < 1e-6
    nothing, zero = tiny.run(decoder, store, [masked, empty], 2, activations)
    assert nothing == 0
    assert not any(bool(gradient.any()) for gradient in zero.values())
    assert tiny.run(decoder, store, [empty], 1, activations)[0] == 0


@pytest.mark.parametrize("lora", [LORA, DROPOUT], ids=["plain", "dropout"])
def test_every_group_size_and_policy_gives_the_same(lora: LoraConfig) -> None:
    decoder, store = tiny.build(tiny.model("qwen3"), QuantConfig(), lora)
    reference = tiny.run(decoder, store, micro_batches(), 1, "keep", masks_by_index)
    for group_size in (1, 2, 3, 4):
        for activations in ("recompute", "keep"):
            loss, gradients = tiny.run(
                decoder, store, micro_batches(), group_size, activations, masks_by_index
            )
            assert loss == pytest.approx(reference[0], rel=1e-9)
            assert tiny.difference(gradients, reference[1]) < 1e-6, (group_size, activations)


def test_dropout_changes_the_gradient_and_evaluation_has_none() -> None:
    decoder, store = tiny.build(tiny.model(), QuantConfig(), DROPOUT)
    dropped, gradients = tiny.run(decoder, store, micro_batches(), 4, dropout=masks_by_index)
    plain, without = tiny.run(decoder, store, micro_batches(), 4)
    assert dropped != plain
    assert tiny.difference(gradients, without) > 1e-3
    evaluated = grouped.evaluate(decoder, store, [*micro_batches(), collate([], 4)], 3)
    assert float(evaluated.loss_sum) == pytest.approx(plain, rel=1e-9)


class Watched:
    """Gradients on the device that write down when their layers begin and end."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.home = decoder, tiny.gradient_home(decoder)
        self.log: list[tuple[str, int]] = []
        self.complete: list[tuple[int, Tensor]] = []

    def begin_layer(self, layer: int) -> None:
        self.log.append(("begin", layer))
        self.home.begin_layer(layer)

    def end_layer(self, layer: int, last: bool) -> None:
        self.log.append(("end", layer))
        if last:
            self.complete.append((layer, self.decoder.layers[layer].adapters.grad.clone()))


def pass_all(decoder: Decoder, store: Any, group_size: int) -> Watched:
    watched = Watched(decoder)
    grouped.forward_backward(
        decoder,
        store,
        micro_batches(),
        group_size,
        [Recompute()] * len(store),
        lambda batch: None,
        watched,
    )
    return watched


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_a_layers_gradient_is_complete_when_that_is_said(group_size: int) -> None:
    """Once for each layer, from the last to the first, and nothing is added afterwards; between
    begin and end no other layer begins.
    """
    decoder, store = tiny.build(tiny.model(), QuantConfig(), LORA)
    watched = pass_all(decoder, store, group_size)
    assert [layer for layer, _ in watched.complete] == [2, 1, 0]
    for layer, gradient in watched.complete:
        assert torch.equal(gradient, decoder.layers[layer].adapters.grad)
    turn = [(what, layer) for layer in (2, 1, 0) for what in ("begin", "end")]
    assert watched.log == turn * (4 // group_size)


class Watch:
    """A store that writes down what is asked of it."""

    def __init__(self, store: Any) -> None:
        self.store, self.log = store, list[tuple[str, Any]]()

    def __len__(self) -> int:
        return len(self.store)

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        def call(layer: Any) -> Any:
            self.log.append((name, layer))
            return getattr(self.store, name)(layer)

        return call


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_passes_over_the_store(group_size: int) -> None:
    """ceil(accumulation / G) passes up and down; before a layer is used it is asked for, with all
    that follow it in the pass; one layer is held at a time.
    """
    decoder, store = tiny.build(tiny.model(), QuantConfig(), LORA)
    watch = Watch(store)
    pass_all(decoder, watch, group_size)
    up_and_down = [[0, 1, 2], [1, 2], [2], [2, 1, 0], [1, 0], [0]]
    expected = [
        entry
        for following in up_and_down
        for entry in (
            ("prefetch", following),
            ("get", following[0]),
            ("release", following[0]),
        )
    ]
    log = [(what, list(at) if what == "prefetch" else at) for what, at in watch.log]
    assert log == expected * (4 // group_size)


def autograd_nodes(end: Any) -> Iterator[Any]:
    pending, seen = [end], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending += [following for following, _ in node.next_functions]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_keep_holds_the_stated_tensors_and_no_others(name: str) -> None:
    """A layer's input, q, k and v as projected, attention's output and lse, the second residual,
    gate and up: nothing dequantised, nothing normed, nothing of the MLP's width but gate and up.
    """
    decoder, store = tiny.build(tiny.model(name), QuantConfig(), DROPOUT)
    micro_batch = micro_batches(1)[0]
    batch = layer_pass.start(decoder, micro_batch, masks_by_index(micro_batch), None)
    tokens, a = len(batch.hidden), decoder.architecture
    qkv, attention = (a.heads + 2 * a.kv_heads) * a.head_dim, a.heads * a.head_dim
    stated = sorted(
        4 * tokens * width
        for width in (a.hidden, qkv, attention, a.heads, a.hidden, 2 * a.config.intermediate_size)
    )
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for layer in layer_pass.iterate_layers(decoder, store, range(1)):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer_pass.forward(decoder.layers[layer], batch, Keep())
    assert sorted(saved.values()) == stated
    _, (edge, _) = batch.saved[0]
    rotary = {tensor.data_ptr() for tensor in batch.rotary}  # shared by all layers
    for node in autograd_nodes(edge.node):
        for value in vars(node).values() if hasattr(node, "__dict__") else ():
            for tensor in value if isinstance(value, tuple) else (value,):
                assert not isinstance(tensor, Tensor) or tensor.data_ptr() in rotary, node


def test_recompute_saves_the_layer_input_only() -> None:
    decoder, store = tiny.build(tiny.model(), QuantConfig(), LORA)
    batch = layer_pass.start(decoder, micro_batches(1)[0], None, None)
    policy: Policy = Recompute()
    for layer in layer_pass.iterate_layers(decoder, store, range(len(store))):
        hidden = batch.hidden
        layer_pass.forward(decoder.layers[layer], batch, policy)
        assert batch.saved[-1][1] is hidden
        assert batch.hidden.grad_fn is None


def test_settings() -> None:
    assert [ScheduleConfig(g).size(4) for g in ("all", 1, 3, 9)] == [4, 1, 3, 4]
    for group in ("some", 0, -1):
        with pytest.raises(
            UserError, match=f"schedule.micro_batch_group={group}: all, or a whole number"
        ):
            ScheduleConfig(group)
    with pytest.raises(UserError, match=r"schedule.kind=zero_bubble: grouped or one_f_one_b"):
        ScheduleConfig(kind="zero_bubble")
