from pathlib import Path
from typing import Any

import pytest

from fttrain.data.config import DataConfig
from fttrain.data.dataset import prepare
from fttrain.data.samples import holdout_samples


@pytest.mark.parametrize("style", ["chatml", "llama3", "mistral", "qwen3"])
def test_held_out_prompts(make_tokenizer: Any, write: Any, tmp_path: Path, style: str) -> None:
    tokenizer = make_tokenizer(style)
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(30)]
    config = DataConfig(kind="file", path=write(rows), holdout=0.3, cache_dir=str(tmp_path))
    data = prepare(config, tokenizer, "tiny")
    samples = holdout_samples(config, data, tokenizer, 3)
    assert len(samples) == 3
    held = [record[0]["content"] for record in data.holdout_records[:3]]
    assert [sample.prompt for sample in samples] == held
    for sample in samples:
        number = sample.prompt.removeprefix("What is ").removesuffix("?")
        assert sample.reference == f"It is {number}."
        messages = [{"role": "user", "content": sample.prompt}]
        assert sample.ids == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )


def test_held_out_texts(make_tokenizer: Any, write: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("none")
    texts = [f"the cat number {i} sat on the mat" for i in range(20)]
    path = write([{"text": text} for text in texts])
    config = DataConfig(kind="file", path=path, cache_dir=str(tmp_path))
    data = prepare(config, tokenizer, "tiny")
    (first, _) = holdout_samples(config, data, tokenizer, 5)
    assert first.prompt + first.reference in texts
    assert first.ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in first.ids
