"""As much of a W&B server as its client asks for to log and to resume: GraphQL, and streams of files."""

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0" * 40


@dataclass
class Server:
    """`history` by run: the lines that the client has written. `fault` is what the server does instead.

    A server that is `forgetful` accepts lines and keeps none.
    """

    url: str = ""
    forgetful: bool = False
    fault: Callable[[BaseHTTPRequestHandler], None] | None = None
    history: dict[str, list[str]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def steps(self, run: str) -> list[int]:
        return [json.loads(line)["_step"] for line in self.history[run]]


@contextmanager
def wandb_server() -> Iterator[Server]:
    server = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, server))
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()


def hang(_handler: BaseHTTPRequestHandler) -> None:
    time.sleep(600)


def refuse(code: int) -> Callable[[BaseHTTPRequestHandler], None]:
    """Return a fault that answers with an HTTP status such as 500."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        handler.send_response(code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def close(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, server_state: Server, *arguments: Any) -> None:
        self.state = server_state
        super().__init__(*arguments)

    def parse_request(self) -> bool:
        """Read the request line and headers; show the fault instead of an answer if there is one."""
        if not super().parse_request():
            return False
        if self.state.fault is not None:
            self.state.fault(self)
            return False
        return True

    def do_POST(self) -> None:
        if self.path != "/graphql" and not self.path.endswith("/file_stream"):
            self._answer({})  # W&B's own statistics
            return
        body = json.loads(self._body())
        if self.path == "/graphql":
            self._answer({"data": self._data(body["query"], body.get("variables") or {})})
            return
        # /files/ENTITY/PROJECT/RUN/file_stream
        written = body.get("files", {}).get("wandb-history.jsonl")
        if written and not self.state.forgetful:
            lines, start = self.state.history.setdefault(self.path.split("/")[-2], []), written["offset"]
            lines[start : start + len(written["content"])] = written["content"]
        self._answer({})

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    def log_message(self, *_: Any) -> None:
        pass

    def _data(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name")
        project = {"id": "p", "name": "launcher", "entity": {"id": "e", "name": "me"}}
        if "UpsertBucket" in query:
            self.state.history.setdefault(str(name), [])
            bucket = {"id": "b", "name": name, "displayName": "r", "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "CreateRunFiles" in query:
            files = [{"name": file, "uploadUrl": f"{self.state.url}/file"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "RunResumeStatus" in query:
            return {"model": {**project, "bucket": self._resumed(str(name))}}
        if "viewer" in query:
            viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": viewer}
        return {}

    def _resumed(self, name: str) -> dict[str, Any] | None:
        lines = self.state.history.get(name)
        if lines is None:
            return None
        return {
            "id": "b", "name": name, "displayName": "r", "summaryMetrics": "{}", "config": "{}", "tags": [],
            "logLineCount": 0, "eventsLineCount": 0, "historyLineCount": len(lines),
            "historyTail": json.dumps(lines[-1:]), "eventsTail": "[]", "wandbConfig": '{"t": 1}',
        }  # fmt: skip

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
