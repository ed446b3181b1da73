"""``fttrain data`` prints what the model will see."""

from pathlib import Path
from typing import Any

from rich.console import Console

from fttrain.cli.data import decode_dimmed, show
from fttrain.data.batch import IGNORE
from fttrain.data.config import DataConfig
from fttrain.data.dataset import prepare


def test_examples_report_and_table(make_tokenizer: Any, write: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    rows = [{"prompt": f"What is [{i}]?", "completion": f"It is {i}.", "id": i} for i in range(40)]
    path = write([*rows, {"prompt": "no answer"}, "{bad"])
    config = DataConfig(
        kind="file", path=path, on_bad_row="skip", seq_len=128, cache_dir=str(tmp_path)
    )
    data = prepare(config, tokenizer, "tiny")
    console = Console(record=True, width=100, color_system=None)
    show(console, data, tokenizer, 128, 4)
    text = console.export_text()
    assert "⟦It is " in text
    assert "What is [" in text  # brackets are no markup
    assert "42 rows read: 36 to train on, 4 held out" in text
    assert "1 skipped, missing field: data.jsonl:41" in text
    assert "1 skipped, not JSON: data.jsonl:42" in text
    assert "fields not used (rows): id (40)" in text
    for row in ("shortest", "median", "90 %", "longest", "trained tokens", "rows", "filled"):
        assert row in text
    assert f"{data.train.tokens:,}" in text


def test_masked_parts_are_dimmed(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("the cat sat", add_special_tokens=False)["input_ids"]
    labels = [IGNORE, *ids[1:]]
    text = decode_dimmed(tokenizer, (ids, labels))
    assert text.plain == "the cat sat"
    styles = [(text.plain[span.start : span.end], span.style) for span in text.spans]
    assert styles == [(tokenizer.decode(ids[:1]), "dim"), (tokenizer.decode(ids[1:]), "bold")]
