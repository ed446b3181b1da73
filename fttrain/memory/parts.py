"""The parts of a rank's memory: one name each, in the ledger, in plans, reports and advice."""

from enum import Enum


class Place(Enum):
    """Where a part lies."""

    DEVICE = "device"  # of a CPU that is host memory
    HOST = "host"  # in host memory, of this rank
    SHARED = "shared"  # in host memory, once for all ranks of the machine


class MemoryPart(Enum):
    """A part: its label in everything that people read, its place, and the settings that shrink it
    ("" where nothing does).
    """

    # The frozen base
    FROZEN_LAYERS = (
        "frozen layers",
        Place.DEVICE,
        "strategy=shard, stream or pipeline, or a smaller strategy.resident_layers",
    )
    SLOTS = ("layer slots", Place.DEVICE, "strategy.slots=2")
    DEQUANTIZED_WEIGHTS = ("dequantised weights", Place.DEVICE, "quant.dequant=tile")
    HOST_LAYERS = (
        "frozen layers in host memory",
        Place.SHARED,
        "strategy.resident_layers nearer to all",
    )
    HOST_LAYER_PARTITION = ("this rank's part of the frozen layers", Place.HOST, "")
    LAYER_STAGING = ("layers being loaded", Place.HOST, "")
    # Embedding and head
    EMBEDDING = ("embedding", Place.DEVICE, "embedding=host")
    HOST_EMBEDDING = ("embedding in host memory", Place.SHARED, "embedding=device")
    HOST_TABLE_PARTITION = ("this rank's part of embedding and head", Place.HOST, "")
    HEAD = ("head", Place.DEVICE, "head=nf4 or head=streamed")
    QUANTIZED_HEAD = ("head in 4 bits", Place.DEVICE, "")
    STREAMED_HEAD = ("head while it is used", Place.DEVICE, "head=nf4")
    HOST_HEAD = ("head in host memory", Place.SHARED, "head=nf4 or head=resident")
    LOGITS = ("logits", Place.DEVICE, "")
    TABLE_STAGING = ("table being loaded", Place.HOST, "")
    # Adapters and their optimizer
    ADAPTERS = (
        "adapters",
        Place.DEVICE,
        "optim.offload=true, optim=adamw8bit or a smaller lora.r",
    )
    GRADIENT_BUFFERS = ("gradient double buffer", Place.DEVICE, "")
    ADAPTER_MASTERS = ("adapter masters", Place.HOST, "a smaller lora.r")
    ADAPTER_GRADIENTS = ("adapter gradients", Place.HOST, "a smaller lora.r")
    ADAPTER_COPIES = ("adapter copies on their way to the device", Place.HOST, "a smaller lora.r")
    OPTIMIZER_MOMENTS = ("optimizer moments", Place.HOST, "optim=adamw8bit")
    # What a step leaves for backward
    ACTIVATIONS = (
        "activations",
        Place.DEVICE,
        "activations=recompute with boundaries=host, or a smaller schedule.group",
    )
    ACTIVATION_TRANSFERS = (
        "activations on their way",
        Place.DEVICE,
        "a smaller data.seq_len or loop.micro_batch_size",
    )
    LAYER_INPUTS = ("layer inputs", Place.HOST, "boundaries=device")
    OFFLOADED_ACTIVATIONS = ("activations on the host", Place.HOST, "activations=recompute")
    # All weights, or adapters under ZeRO
    TRAINED_WEIGHTS = ("trained weights", Place.DEVICE, "strategy.zero.offload_params=true")
    HOST_TRAINED_PARTITION = ("this rank's part of the trained weights", Place.HOST, "")
    GRADIENTS = ("gradients", Place.DEVICE, "strategy.zero.stage=2")
    FP32_MASTERS = ("fp32 masters", Place.DEVICE, "strategy.zero.offload_optimizer=true")
    MOMENTS = ("moments", Place.DEVICE, "strategy.zero.offload_optimizer=true")
    OPTIMIZER_STATE = (
        "masters and moments",
        Place.DEVICE,
        "strategy.zero.offload_optimizer=true",
    )
    HOST_OPTIMIZER_STATE = ("masters and moments in host memory", Place.HOST, "")
    # Beside the ledger: measured, or run on fake tensors
    WORKSPACE = ("workspace", Place.DEVICE, "")  # of kernels, and what they pass on
    ALLOCATOR_CACHE = ("held by the allocator", Place.DEVICE, "")
    CONTEXT = ("context, communication, other programs", Place.DEVICE, "")
    INTERPRETER = ("interpreter and libraries", Place.HOST, "")
    HOST_REMAINDER = ("interpreter, libraries, workspace", Place.HOST, "")  # of a CPU

    def __init__(self, label: str, place: Place, shrink: str) -> None:
        self.label = label
        self.place = place
        self.shrink = shrink

    @classmethod
    def of_label(cls, label: str) -> "MemoryPart":
        """The part of ``label``. Raises ValueError where there is none."""
        for part in cls:
            if part.label == label:
                return part
        raise ValueError(f"{label}: no part of memory is called so")
