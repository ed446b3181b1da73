"""Architectures, one page each: what the decoder must know that the config file does not say.

A family joins the table only with a test that compares its logits and gradients with transformers'.
"""

from transformers import PretrainedConfig

from fttrain.model.families import llama, mistral, qwen2, qwen3
from fttrain.model.families.family import Family
from fttrain.util.errors import UserError

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY)
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a checkpoint.

    Raises UserError for an architecture that is not in the table.
    """
    if config.model_type not in FAMILIES:
        raise UserError(
            f"model: architecture {config.model_type!r} is not supported; there are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[config.model_type]
