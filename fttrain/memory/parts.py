"""The parts of a rank's memory: one name each, in the ledger, in plans, reports and advice."""

from enum import Enum


class Location(Enum):
    """The location of a part."""

    DEVICE = "device"  # for a CPU that is host memory
    HOST = "host"  # in host memory, of this rank
    SHARED = "shared"  # in host memory, once for all ranks of the machine


class MemoryPart(Enum):
    """A part: its label in tables, JSON and messages, its location, and the settings that shrink it
    ("" where none does).
    """

    # The frozen base
    FROZEN_LAYERS = (
        "frozen layers",
        Location.DEVICE,
        "strategy=shard, stream or pipeline, or a smaller strategy.resident_layers",
    )
    SLOTS = ("layer slots", Location.DEVICE, "strategy.slots=2")
    DEQUANTIZED_WEIGHTS = ("dequantised weights", Location.DEVICE, "quant.dequant=tile")
    HOST_LAYERS = (
        "frozen layers in host memory",
        Location.SHARED,
        "strategy.resident_layers nearer to all",
    )
    HOST_LAYER_PARTITION = ("this rank's part of the frozen layers", Location.HOST, "")
    LAYER_STAGING = ("layers being loaded", Location.HOST, "")
    # Embedding and head
    EMBEDDING = ("embedding", Location.DEVICE, "embedding=host")
    HOST_EMBEDDING = ("embedding in host memory", Location.SHARED, "embedding=device")
    HOST_TABLE_PARTITION = ("this rank's part of embedding and head", Location.HOST, "")
    HEAD = ("head", Location.DEVICE, "lm_head=quantized or lm_head=host")
    QUANTIZED_HEAD = ("head in 4 bits", Location.DEVICE, "")
    STREAMED_HEAD = ("head while it is used", Location.DEVICE, "lm_head=quantized")
    HOST_HEAD = ("head in host memory", Location.SHARED, "lm_head=quantized or lm_head=device")
    LOGITS = ("logits", Location.DEVICE, "")
    TABLE_STAGING = ("table being loaded", Location.HOST, "")
    # Adapters and their optimizer
    ADAPTERS = (
        "adapters",
        Location.DEVICE,
        "optim.offload=true, optim=adamw8bit or a smaller lora.r",
    )
    GRADIENT_BUFFERS = ("gradient double buffer", Location.DEVICE, "")
    ADAPTER_MASTERS = ("adapter masters", Location.HOST, "a smaller lora.r")
    ADAPTER_GRADIENTS = ("adapter gradients", Location.HOST, "a smaller lora.r")
    ADAPTER_COPIES = (
        "adapter copies on their way to the device",
        Location.HOST,
        "a smaller lora.r",
    )
    OPTIMIZER_MOMENTS = ("optimizer moments", Location.HOST, "optim=adamw8bit")
    # Tensors that forward saves for backward
    ACTIVATIONS = (
        "activations",
        Location.DEVICE,
        "activations=recompute with layer_inputs=host, or a smaller schedule.micro_batch_group",
    )
    ACTIVATION_TRANSFERS = (
        "activations on their way",
        Location.DEVICE,
        "a smaller data.seq_len or loop.micro_batch_size",
    )
    LAYER_INPUTS = ("layer inputs", Location.HOST, "layer_inputs=device")
    OFFLOADED_ACTIVATIONS = ("activations on the host", Location.HOST, "activations=recompute")
    # All weights, or adapters under ZeRO
    TRAINED_WEIGHTS = ("trained weights", Location.DEVICE, "strategy.zero.offload_params=true")
    HOST_TRAINED_PARTITION = ("this rank's part of the trained weights", Location.HOST, "")
    GRADIENTS = ("gradients", Location.DEVICE, "strategy.zero.stage=2")
    FP32_MASTERS = ("fp32 masters", Location.DEVICE, "strategy.zero.offload_optimizer=true")
    MOMENTS = ("moments", Location.DEVICE, "strategy.zero.offload_optimizer=true")
    OPTIMIZER_STATE = (
        "masters and moments",
        Location.DEVICE,
        "strategy.zero.offload_optimizer=true",
    )
    HOST_OPTIMIZER_STATE = ("masters and moments in host memory", Location.HOST, "")
    # Outside the ledger: measured, or run on fake tensors
    WORKSPACE = ("workspace", Location.DEVICE, "")  # of kernels, and tensors between them
    ALLOCATOR_CACHE = ("held by the allocator", Location.DEVICE, "")
    CONTEXT = ("context, communication, other programs", Location.DEVICE, "")
    INTERPRETER = ("interpreter and libraries", Location.HOST, "")
    HOST_REMAINDER = ("interpreter, libraries, workspace", Location.HOST, "")  # of a CPU

    def __init__(self, label: str, location: Location, shrink: str) -> None:
        self.label = label
        self.location = location
        self.shrink = shrink

    @classmethod
    def of_label(cls, label: str) -> "MemoryPart":
        """The part of ``label``. Raises ValueError where there is none."""
        for part in cls:
            if part.label == label:
                return part
        raise ValueError(f"{label}: no part of memory has this label")
