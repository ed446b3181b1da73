"""The sides of ``fit70b.py``: shapes, settings and levers as plain data."""

from dataclasses import asdict, dataclass
from typing import Any

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
SHAPES: dict[str, dict[str, Any]] = {  # as config.json has them
    "llama3_70b": {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        **ROPE,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **ROPE,
    },
}
LAYERS_ON_CARD = {"llama3_70b": 30, "tiny": 2}  # of stream, chosen to fit beside the rest

Changes = dict[str, dict[str, Any]]  # by group of settings: strategy, schedule, placement, optim

# What is not frozen layers is where 24 GB need it to be.
USUAL: Changes = {
    "strategy": {},
    "schedule": {},
    "placement": {
        "activations": "recompute",
        "layer_inputs": "host",
        "embedding": "host",
        "lm_head": "host",
    },
    "optim": {"offload": True},
}
OFFLOAD = "activations=offload"
# (name, the sides that it has a turn with, what it changes of them)
LEVERS: tuple[tuple[str, tuple[str, ...], Changes], ...] = (
    (
        OFFLOAD,
        ("shard", "stream k=0"),
        {
            "placement": {"activations": "offload", "layer_inputs": "device"},  # it leaves none
            "schedule": {"micro_batch_group": 1},
        },
    ),
    (
        "optim.offload=false",
        ("shard", "stream k=0", "pipeline"),
        {"optim": {"offload": False}},
    ),
    ("optim.shard=true", ("shard", "stream k=0"), {"optim": {"shard": True}}),
    (
        "optim.shard=true optim.offload=false",
        ("shard", "stream k=0"),
        {"optim": {"shard": True, "offload": False}},
    ),
    (
        "lm_head=quantized",
        ("shard", "stream k=0", "pipeline"),
        {"placement": {"lm_head": "quantized"}},
    ),
)


@dataclass(frozen=True)
class Side:
    """A way to train, and the settings of each of fttrain's configuration groups that it takes."""

    name: str
    strategy: dict[str, Any]
    schedule: dict[str, Any]
    placement: dict[str, Any]
    optim: dict[str, Any]

    @property
    def settings(self) -> Changes:
        """By group."""
        return {name: value for name, value in asdict(self).items() if name != "name"}

    def changed(self, name: str, changes: Changes) -> "Side":
        """With ``changes``, and ``name`` behind its own."""
        return _side(f"{self.name} {name}", self.settings, changes)


def usual_sides(shape: str) -> list[Side]:
    """What runs where nothing is asked for; k: layers of ``stream`` that stay on the card."""
    some = LAYERS_ON_CARD[shape]
    return [
        _side(name, USUAL, {"strategy": strategy})
        for name, strategy in (
            ("shard", {"name": "shard"}),
            (f"stream k={some}", {"name": "stream", "resident_layers": some}),
            ("stream k=0", {"name": "stream", "resident_layers": 0}),
            ("pipeline", {"name": "pipeline"}),
        )
    ]


def lever_sides(shape: str) -> list[Side]:
    """The usual ones with one lever pulled."""
    usual = {side.name: side for side in usual_sides(shape)}
    return [usual[base].changed(name, changes) for name, bases, changes in LEVERS for base in bases]


def chosen_sides(shape: str, texts: list[str] | None, with_levers: bool) -> list[Side]:
    """Those that are called like one of ``texts``, or have one in their name that is no side's;
    None: the usual ones, and ``with_levers`` all.
    """
    every = usual_sides(shape) + lever_sides(shape)
    if texts is None:
        return every if with_levers else usual_sides(shape)
    names = {side.name for side in every}
    return [
        side
        for side in every
        if any(text == side.name or (text not in names and text in side.name) for text in texts)
    ]


def _side(name: str, settings: Changes, changes: Changes) -> Side:
    return Side(
        name, **{group: values | changes.get(group, {}) for group, values in settings.items()}
    )
