"""QLoRA on one page: a 4-bit frozen base, adapters that train, and the engine's own classes.

There are no settings files, no ranks and no caches here. The model is a small Llama with random
weights, so the script needs no download and runs on a CPU in seconds:

    python examples/minimal_qlora.py

Legend: N tokens of a micro-batch, V vocabulary.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fttrain.data.batch import MicroBatch, collate
from fttrain.frozen.quantize_layer import load_layer
from fttrain.model.config import LoraConfig
from fttrain.model.decoder import Architecture, Decoder
from fttrain.model.layer_adapters import LayerAdapters
from fttrain.model.projection import ResidentHead
from fttrain.optim.config import OptimConfig
from fttrain.optim.optimizer import Optimizer
from fttrain.quant.config import QuantConfig
from fttrain.schedule import grouped
from fttrain.schedule.activations import Recompute
from fttrain.store.resident import ResidentStore
from fttrain.strategy.grad_reduce import NoSync
from fttrain.strategy.gradients import ResidentGradients

CPU, DTYPE = torch.device("cpu"), torch.bfloat16
STEPS, MICRO_BATCHES, LR = 20, 4, 5e-3
VOCABULARY = 256  # one token a byte


class Checkpoint:
    """The weights of a transformers model, read by name as a file of safetensors would be."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.weights = model.state_dict()

    def has(self, name: str) -> bool:
        return name in self.weights

    def tensor(self, name: str) -> torch.Tensor:
        return self.weights[name]

    def rest(self) -> None:
        """Nothing is mapped from disk."""


def micro_batches() -> list[MicroBatch]:
    """One optimizer step's rows: short sentences, a token a byte, without padding."""
    sentences = [f"{a} times {b} is {a * b}. " for a in range(2, 10) for b in range(2, 10)]
    documents = [(list(text.encode()), list(text.encode())) for text in sentences]
    return [collate(documents[i::MICRO_BATCHES], i) for i in range(MICRO_BATCHES)]


def main() -> list[float]:
    """Train the adapters and return the loss of each step in nats a token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,  # random logits that differ
    )
    source = LlamaForCausalLM(config)
    checkpoint = Checkpoint(source)

    # 1. The frozen base is data: each layer becomes one flat uint8 buffer of NF4 codes and scales.
    architecture = Architecture(config)
    frozen_format = architecture.frozen_format(QuantConfig(kind="nf4"), DTYPE)
    layers = range(architecture.layers)
    flats = [load_layer(checkpoint, architecture, frozen_format, layer, CPU) for layer in layers]
    store = ResidentStore(flats, frozen_format)  # every layer stays on the device

    # 2. The adapters are the model: one flat fp32 parameter a layer is all that trains.
    lora = LoraConfig(r=16, lora_alpha=32)
    adapters = [LayerAdapters(i, architecture.groups, lora, CPU, DTYPE) for i in layers]
    for layer in adapters:
        layer.reset(seed=0)  # A random, B zero
    embedding = checkpoint.tensor("model.embed_tokens.weight").to(DTYPE)  # (V, C)
    final_norm = checkpoint.tensor("model.norm.weight").to(DTYPE)  # (C,)
    head = ResidentHead(checkpoint.tensor("lm_head.weight").to(DTYPE))  # (V, C)
    decoder = Decoder(architecture, embedding, final_norm, head, adapters)

    # 3. The schedule runs a layer for all micro-batches of the step before it runs the next one.
    policies = [Recompute()] * len(store)  # only a layer's input is kept for its backward
    gradients = ResidentGradients(adapters, NoSync())  # fp32; one rank has nothing to sum
    optimizer = Optimizer(
        [(layer.flat, layer.layout.local_sections()) for layer in adapters], OptimConfig(lr=LR)
    )

    batches, losses = micro_batches(), []
    targets = sum(batch.valid_tokens for batch in batches)
    for step in range(1, STEPS + 1):
        gradients.start()
        result = grouped.forward_backward(
            decoder, store, batches, len(batches), policies, lambda batch: None, gradients
        )
        gradients.finish()
        for index, layer in enumerate(adapters):
            layer.grad.div_(targets)  # the gradient of the loss sum becomes that of the mean
            optimizer.step(index, LR)
            layer.refresh()  # bf16 copies of the fp32 masters, for the next forward
        losses.append(float(result.loss_sum) / targets)
        print(f"step {step:2}  loss {losses[-1]:.4f} nats/token")
    frozen, trained = (sum(t.nbytes for t in group) for group in (flats, decoder.parameters()))
    print(f"frozen base {frozen / 2**20:.2f} MiB, adapters (fp32) {trained / 2**20:.2f} MiB")
    return losses


if __name__ == "__main__":
    main()
