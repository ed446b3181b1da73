import json
import multiprocessing
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fttrain.data.batch import IGNORE
from fttrain.data.config import DataConfig
from fttrain.data.dataset import Dataset, prepare
from fttrain.util.errors import UserError

MESSAGES = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def qa(number: int, answer: str | None = None) -> dict[str, str]:
    return {"prompt": f"What is {number}?", "completion": answer or f"It is {number}."}


@pytest.fixture
def ready(make_tokenizer: Any, tmp_path: Path) -> Any:
    """ready(path, tokenizer=chatml, **settings) -> Dataset, cached under tmp_path."""

    def ready(
        path: str, tokenizer: Any = None, rows_per_step: int | None = None, **more: Any
    ) -> Dataset:
        more = {"seq_len": 64, "cache_dir": str(tmp_path / "cache"), **more}
        config = DataConfig(kind="file", path=path, **more)
        return prepare(config, tokenizer or make_tokenizer(), "tiny", rows_per_step)

    return ready


def documents(rows: Any) -> list[tuple[list[int], list[int]]]:
    return [document for row in rows for document in row]


def texts(rows: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(ids) for ids, _ in documents(rows)]


def test_rows_hold_whole_documents_with_their_labels(
    ready: Any, write: Any, make_tokenizer: Any
) -> None:
    tokenizer = make_tokenizer()
    examples = [qa(i) for i in range(40)]
    data = ready(write(examples), seq_len=128, holdout=0.0)
    assert len(data.holdout) == 0
    assert sorted(texts(data.train, tokenizer)) == sorted(
        tokenizer.apply_chat_template(
            [
                {"role": "user", "content": example["prompt"]},
                {"role": "assistant", "content": example["completion"]},
            ],
            tokenize=False,
        )
        for example in examples
    )
    for row in data.train:
        assert sum(len(ids) for ids, _ in row) <= 128
    for ids, labels in documents(data.train):
        kept = [label for label in labels if label != IGNORE]
        assert tokenizer.decode(kept).startswith("It is ")
        assert kept[-1] == tokenizer.eos_token_id  # also the pad token
        assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    lengths = [len(ids) for ids, _ in documents(data.train)]
    assert data.train.tokens == sum(lengths) == data.train.row_tokens.sum()
    assert data.train.trained_tokens == sum(
        label != IGNORE for _, labels in documents(data.train) for label in labels[1:]
    )
    assert len(data.train) < 40  # packed
    alone = ready(write(examples), seq_len=128, holdout=0.0, packing=False)
    assert [len(row) for row in alone.train] == [1] * 40


def test_holdout_is_a_seeded_tenth_without_leaks(
    ready: Any, write: Any, make_tokenizer: Any
) -> None:
    tokenizer = make_tokenizer()
    rows = [qa(i) for i in range(100)] + [qa(i) for i in range(30)] + [qa(7)]
    path = write(rows)
    data = ready(path)
    train, held = Counter(texts(data.train, tokenizer)), Counter(texts(data.holdout, tokenizer))
    assert not set(train) & set(held)
    assert len(held) == 10
    assert set(held.values()) == {1}
    removed = 131 - train.total() - 10
    assert data.report.duplicates_removed == removed
    assert data.report.duplicates_in_train == train.total() - 90
    assert (data.report.train, data.report.holdout) == (train.total(), 10)
    assert len(data.holdout_records) == 10
    asked = {record[0]["content"] for record in data.holdout_records}
    assert all(any(question in text for text in held) for question in asked)
    # another seed holds out others; the order of the file does not matter
    assert set(texts(ready(path, seed=1).holdout, tokenizer)) != set(held)
    shuffled = ready(write(rows[::-1], "other.jsonl"))
    assert Counter(texts(shuffled.holdout, tokenizer)) == held


def test_every_shape_gives_the_same_tokens(ready: Any, write: Any) -> None:
    asked, answered = "What is it?", "It is so."
    shapes = {
        "messages": {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answered},
            ]
        },
        "sharegpt": {
            "conversations": [
                {"from": "human", "value": asked},
                {"from": "gpt", "value": answered},
            ]
        },
        "alpaca": {"instruction": asked, "input": "", "output": answered},
        "prompt_completion": {"prompt": asked, "completion": answered},
    }
    results = []
    for shape, record in shapes.items():
        path = write([record], f"{shape}.jsonl")
        for form in ("auto", shape):
            data = ready(path, format=form, holdout=0.0)
            assert data.report.shape == shape
            results.append(data.train[0])
    assert all(result == results[0] for result in results)


