"""Held-out prompts, answered by the model before and after training."""

from dataclasses import dataclass
from typing import Any

from fttrain.data.chat import Chat, load_template
from fttrain.data.config import DataConfig
from fttrain.data.dataset import Dataset
from fttrain.data.encode import Encoder
from fttrain.data.records import BadRow

TEXT_PROMPT_TOKENS = 32  # the beginning of a plain text is the prompt, at most so long


@dataclass(frozen=True)
class HoldoutSample:
    """One held-out prompt and its answer in the data."""

    prompt: str  # the user's last message, or the beginning of a text
    reference: str
    ids: list[int]  # token ids of the whole conversation up to the answer


def holdout_samples(
    config: DataConfig, dataset: Dataset, tokenizer: Any, count: int
) -> list[HoldoutSample]:
    """The first ``count`` held-out examples that have a prompt, up to the last assistant turn."""
    encoder = Encoder(tokenizer)
    template = load_template(tokenizer, config.chat_template)
    chat = None
    samples: list[HoldoutSample] = []
    for messages in dataset.holdout_records:
        if len(samples) == count:
            break
        if messages[0]["role"] == "text":
            samples += _text(messages[0]["content"], encoder, tokenizer)
            continue
        chat = chat or Chat(tokenizer, template, config.loss_on)
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        try:
            encoded = encoder.encode([chat.prompt(messages[:last])]) if last else []
        except BadRow:
            continue  # the template writes this prompt only together with its answer
        for row in encoded:
            if not isinstance(row, BadRow):
                samples.append(
                    HoldoutSample(messages[last - 1]["content"], messages[last]["content"], row[0])
                )
    return samples[:count]


def _text(text: str, encoder: Encoder, tokenizer: Any) -> list[HoldoutSample]:
    ids = encoder.document(text)
    ids = ids[: min(len(ids) // 2, TEXT_PROMPT_TOKENS)]
    if not ids:
        return []
    prompt = tokenizer.decode(ids, skip_special_tokens=True)
    return [HoldoutSample(prompt, text[len(prompt) :], ids)]
