"""A repository on the hub, served by an HTTP server on this machine: its weights pass through."""

import functools
import hashlib
import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import tiny
import tiny_files

from fttrain.distributed.rank_group import RankGroup
from fttrain.frozen.build import open_or_build
from fttrain.frozen.cache import FrozenCache
from fttrain.frozen.config import ModelConfig
from fttrain.frozen.source import load_config, load_tokenizer, resolve
from fttrain.quant.config import QuantConfig
from fttrain.strategy.builder import frozen_base
from fttrain.util import atomic_files
from fttrain.util.errors import UserError

ALONE = RankGroup(0, 1, 0, tiny.CPU)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ID = "owner/tiny"


@dataclass
class Hub:
    """What the server serves, what it was asked for, and the fault it has."""

    folder: Path
    watched: Path  # the folder of caches
    cut: str = ""  # this file breaks off after half of its bytes
    corrupt: str = ""  # one byte of this file is another one
    sent: Counter[str] = field(default_factory=Counter)  # file -> complete downloads
    most_weights: int = 0  # weight files that lay on the disk at once

    def content(self, name: str) -> bytes:
        data = (self.folder / name).read_bytes()
        return bytes([data[0] ^ 1]) + data[1:] if name == self.corrupt else data

    def watch(self) -> None:
        here = [path for path in self.watched.rglob("*.safetensors") if path.is_file()]
        self.most_weights = max(self.most_weights, len(here))


class Handler(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that its client uses."""

    def __init__(self, hub: Hub, *request: object) -> None:
        self.hub = hub
        super().__init__(*request)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.answer(with_content=False)

    def do_GET(self) -> None:
        self.answer(with_content=True)

    def answer(self, with_content: bool) -> None:
        if self.path.startswith("/api/models/"):
            body = json.dumps(self.tree() if "/tree/" in self.path else self.repository()).encode()
            self.reply(200, {"Content-Type": "application/json"}, body if with_content else b"")
            return
        name = self.path.rpartition("/")[2]
        if not (self.hub.folder / name).is_file():
            self.reply(404, {"X-Error-Code": "EntryNotFound"}, b"")
            return
        self.file(name, with_content)

    def repository(self) -> dict[str, object]:
        siblings = [
            {"rfilename": path.name, "size": path.stat().st_size}
            for path in sorted(self.hub.folder.iterdir())
        ]
        return {"id": ID, "sha": COMMIT, "siblings": siblings}

    def tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
            for path in sorted(self.hub.folder.iterdir())
        ]

    def file(self, name: str, with_content: bool) -> None:
        original = (self.hub.folder / name).read_bytes()
        lfs = name.endswith(".safetensors")
        digest = (hashlib.sha256 if lfs else hashlib.sha1)(original).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        data, begin = self.hub.content(name), 0
        if "Range" in self.headers:
            begin = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        if not with_content:
            headers["Content-Length"] = str(len(data))
            self.reply(200, headers, b"")
            return
        headers["Content-Length"] = str(len(data) - begin)
        self.hub.watch()
        if name == self.hub.cut:
            self.reply(206 if begin else 200, headers, data[begin : len(data) // 2])
            self.close_connection = True
            return
        self.reply(206 if begin else 200, headers, data[begin:])
        self.hub.sent[name] += 1

    def reply(self, code: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Silence."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """``owner/tiny``: a model of 8 layers in several shards."""
    folder = tmp_path / "repository"
    tiny_files.save(tiny.model(num_hidden_layers=8), folder, max_shard_size="200KB")
    served = Hub(folder, tmp_path / "cache")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", here)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        here + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield served
    server.shutdown()
    server.server_close()


def build(path: str, cache: Path, verify: bool = False) -> FrozenCache:
    base = frozen_base(resolve(ModelConfig("tiny", path)), QuantConfig(), "float32")
    return open_or_build(base, str(cache), ALONE, lambda done, total: None, verify)


def test_weights_pass_through_and_leave_nothing_but_the_cache(hub: Hub, tmp_path: Path) -> None:
    shards = {path.name for path in hub.folder.glob("*.safetensors")}
    assert len(shards) > 4
    cache = build(ID, hub.watched)
    assert {name for name in hub.sent if name in shards} == shards
    assert max(hub.sent[name] for name in shards) == 1
    assert hub.most_weights <= 2  # a layer may lie in two of them
    assert not list(hub.watched.rglob("*.safetensors"))
    # the very bytes that a local folder makes
    local = build(str(hub.folder), tmp_path / "local")
    assert cache.digest == local.digest
    assert load_config(resolve(ModelConfig("tiny", ID))).num_hidden_layers == 8
    assert load_tokenizer(ModelConfig("tiny", ID))[1].startswith(COMMIT)


def test_the_cache_serves_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = build(ID, hub.watched).digest
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}"
    )
    assert build(ID, hub.watched).digest == digest


@pytest.mark.parametrize("shard", ["200KB", "10GB"])
def test_verifying_needs_no_weights(shard: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of a repository with an index nor of one with a single file."""
    for path in hub.folder.glob("*.safetensors*"):
        path.unlink()
    tiny_files.save(tiny.model(num_hidden_layers=8), hub.folder, max_shard_size=shard)
    digest, sent = build(ID, hub.watched).digest, dict(hub.sent)
    assert build(ID, hub.watched, verify=True).digest == digest
    assert {n: c for n, c in hub.sent.items() if "safetensors" in n} == {
        n: c for n, c in sent.items() if "safetensors" in n
    }
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}"
    )
    assert build(ID, hub.watched, verify=True).digest == digest


