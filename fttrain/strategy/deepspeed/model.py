"""transformers' model over the frozen base, with PEFT's adapters or with all weights to train.

Adapters have the names of native strategies, ``model.layers.0.self_attn.q_proj.lora_A``. Whole
weights have transformers' names, ``model.layers.0.self_attn.q_proj.weight``.

Legend: N tokens, C hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fttrain.data.batch import MicroBatch
from fttrain.model.attention_op import NAME as ATTENTION
from fttrain.model.layer_adapters import LayerAdapters
from fttrain.model.linears import DropoutKey, dropout_mask
from fttrain.model.lora import target_indices
from fttrain.quant.checksum import checksum
from fttrain.quant.frozen_layer import FrozenLayer
from fttrain.store import FrozenBase
from fttrain.store.loading import Progress
from fttrain.strategy.context import BuildContext
from fttrain.strategy.deepspeed.head import LossHead
from fttrain.strategy.deepspeed.linear4bit import linear4bit
from fttrain.util.errors import UserError

LayerLoaded = Callable[[nn.Module], None]  # called with each layer once its weights are loaded
ADAPTER = "default"  # PEFT's name of the one adapter


class Causal(nn.Module):
    """The module under the engine: a micro-batch -> its loss, or the logits of some tokens."""

    def __init__(self, model: Any, dropouts: "list[SeededDropout]") -> None:
        super().__init__()
        self.model = model
        self._dropouts = dropouts

    def forward(self, batch: MicroBatch, tokens: list[int] | None = None) -> Tensor:
        """The loss sum, fp64 (), in training; else the metrics' sums, fp64 (metrics,). With
        ``tokens``, rows of the batch, their logits (len(tokens), V) instead.
        """
        hidden = self.model.model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            lengths=batch.lengths,
            use_cache=False,
        ).last_hidden_state[0]  # (N, C)
        if tokens is not None:
            logits: Tensor = self.model.lm_head(hidden[tokens])
            return logits
        sums: Tensor = self.model.lm_head(
            hidden[batch.trained], batch.targets[batch.trained], batch.target_counts
        )
        return sums

    def set_dropout_key(self, key: DropoutKey) -> None:
        """Draw all dropout masks from ``key`` from here on, also where a layer is recomputed."""
        for dropout in self._dropouts:
            dropout.key = key

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of all trained parameters."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield adapter_name(name), parameter


def adapter_name(name: str) -> str:
    """PEFT's name of a parameter -> the native strategies' name."""
    return name.removesuffix(f".{ADAPTER}.weight")


class SeededDropout(nn.Module):
    """Dropout for PEFT's adapters with the masks of the native strategies."""

    def __init__(self, probability: float, layer: int, module: str) -> None:
        super().__init__()
        self.probability, self.layer, self.module = probability, layer, module
        self.key: DropoutKey | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (1, N, in) -> (1, N, in), masked and scaled."""
        if not self.training or self.key is None:
            return x
        return x * dropout_mask(x[0], self.probability, self.key, self.layer, self.module)


def load(
    context: BuildContext, base: FrozenBase, progress: Progress, loaded: LayerLoaded
) -> Causal:
    """The model on the rank's device, adapters at their initial values.

    ``loaded(layer)`` is called for each layer in turn and may partition it.
    """
    architecture, lora = context.architecture, context.spec.lora
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            architecture.config, attn_implementation=ATTENTION, dtype=context.dtype
        )
    model.config.use_cache = False
    model.model.rotary_emb = architecture.family.rotary_class(architecture.config).to(
        context.group.device
    )
    _load_ends(context, base, model)
    model.requires_grad_(not lora.r)
    for layer in range(architecture.layers):
        _load_layer(context, base, model.model.layers[layer], layer)
        progress(layer + 1, architecture.layers)
    dropouts = _add_adapters(context, model) if lora.r else []
    for layer in model.model.layers:
        loaded(layer)
    if context.spec.placement.activations == "recompute":
        # transformers 5.23 renamed it and warns of the old name
        old = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    return Causal(model, dropouts)


def initial_adapters(context: BuildContext) -> dict[str, Tensor]:
    """The adapters' initial values by name, fp32 in host memory, the same as of native strategies
    with the same seed.
    """
    return {
        name: master.clone() for layer in layouts(context) for name, master in layer.named_masters()
    }


def layouts(context: BuildContext) -> Iterator[LayerAdapters]:
    """Each layer's adapters at their initial values, in host memory, with the layout of the flat
    tensors in snapshots.
    """
    host, spec = torch.device("cpu"), context.spec
    for layer in range(context.architecture.layers):
        adapters = LayerAdapters(layer, context.architecture.groups, spec.lora, host, torch.float32)
        adapters.reset(spec.seed)
        yield adapters


def _load_ends(context: BuildContext, base: FrozenBase, model: Any) -> None:
    architecture, device = context.architecture, context.group.device

    def read(name: str, *shape: int) -> nn.Parameter:
        table = torch.empty(shape, dtype=context.dtype)
        base.read_end(name, table)
        return nn.Parameter(table.to(device))

    shape = int(architecture.config.vocab_size), architecture.hidden
    model.model.embed_tokens.weight = read("embedding", *shape)
    model.model.norm.weight = read("final_norm", architecture.hidden)
    head = model.model.embed_tokens.weight if base.tied else read("head", *shape)
    model.lm_head = LossHead(
        head,
        architecture.family.logit_scale(architecture.config),
        context.spec.z_loss,
        context.spec.objective,
    )


def _load_layer(context: BuildContext, base: FrozenBase, layer: nn.Module, index: int) -> None:
    """Load the frozen bytes of a layer into transformers' modules. Weights that are not quantised
    are views of them.
    """
    flat = torch.empty(context.layer_bytes, dtype=torch.uint8)
    base.read(index, flat)
    expected = base.checksum(index)
    if expected is not None and int(checksum(flat)) != expected:
        raise UserError(
            f"layer {index}: its bytes are not those that {base.path(index)} was made with "
            "(checksum); the disk or the memory is failing; `fttrain quantize` verifies the file"
        )
    frozen = FrozenLayer(flat.to(context.group.device), context.frozen_format)
    trains = not context.spec.lora.r
    for group in context.architecture.groups:
        bias = frozen.bias(group.shape.name)
        for member, (path, rows) in enumerate(zip(group.paths, group.shape.rows, strict=True)):
            if context.spec.quant.is_quantised:
                parent, _, name = path.rpartition(".")
                linear = linear4bit(frozen, group.shape, member, context)
                setattr(layer.get_submodule(parent), name, linear)
            else:
                linear = layer.get_submodule(path)
                weight = frozen.weight(group.shape.name)[rows]
                linear.weight = nn.Parameter(weight, requires_grad=trains)
            if bias is not None:
                linear.bias = nn.Parameter(bias[rows], requires_grad=trains)
    for name, parameter in list(layer.named_parameters()):
        if parameter.is_meta:  # a norm
            owner, _, leaf = name.rpartition(".")
            value = nn.Parameter(frozen.tensor(name), requires_grad=trains)
            setattr(layer.get_submodule(owner), leaf, value)


def _add_adapters(context: BuildContext, model: Any) -> list[SeededDropout]:
    """Add PEFT's adapters to the linears, with the initial values of native strategies. Return
    their dropouts.
    """
    lora = context.spec.lora
    targets = target_indices(context.architecture.groups, lora)
    names = [
        group.paths[member].rpartition(".")[2]
        for group in context.architecture.groups
        for member in targets[group.shape.name]
    ]
    config = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]
        target_modules=names,
        use_rslora=lora.use_rslora,
    )
    inject_adapter_in_model(config, model, ADAPTER)
    initial = initial_adapters(context)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = initial[adapter_name(name)].to(context.group.device, context.dtype)
    return _seed_dropouts(context, model, targets) if lora.lora_dropout else []


def _seed_dropouts(
    context: BuildContext, model: Any, targets: dict[str, list[int]]
) -> list[SeededDropout]:
    dropouts = []
    for index, layer in enumerate(model.model.layers):
        for group in context.architecture.groups:
            for member in targets[group.shape.name]:
                module = f"{group.shape.name}.{member}"
                dropout = SeededDropout(context.spec.lora.lora_dropout, index, module)
                layer.get_submodule(group.paths[member]).lora_dropout[ADAPTER] = dropout
                dropouts.append(dropout)
    return dropouts
