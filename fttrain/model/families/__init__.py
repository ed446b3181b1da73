"""Model families, one page each: all that the decoder must know and the config file does not say.

A family joins the table only with a test that compares its logits and gradients with transformers'.
"""

from transformers import PretrainedConfig

from fttrain.model.families import llama, mistral, qwen2, qwen3
from fttrain.model.families.family import Family, check_supported
from fttrain.util.errors import UserError

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY)
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a checkpoint.

    Raises UserError for an architecture that is not in the table, or that states what the engine
    does not compute.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"model: architecture {config.model_type!r} is not supported; there are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    check_supported(family, config)
    return family
