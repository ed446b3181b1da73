import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fttrain.data.records import BadRow, RecordSource, file_source, hub_source
from fttrain.util.errors import UserError

ROWS = [
    {"prompt": "What?", "completion": "It\u2028is\n日本"},
    {"prompt": "Two", "completion": "NA"},
]


def values(source: RecordSource) -> list[Any]:
    return [row.value for row in source.read()]


def read(path: Path, data: bytes | str) -> RecordSource:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return file_source(str(path))


def test_every_format_gives_the_same_records(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    csv_text = 'prompt,completion\nWhat?,"It\u2028is\n日本"\nTwo,NA\n'
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a[1].parquet")
    sources = [
        read(tmp_path / "a.jsonl", lines),
        read(tmp_path / "b.jsonl", lines.replace("\n", "\r\n").rstrip()),
        read(tmp_path / "c.jsonl.gz", gzip.compress(lines.encode())),
        read(tmp_path / "a.json", json.dumps(ROWS, indent=2)),
        read(tmp_path / "b.json", json.dumps({"data": ROWS})),
        read(tmp_path / "c.json", lines),  # JSONL under another name
        read(tmp_path / "a.csv", csv_text),
        read(tmp_path / "a.tsv", csv_text.replace(",", "\t")),
        file_source(str(tmp_path / "a[1].parquet")),
    ]
    for source in sources:
        assert values(source) == ROWS
        assert values(source) == ROWS  # it may be read again


def test_a_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n')
    (tmp_path / "a.csv").write_text("text\nfirst\n")
    (tmp_path / "README.md").write_text("no data")
    rows = list(file_source(str(tmp_path)).read())
    assert [(row.place, row.value) for row in rows] == [
        ("a.csv:2", {"text": "first"}),
        ("b.jsonl:1", {"text": "second"}),
    ]


def test_nested_parquet(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert values(file_source(str(tmp_path / "a.parquet"))) == rows


BAD_LINES = {
    "{not json}": "not JSON",
    '{"text": "cut': "not JSON",
    '{"text": NaN}': "NaN literal",
    '{"text": "a", "score": -Infinity}': "NaN literal",
    "[1, 2]": "not an object",
    '"text"': "not an object",
    "null": "not an object",
    "[" * 100_000: "not JSON",
    '{"n": ' + "1" * 10_000 + "}": "not JSON",
    '\ufeff{"text": "a mark in the middle"}': "not JSON",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_bad_lines_stand_in_their_place(tmp_path: Path, line: str, reason: str) -> None:
    source = read(tmp_path / "a.jsonl", f'{{"text": "one"}}\n\n{line}\n{{"text": "two"}}\n')
    one, bad, two = source.read()
    assert (one.line, bad.line, two.line) == (1, 3, 4)
    assert isinstance(bad.value, BadRow)
    assert bad.value.reason == reason
    assert two.value == {"text": "two"}


def test_not_utf8(tmp_path: Path) -> None:
    _, bad, two = read(
        tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}'
    ).read()
    assert isinstance(bad.value, BadRow)
    assert bad.value.reason == "not UTF-8"
    assert two.value == {"text": "b"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_is_left_out_with_a_note(tmp_path: Path, name: str) -> None:
    data = {"a.jsonl": '{"text": "one"}', "a.json": '[{"text": "one"}]', "a.csv": "text\none\n"}[
        name
    ]
    source = read(tmp_path / name, b"\xef\xbb\xbf" + data.encode())
    assert values(source) == [{"text": "one"}]
    assert "byte order mark" in source.notes[0]


def test_json_arrays_name_the_line(tmp_path: Path) -> None:
    text = '[\n {"text": "one"},\n\n {"text": NaN},\n 7,\n {"text":\n "two"}\n]'
    rows = list(read(tmp_path / "a.json", text).read())
    assert [row.line for row in rows] == [2, 4, 5, 6]
    kinds = [row.value.reason if isinstance(row.value, BadRow) else row.value for row in rows]
    assert kinds == [{"text": "one"}, "NaN literal", "not an object", {"text": "two"}]
    assert values(read(tmp_path / "b.json", "[]")) == []


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", '[{"text": "one"},\n {"text": }]', r"a\.json:2: not JSON"),
        ("a.json", '[{"text": "one"}\n {"text": "two"}]', r"a\.json:2: .*comma"),
        ("a.json", '[{"text": "one"},', "not JSON|truncated"),
        ("a.json", '[{"text": "one"}', "truncated"),
        ("a.json", "7", "array of objects"),
        ("a.json", "", "array of objects"),
        ("a.json", b'[{"text": "\xff"}]', r"a\.json:1: not UTF-8"),
        ("a.jsonl", '{"text": "one"}'.encode("utf-16"), "UTF-16"),
        ("a.csv", b"text\nok\n\xff\n", r"a\.csv:\d: not UTF-8"),
        ("a.csv", "text,text\na,b\n", "twice"),
        ("a.csv", 'text\n"open\n', "not CSV"),
        ("a.parquet", b"PAR1 nothing PAR1", "not a readable Parquet"),
        ("a.parquet", b"", "not a readable Parquet"),
        ("a.jsonl.gz", b"no gzip", "damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}' * 99, mtime=0)[:-9], "damaged"),
        ("a.txt", "text", "unknown kind of file"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, data: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        values(read(tmp_path / name, data))
    assert "\n" not in str(caught.value)


def test_csv_cells(tmp_path: Path) -> None:
    rows = list(read(tmp_path / "a.csv", 'text,n\n"a\nb",1\nonly one\n\nc,2\n').read())
    assert [row.line for row in rows] == [2, 4, 6]
    assert isinstance(rows[1].value, BadRow)
    assert rows[1].value.reason == "wrong number of cells"
    assert rows[0].value == {"text": "a\nb", "n": "1"}


def test_missing_files_name_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"no such file \(there is: data\.jsonl\)"):
        file_source(str(tmp_path / "data.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no data file"):
        file_source(str(tmp_path / "empty"))


def test_identity_follows_the_bytes(tmp_path: Path) -> None:
    first = read(tmp_path / "a.jsonl", '{"text": "one"}').identity
    stamp = os.stat(tmp_path / "a.jsonl")
    second = read(tmp_path / "a.jsonl", '{"text": "two"}')
    os.utime(tmp_path / "a.jsonl", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size and time
    assert file_source(str(tmp_path / "a.jsonl")).identity == second.identity != first


def test_the_hub_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "repository"  # `datasets` takes a folder of the hub's layout as an id
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "train.parquet")
    source = hub_source(str(folder), "train")
    assert values(source) == values(source) == ROWS
    assert [row.line for row in source.read()] == [1, 2]
    assert hub_source(str(folder), "train").identity == source.identity
    with pytest.raises(UserError, match=r"data\.split=nonsense: .*did not load") as caught:
        hub_source(str(folder), "nonsense")
    assert "\n" not in str(caught.value)


def test_the_hub_without_a_network_is_one_line() -> None:
    code = (
        "from fttrain.data.records import hub_source\n"
        "from fttrain.util.errors import UserError\n"
        "try:\n    hub_source('no-such-owner/no-such-data', 'train')\n"
        "except UserError as error:\n    print(error)"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("\n") == 1
    assert "data.path=no-such-owner/no-such-data" in done.stdout
    assert "data=file data.path=FILE" in done.stdout