def test_plain_text_is_cut_so_that_each_token_is_a_target_once(
    ready: Any, write: Any, make_tokenizer: Any
) -> None:
    tokenizer = make_tokenizer("none")  # no chat template; writes <s>
    text = "the cat sat on the mat, hello world. </s> " * 40
    data = ready(write([{"text": text}, {"text": "short"}]), tokenizer, holdout=0.0, seq_len=32)
    assert data.report.cut.count == 1
    pieces = [
        document[0] for document in map(data.train.document, range(len(data.train.document_tokens)))
    ]
    joined = pieces[0] + [token for piece in pieces[1:-1] for token in piece[1:]]
    assert tokenizer.decode(joined) == f"<s>{text}</s>"
    assert joined.count(tokenizer.bos_token_id) == 1  # no double BOS
    assert joined.count(tokenizer.eos_token_id) == 1  # the </s> written in the text stays text
    assert all(len(piece) <= 32 for piece in pieces)
    assert pieces[-1] == [*tokenizer("short")["input_ids"], tokenizer.eos_token_id]
    assert data.train.trained_tokens == len(joined) - 1 + len(pieces[-1]) - 1
    assert not data.report.skipped


def test_messages_without_a_template_are_refused_with_advice(
    ready: Any, write: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer("none")
    with pytest.raises(UserError, match=r"no chat template.*data\.chat_template=FILE"):
        ready(write([{"messages": MESSAGES}]), tokenizer)
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    data = ready(
        write([{"messages": MESSAGES}]), tokenizer, chat_template=str(template), holdout=0.0
    )
    assert texts(data.train, tokenizer) == ["user: Q\nassistant: A</s>\n"]


BAD = {
    "not JSON": "{oops",
    "NaN literal": '{"prompt": "a", "completion": NaN}',
    "not an object": "[1]",
    "missing field": {"prompt": "a"},
    "empty answer": {"prompt": "a", "completion": "  "},
    "wrong type": {"prompt": "a", "completion": 1},
    "not Unicode": '{"prompt": "a", "completion": "\\ud800"}',
    "longer than seq_len": {"prompt": "a", "completion": "the cat " * 200},
    "all labels masked": {"prompt": "a", "completion": [{"role": "user", "content": "b"}]},
    "unknown role": {"prompt": "a", "completion": [{"role": "narrator", "content": "b"}]},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_stops_with_file_and_line(ready: Any, write: Any, reason: str) -> None:
    path = write([qa(0), qa(1), BAD[reason], qa(2)])
    with pytest.raises(UserError, match=reason) as caught:
        ready(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert "data.on_bad_row=skip" in message
    assert "\n" not in message


def test_bad_rows_are_skipped_with_a_count(ready: Any, write: Any, make_tokenizer: Any) -> None:
    path = write([qa(0), *BAD.values(), {"text": "mixed"}, qa(1)])
    report = ready(path, on_bad_row="skip", holdout=0.0).report
    assert report.train == 2
    assert report.read == 13
    assert report.train + report.skipped_rows == report.read
    expected = {reason: [f"data.jsonl:{line}"] for line, reason in enumerate(BAD, 2)}
    expected["missing field"].append("data.jsonl:12")
    assert {reason: tally.places for reason, tally in report.skipped.items()} == expected
    assert "2 skipped, missing field: data.jsonl:5, data.jsonl:12" in report.lines()


def test_truncate_cuts_what_is_too_long_and_skips_the_rest(
    ready: Any, write: Any, make_tokenizer: Any
) -> None:
    hopeless = {"prompt": "the cat " * 200, "completion": "too late"}
    data = ready(write([qa(0), *BAD.values(), hopeless]), on_bad_row="truncate", holdout=0.0)
    assert data.report.truncated.places == ["data.jsonl:9"]
    assert "longer than seq_len" not in data.report.skipped
    assert data.report.skipped["all labels masked"].places == ["data.jsonl:10", "data.jsonl:12"]
    assert sorted(len(ids) for ids, _ in documents(data.train))[-1] == 64
    for _, labels in documents(data.train):
        assert any(label != IGNORE for label in labels[1:])  # no row can make a 0 / 0 loss


def test_nothing_to_train_on_is_an_error(ready: Any, write: Any) -> None:
    with pytest.raises(UserError, match=r"none of the 1 rows can be used \(1 empty answer\)"):
        ready(write([{"prompt": "Q", "completion": ""}]), on_bad_row="skip")
    with pytest.raises(UserError, match="no known record shape"):
        ready(write(["{bad", "{bad"], "bad.jsonl"), on_bad_row="skip")
    with pytest.raises(UserError, match="holds no rows"):
        ready(write([], "empty.jsonl"))


def test_too_little_for_one_step_is_an_error(ready: Any, write: Any) -> None:
    path = write([qa(i) for i in range(20)])
    with pytest.raises(
        UserError, match=r"18 examples packed .* one optimizer step takes 100"
    ) as caught:
        ready(path, rows_per_step=100)
    assert "data.packing=false" in str(caught.value)
    assert len(ready(path, rows_per_step=18, packing=False).train) == 18


def test_one_example_is_trained_on_not_held_out(ready: Any, write: Any) -> None:
    data = ready(write([qa(0)]), holdout=0.5)
    assert (len(data.train), len(data.holdout)) == (1, 0)
    data = ready(write([qa(0), qa(1)]), holdout=0.01)
    assert (len(data.train), len(data.holdout)) == (1, 1)
    data = ready(write([qa(0), qa(1)]), holdout=0.99)
    assert (len(data.train), len(data.holdout)) == (1, 1)


def test_max_rows(ready: Any, write: Any) -> None:
    path = write([qa(i) for i in range(50)])
    assert ready(path, max_rows=7, holdout=0.0).report.read == 7
    assert ready(path, max_rows=30, holdout=0.0).report.read == 30


def test_the_fingerprint_changes_with_everything_that_matters(
    ready: Any, write: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    path = write([qa(i) for i in range(20)])
    base = ready(path).fingerprint
    template = tmp_path / "t.jinja"
    template.write_text(make_tokenizer("llama3").chat_template)
    larger = make_tokenizer()
    larger.add_tokens(["<new>"])
    others = [
        ready(path, chat_template=str(template)).fingerprint,
        ready(path, larger).fingerprint,
        ready(path, make_tokenizer("qwen3")).fingerprint,
        *(
            ready(path, **{key: value}).fingerprint
            for key, value in {
                "seq_len": 65, "holdout": 0.2, "packing": False, "loss_on": "last", "seed": 1,
                "on_bad_row": "skip", "max_rows": 19, "format": "prompt_completion",
            }.items()
        ),
    ]  # fmt: skip
    assert len({base, *others}) == len(others) + 1
    # but not with the place of the files, nor with a use of the tokenizer
    used = make_tokenizer()
    used(["a", "b c"], padding=True, truncation=True, max_length=8)
    assert ready(path, used, cache_dir=str(tmp_path / "elsewhere")).fingerprint == base
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "data.jsonl").write_bytes(Path(path).read_bytes())
    assert ready(str(moved / "data.jsonl")).fingerprint == base


def test_an_edited_file_is_read_again(ready: Any, write: Any, make_tokenizer: Any) -> None:
    first = ready(write([qa(i) for i in range(9)]))
    second = ready(write([qa(i) for i in range(8)] + [qa(9)]))  # the same path and size
    assert first.fingerprint != second.fingerprint
    assert any("9" in text for text in texts(second.train, make_tokenizer()))


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "no manifest"])
def test_a_damaged_cache_is_made_again(ready: Any, write: Any, tmp_path: Path, damage: str) -> None:
    path = write([qa(i) for i in range(20)])
    first = ready(path)
    rows = list(first.train)
    folder = tmp_path / "cache" / "data" / first.fingerprint
    for file in sorted(folder.iterdir()):
        if (file.name == "manifest.json") != (damage == "no manifest"):
            continue
        content = file.read_bytes()
        file.unlink()  # the arrays of `first` stay mapped
        if damage == "flip" and content:
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif damage == "truncate":
            file.write_bytes(content[: len(content) // 2])
    assert list(ready(path).train) == rows


def _prepare_rows(config: DataConfig, make: Any) -> Any:
    return [list(row) for row in prepare(config, make, "tiny").train]


def test_several_processes_may_prepare_at_once(
    write: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    config = DataConfig(
        kind="file", path=write([qa(i) for i in range(300)]), cache_dir=str(tmp_path / "cache")
    )
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.starmap(_prepare_rows, [(config, make_tokenizer())] * 4)
    assert all(result == results[0] for result in results)
    left = {path.suffix for path in (tmp_path / "cache" / "data").iterdir()}
    assert left == {"", ".lock"}


def test_a_cache_that_cannot_be_written_is_one_line(ready: Any, write: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*; set data\.cache_dir to a folder"):
        ready(write([qa(0), qa(1)]), cache_dir=str(tmp_path / "file"))


def test_preparing_twice_gives_the_same_bytes(ready: Any, write: Any, tmp_path: Path) -> None:
    path = write([qa(i) for i in range(50)])
    manifests = [
        json.loads(
            (tmp_path / name / "data" / ready(path, cache_dir=str(tmp_path / name)).fingerprint
             / "manifest.json").read_text()
        )
        for name in ("one", "two")
    ]  # fmt: skip
    assert manifests[0] == manifests[1]
    assert all(name.endswith((".npy", ".json", ".jsonl")) for name in manifests[0]["files"])


def test_rows_are_arrays_on_disk(ready: Any, write: Any) -> None:
    rows = ready(write([qa(i) for i in range(20)])).train
    assert isinstance(rows._ids, np.memmap)
    assert rows._ids.dtype == np.int32
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_stdlib_prepares(make_tokenizer: Any, tmp_path: Path) -> None:
    config = DataConfig(cache_dir=str(tmp_path), seq_len=512, max_rows=200, on_bad_row="skip")
    data = prepare(config, make_tokenizer(), "tiny")
    assert (data.report.train, data.report.holdout) == (180, 20)
    assert data.train.row_tokens.mean() > 0.9 * 512
    assert (
        prepare(replace(config, seed=3), make_tokenizer(), "tiny").fingerprint != data.fingerprint
    )
