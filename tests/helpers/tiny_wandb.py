"""What wandb wrote offline, read back; and a server that takes what wandb uploads."""

import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BLOCK_BYTES = 32768
HEADER_BYTES = 7  # of the file, and of each piece of a record
LAST_PIECES = (1, 4)  # a whole record; the last piece of one


class Log:
    """A .wandb file: records of wandb's protocol, in LevelDB's log format."""

    def __init__(self, path: Path) -> None:
        self.raw = path.read_bytes()
        self.config: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.metrics: dict[str, str] = {}  # name or glob -> what its chart is drawn over
        self.stats: set[str] = set()  # names of the system's figures
        self.run: Any = None
        self.exit_code: int | None = None
        for record in _records(self.raw):
            self._take(record)

    def _take(self, record: Any) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            self.run = record.run
            self.config |= {
                item.key: json.loads(item.value_json) for item in record.run.config.update
            }
        elif kind == "history":
            self.history.append(_items(record.history.item))
        elif kind == "summary":
            self.summary |= _items(record.summary.update)
        elif kind == "metric":
            name = record.metric.name or record.metric.glob_name
            self.metrics[name] = record.metric.step_metric
        elif kind == "stats":
            self.stats |= {item.key for item in record.stats.item}
        elif kind == "exit":
            self.exit_code = record.exit.exit_code

    def rows(self, name: str) -> list[tuple[int, Any]]:
        """(step, value) of a metric, as it was logged."""
        return [(row["step"], row[name]) for row in self.history if name in row]


def _items(items: Any) -> dict[str, Any]:
    """A nested key is joined by dots."""
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _records(raw: bytes) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    at, whole = HEADER_BYTES, b""
    while at + HEADER_BYTES <= len(raw):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < HEADER_BYTES:
            at += left
            continue
        length = int.from_bytes(raw[at + 4 : at + 6], "little")
        kind = raw[at + 6]
        whole += raw[at + HEADER_BYTES : at + HEADER_BYTES + length]
        at += HEADER_BYTES + length
        if kind in LAST_PIECES:
            yield Record.FromString(whole)
            whole = b""


def logs(folder: Path) -> list[Log]:
    """Of the run in ``folder``, by start."""
    return [Log(path) for path in sorted(folder.glob("wandb/*run-*/run-*.wandb"))]


class Server:
    """Answers as much of wandb's protocol as a run and ``wandb sync`` need."""

    def __init__(self) -> None:
        self.history: dict[str, list[dict[str, Any]]] = {}  # by id of a run
        self.exit_codes: list[int] = []
        self.status = 200  # of every answer
        self.stalls = False  # whether what a run streams is left without an answer
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def query(self, name: str, given: dict[str, Any]) -> dict[str, Any] | None:
        """The data that answers the GraphQL operation ``name``; None where it is not supported."""
        owner = {"id": "e", "name": "somebody"}
        project = {"id": "p", "name": "fttrain", "entity": owner}
        if name == "Viewer":
            return {"viewer": {"id": "v", "entity": "somebody", "flags": "{}"}}
        if name == "UpsertBucket":
            new = given["name"] not in self.history
            lines = self.history.setdefault(given["name"], [])
            bucket = {"id": "b", "name": given["name"], "displayName": "", "project": project}
            bucket |= {"historyLineCount": len(lines)}
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if name == "RunResumeStatus":
            return {"model": {**project, "bucket": self._bucket(given["name"])}}
        if name == "CreateRunFiles":
            files = [
                {"name": file, "uploadUrl": f"{self.address}/files/{file}"}
                for file in given["files"]
            ]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return None

    def _bucket(self, name: str) -> dict[str, Any] | None:
        lines = self.history.get(name)
        if lines is None:
            return None
        tail = json.dumps([json.dumps(line) for line in lines[-1:]])
        counts = {f"{kind}LineCount": 0 for kind in ("log", "events")}
        return {
            **{"id": "b", "name": name, "config": "{}", "summaryMetrics": "{}", "tags": []},
            **{"historyTail": tail, "eventsTail": "[]", "wandbConfig": '{"t": 1}'},
            **{"historyLineCount": len(lines), **counts},
        }

    def take(self, run: str, content: dict[str, Any]) -> None:
        """What a run streams: lines of its files, from an offset on, and its end."""
        for name, part in (content.get("files") or {}).items():
            if "history" in name:
                lines = [json.loads(line) for line in part["content"]]
                self.history[run][part["offset"] :] = lines
        if content.get("complete"):
            self.exit_codes.append(content["exitcode"])


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body, answer = self._body(), {}
            known = self.path.endswith(("/graphql", "/file_stream"))
            content = json.loads(body) if known else {}
            if self.path.endswith("/graphql"):
                found = re.search(r"(?:query|mutation)\s+(\w+)", content["query"])
                name = found.group(1) if found else ""
                data = server.query(name, content.get("variables") or {})
                answer = {"data": data}
                if data is None:
                    answer["errors"] = [{"message": f"{name} is not supported"}]
            elif self.path.endswith("/file_stream"):
                while server.stalls:
                    time.sleep(0.05)
                    answer["late"] = True
                if answer:
                    return
                server.take(self.path.split("/")[-2], content)
            self._answer(json.dumps(answer).encode())

        def do_PUT(self) -> None:
            self._body()
            self._answer(b"")

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _answer(self, body: bytes) -> None:
            self.send_response(server.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Silent."""

    return Handler
