"""Tiny models of every family, and plain transformers + PEFT as the reference for them.

Shapes: hidden 64, 3 layers, 4 query heads over 2 key heads, vocabulary 300.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import bitsandbytes.functional as bnb
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fttrain.data.batch import IGNORE, MicroBatch, collate
from fttrain.frozen.quantize_layer import load_end, load_layer
from fttrain.frozen.readers import Reader
from fttrain.model.config import LoraConfig
from fttrain.model.decoder import Architecture, Decoder
from fttrain.model.layer_adapters import LayerAdapters
from fttrain.model.projection import ResidentHead
from fttrain.quant.checksum import checksum
from fttrain.quant.config import QuantConfig
from fttrain.quant.frozen_layer import FrozenFormat
from fttrain.schedule import grouped
from fttrain.schedule.activations import Keep, Recompute
from fttrain.store import Store
from fttrain.store.resident import ResidentStore
from fttrain.store.verify import VerifiedStore
from fttrain.strategy.grad_reduce import NoSync
from fttrain.strategy.gradients import ResidentGradients
from fttrain.util.errors import UserError

CPU = torch.device("cpu")
VOCABULARY = 300
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama_tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama_rope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    "llama_bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
    "mistral_full": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, SLIDING),
    "qwen2_tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "qwen3_sliding": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, **SLIDING}),
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLAIN = QuantConfig(kind="none", double_quant=False)


def model(name: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in fp32; norms and biases are away from the 1 and 0 they start at."""
    config_class, model_class, options = MODELS[name]
    torch.manual_seed(seed)
    built = model_class(config_class(**{**SHAPE, **options, **changes})).float().eval()
    for parameter_name, parameter in built.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
        elif "proj" in parameter_name:
            parameter.data.mul_(5)  # attention and MLP weigh as much as the residual
    return built


class StateDict:
    """A reader over tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def has(self, name: str) -> bool:
        return name in self.tensors

    def tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise UserError(f"memory: tensor {name} is missing from the checkpoint")
        return self.tensors[name]

    def rest(self) -> None:
        """Nothing is mapped."""


def load_ends(
    reader: Reader, architecture: Architecture, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Embedding, final norm and head in ``dtype`` on ``device``."""
    embedding, norm = (
        load_end(reader, architecture, end).to(device, dtype) for end in ("embedding", "final_norm")
    )
    if architecture.tied:
        return embedding, norm, embedding
    return embedding, norm, load_end(reader, architecture, "head").to(device, dtype)


def load_layers(
    reader: Reader,
    architecture: Architecture,
    frozen_format: FrozenFormat,
    device: torch.device,
) -> list[Tensor]:
    """The flat buffer of each layer."""
    return [
        load_layer(reader, architecture, frozen_format, layer, device)
        for layer in range(architecture.layers)
    ]


def build(
    source: PreTrainedModel,
    quant: QuantConfig = PLAIN,
    lora: LoraConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    mlp_tile_tokens: int = 0,
) -> tuple[Decoder, VerifiedStore]:
    """Our decoder over the weights of ``source``; adapters random, B not zero."""
    architecture, reader = Architecture(source.config), StateDict(source.state_dict())
    frozen_format = architecture.frozen_format(quant, dtype)
    embedding, norm, head = load_ends(reader, architecture, device, dtype)
    flats = load_layers(reader, architecture, frozen_format, CPU)  # the same codes everywhere
    flats = [flat.to(device) for flat in flats]
    store = verified(ResidentStore(flats, frozen_format), flats)
    own = adapters(architecture, lora, dtype, device)
    head = ResidentHead(head)
    decoder = Decoder(architecture, embedding, norm, head, own, mlp_tile_tokens=mlp_tile_tokens)
    randomise(decoder)
    return decoder, store