@pytest.mark.parametrize("shard", ["200KB", "10GB"])
def test_the_room_that_is_asked_for_is_what_is_needed(
    shard: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in hub.folder.glob("*.safetensors*"):
        path.unlink()
    tiny_files.save(tiny.model(num_hidden_layers=8), hub.folder, max_shard_size=shard)
    (hub.folder / "consolidated.safetensors").write_bytes(bytes(5_000_000))  # never fetched
    weights = sorted(path.stat().st_size for path in hub.folder.glob("model*.safetensors"))
    cache_bytes = build(str(hub.folder), tmp_path / "local").size_bytes
    needed = cache_bytes + sum(weights[-2:]) + atomic_files.SLACK_BYTES
    usage, free = shutil.disk_usage(tmp_path), needed - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    with pytest.raises(UserError, match=rf"{needed:,} bytes needed, {free:,} free"):
        build(ID, hub.watched)
    assert not [name for name in hub.sent if name.endswith("safetensors")]
    free = needed
    build(ID, hub.watched)


@pytest.mark.parametrize("in_the_way", [".downloads", ".downloads/.model.safetensors.lock"])
def test_downloads_that_cannot_be_written_are_one_line(in_the_way: str, hub: Hub) -> None:
    for path in hub.folder.glob("*.safetensors*"):
        path.unlink()
    tiny_files.save(tiny.model(num_hidden_layers=8), hub.folder)
    source = resolve(ModelConfig("tiny", ID))
    place = frozen_base(source, QuantConfig(), "float32").folder(str(hub.watched)) / in_the_way
    if place.suffix == ".lock":
        place.mkdir(parents=True)
    else:
        place.parent.mkdir(parents=True)
        place.write_text("a file")
    with pytest.raises(
        UserError, match=r"owner/tiny/model.safetensors: the system refused"
    ) as told:
        build(ID, hub.watched)
    assert "frozen.cache_dir" in str(told.value)


def test_an_interrupted_download_goes_on(hub: Hub) -> None:
    hub.cut = sorted(hub.folder.glob("*.safetensors"))[3].name
    with pytest.raises(UserError, match=f"owner/tiny/{hub.cut}: .*hub did not deliver it"):
        build(ID, hub.watched)
    before = dict(hub.sent)
    assert not list(hub.watched.rglob("manifest.json"))
    hub.cut = ""
    build(ID, hub.watched)
    again = [n for n, count in before.items() if n.endswith("safetensors") and hub.sent[n] > count]
    assert not again


def test_other_bytes_than_the_hub_names_are_refused(hub: Hub) -> None:
    hub.corrupt = sorted(hub.folder.glob("*.safetensors"))[2].name
    with pytest.raises(UserError, match=f"owner/tiny/{hub.corrupt}: the bytes that arrived"):
        build(ID, hub.watched)
    hub.corrupt = ""
    build(ID, hub.watched)


def test_a_repository_without_safetensors_is_refused(hub: Hub) -> None:
    for path in hub.folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(UserError, match=r"owner/tiny/model.safetensors.*hub did not deliver"):
        build(ID, hub.watched)


def test_an_index_that_leaves_the_folder_is_refused(hub: Hub) -> None:
    index = hub.folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../../secret"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"\.\./\.\./secret is not a file in this folder"):
        build(ID, hub.watched)
