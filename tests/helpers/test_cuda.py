"""The whole path of a step on a GPU, against the same step on the CPU."""

import pytest
import tiny
import tiny_strategy
import torch

from fttrain.data.batch import collate
from fttrain.distributed.rank_group import RankGroup
from fttrain.model.config import LoraConfig
from fttrain.model.linears import DropoutKey
from fttrain.optim.config import OptimConfig
from fttrain.quant.config import QuantConfig
from fttrain.strategy.data_parallel import DataParallel

pytestmark = pytest.mark.cuda
LENGTHS = (20, 5, 33, 1, 70)


def gradients(
    name: str, device: str, activations: str, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Adapter gradients of one packed micro-batch over an NF4 base, on the CPU."""
    where = torch.device(device)
    lora = LoraConfig(r=4, lora_alpha=10)
    decoder, store = tiny.build(tiny.model(name), QuantConfig(), lora, dtype, where)
    tiny.randomise(decoder)
    batch = collate(tiny.documents(LENGTHS), 0)
    tiny.run(decoder, store, [batch], 1, activations, lambda batch: DropoutKey(0, 0, batch.index))
    return {key: value.cpu() for key, value in tiny.gradients(decoder).items()}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_gradients_equal_the_cpu(name: str) -> None:
    on_gpu, on_cpu = (gradients(name, device, "recompute") for device in ("cuda", "cpu"))
    exact = gradients(name, "cpu", "recompute", torch.float32)
    # Both round to bf16 in the same places; these models make a tenth and more of that.
    assert tiny.difference(on_gpu, on_cpu) < tiny.difference(on_cpu, exact) / 2
    kept = gradients(name, "cuda", "keep")
    assert tiny.difference(on_gpu, kept) < 1e-3  # flash attention's backward adds in any order


def test_steps_lower_the_loss_and_their_state_comes_back() -> None:
    group = RankGroup(0, 1, 0, torch.device("cuda"))

    def build() -> DataParallel:
        decoder, store = tiny.build(
            tiny.model(), QuantConfig(), LoraConfig(r=4), torch.bfloat16, group.device
        )
        for layer in decoder.layers:
            layer.adapters.reset(0)
        return tiny_strategy.data_parallel(decoder, store, group, OptimConfig(lr=1e-2))

    trained, batches = build(), [collate(tiny.documents(LENGTHS), 0)]
    losses = [
        trained.train_step(batches, step, 1e-2, lambda loss, norm: True).loss for step in range(8)
    ]
    assert losses[-1] < losses[0] - 0.1
    resumed = build()
    resumed.load_adapter_state({k: v.cpu() for k, v in trained.adapter_state().items()})
    resumed.load_optimizer_state({k: v.cpu() for k, v in trained.optimizer_state().items()})
    loss, expected = resumed.evaluate(batches), trained.evaluate(batches)
    assert loss.mean("nll") == pytest.approx(expected.mean("nll"), rel=1e-6)
    resumed.train_step(batches, 8, 1e-2, lambda loss, norm: True)
    assert len(resumed.generate([[3, 4, 5], [6]], 4, set())[0]) == 4