def adapters(
    architecture: Architecture,
    lora: LoraConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> list[LayerAdapters]:
    """Of every layer, at their start."""
    config, groups = lora or LoraConfig(r=4), architecture.groups
    made = [
        LayerAdapters(layer, groups, config, device, dtype) for layer in range(architecture.layers)
    ]
    for own in made:
        own.reset(0)
    return made


def verified(store: Store, flats: list[Tensor], every: int = 1) -> VerifiedStore:
    """``store`` of ``flats``, checked in every step."""
    return VerifiedStore(store, [int(checksum(flat)) for flat in flats], every)


def randomise(decoder: Decoder, seed: int = 1) -> None:
    """Adapters as after some training, on whatever rank a layer is."""
    for layer in decoder.layers:
        generator = torch.Generator().manual_seed(100 * seed + layer.index)
        whole = torch.zeros(layer.adapters.layout.values)
        for name, view in layer.adapters.named(whole):
            view.copy_(torch.randn(view.shape, generator=generator) * 0.05)
            if name.endswith("magnitude_vector"):
                view.add_(1)
        layer.adapters.load(whole)


def dequantised(source: PreTrainedModel, quant: QuantConfig) -> PreTrainedModel:
    """``source`` with each linear of its layers quantised and dequantised, in place."""
    if not quant.is_quantised:
        return source
    for name, parameter in source.named_parameters():
        if "layers" in name and name.endswith("proj.weight"):
            packed, state = bnb.quantize_4bit(
                parameter.data,
                blocksize=quant.blocksize,
                compress_statistics=quant.double_quant,
                quant_type=quant.kind,
            )
            parameter.data.copy_(bnb.dequantize_4bit(packed, state))
    return source


def with_peft(source: PreTrainedModel, decoder: Decoder, lora: LoraConfig) -> Any:
    """``source`` under plain PEFT, with the adapters of ``decoder``."""
    targets = LINEARS if lora.target_modules == "all-linear" else lora.target_modules
    peft_config = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=list(targets),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )
    peft = get_peft_model(source, peft_config, autocast_adapter_dtype=False)
    parameters = dict(peft.named_parameters())
    for name, master in named_masters(decoder):
        parameters[peft_name(name)].data.copy_(master)
    return peft


def named_masters(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Of all layers, as they are after the last update."""
    for layer in decoder.layers:
        yield from layer.adapters.named_masters()


def peft_name(name: str) -> str:
    """Our name of a master -> PEFT's parameter."""
    return f"base_model.model.{name}.default.weight"


def peft_gradients(peft: Any, decoder: Decoder) -> dict[str, Tensor]:
    """Gradients of PEFT's parameters under our names, fp32."""
    parameters = dict(peft.named_parameters())
    return {n: parameters[peft_name(n)].grad.float() for n, _ in named_masters(decoder)}


def gradients(decoder: Decoder) -> dict[str, Tensor]:
    """Copies of the adapter gradients, by the names of the masters."""
    found = {}
    for layer in decoder.layers:
        flat = layer.adapters.flat
        assert flat.grad is not None
        if layer.adapters.layout.shard.world_size > 1:  # a part does not end where a tensor does
            found[str(layer.index)] = flat.grad.clone()
            continue
        found |= {name: own.clone() for name, own in layer.adapters.named(flat.grad)}
    return found


def gradient_home(decoder: Decoder) -> ResidentGradients:
    """Gradients on the device, all zero."""
    home = ResidentGradients([layer.adapters for layer in decoder.layers], NoSync())
    home.start()
    return home


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of ``other``."""
    assert one.keys() == other.keys()
    apart = sum(float((one[n] - other[n]).double().square().sum()) for n in one)
    whole = sum(float(other[n].double().square().sum()) for n in other)
    return (apart / whole) ** 0.5


Document = tuple[list[int], list[int]]


def documents(lengths: Iterable[int], seed: int = 3, masked: float = 0.0) -> list[Document]:
    """Random (ids, labels); a fraction ``masked`` of the labels is IGNORE."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator)
        hidden = torch.rand(length, generator=generator) < masked
        made.append((ids.tolist(), ids.masked_fill(hidden, IGNORE).tolist()))
    return made


def reference_loss(reference: Any, batch: list[Document]) -> Tensor:
    """Loss SUM over the targets of separate documents, by plain cross entropy over full logits."""
    total = torch.zeros((), dtype=torch.float64)
    for ids, labels in batch:
        logits = reference(input_ids=torch.tensor([ids])).logits[0, :-1].float()
        target = torch.tensor(labels[1:], dtype=torch.int64)
        loss = torch.nn.functional.cross_entropy(
            logits, target, reduction="sum", ignore_index=IGNORE
        )
        total = total + loss
    return total


def run(
    decoder: Decoder,
    store: Store,
    micro_batches: list[MicroBatch],
    group_size: int = 1,
    activations: str = "recompute",
    dropout: Callable[[MicroBatch], Any] = lambda batch: None,
) -> tuple[float, dict[str, Tensor]]:
    """One step's forward and backward: (loss sum, gradients)."""
    attempt = grouped.forward_backward(
        decoder,
        store,
        micro_batches,
        group_size,
        [{"keep": Keep, "recompute": Recompute}[activations]()] * len(store),
        dropout,
        gradient_home(decoder),
    )
    return float(attempt.loss_sum), gradients(decoder)


def one_batch(batch: list[Document], index: int = 0) -> MicroBatch:
    return collate(batch, index)


def logits(decoder: Decoder, store: Store, batch: MicroBatch) -> Tensor:
    """(N, V) of a forward without gradients."""
    from fttrain.schedule import layer_pass

    work = layer_pass.start(decoder, batch, None, None)
    for layer in layer_pass.iterate_layers(decoder, store, range(len(store))):
        layer_pass.forward_only(decoder.layers[layer], work)
    return decoder.head.logits(work.hidden[: sum(batch.lengths)])  # the rest is padding
