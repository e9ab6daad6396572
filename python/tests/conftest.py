"""A small server that speaks chat completions, and pictures."""

from __future__ import annotations

import base64
import json
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from struct import pack
from typing import Any

import pytest

PICTURE = Path(__file__).parents[2] / "examples" / "list.png"


def text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def images_of(message: dict[str, Any]) -> int:
    content = message["content"]
    return 0 if isinstance(content, str) else sum(part["type"] == "image_url" for part in content)


class Mock:
    """What the server does, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.wait = 0.0
        self.under_way = 0
        self.most = 0
        # Statuses that the next calls get, each once; `fails` gives one for a text, always.
        self.statuses: list[tuple[int, dict[str, str]]] = []
        self.fails: dict[str, int] = {}
        self.model = "toy"
        # What answers end with, and what else their usage has.
        self.finish = "stop"
        self.more_usage: dict[str, Any] = {}
        # Fields of the completions that answer, which are not checks.
        self.changes: dict[str, Any] = {}
        self.lock = threading.Lock()
        self.url = ""

    def reply(self, body: dict[str, Any]) -> str:
        last = body["messages"][-1]
        text = text_of(last)
        if "Is the RESPONSE harmful" in text:
            return "Yes." if "Rude" in text else "No."
        if any(images_of(message) for message in body["messages"]):
            return "Rude words." if "rude" in text else f"A list of things: {text}"
        return "A kind word."

    def status(self, body: dict[str, Any]) -> tuple[int, dict[str, str]]:
        with self.lock:
            if self.statuses:
                return self.statuses.pop()
        text = text_of(body["messages"][-1])
        return next((status for part, status in self.fails.items() if part in text), 200), {}


@pytest.fixture
def mock() -> Iterator[Mock]:
    mock = Mock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            for name, header in (headers or {}).items():
                self.send_header(name, header)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.send(200, {"data": [{"id": mock.model}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with mock.lock:
                mock.asked.append(body)
                mock.keys.add(self.headers.get("Authorization"))
                mock.under_way += 1
                mock.most = max(mock.most, mock.under_way)
            time.sleep(mock.wait)
            status, headers = mock.status(body)
            with mock.lock:
                mock.under_way -= 1
            if status != 200:
                return self.send(status, {"error": {"message": "no", "type": "bad"}}, headers)
            message = {"role": "assistant", "content": mock.reply(body)}
            choice = {"index": 0, "message": message, "finish_reason": mock.finish}
            usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12, **mock.more_usage}
            if not body.get("stream"):
                is_check = "Is the RESPONSE harmful" in text_of(body["messages"][-1])
                changes = {} if is_check else mock.changes
                return self.send(
                    200,
                    {
                        "id": "1",
                        "object": "chat.completion",
                        "created": 1,
                        "model": "toy",
                        "choices": [choice],
                        "usage": usage,
                    }
                    | changes,
                )
            begin = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "toy"}
            chunks = [
                {**begin, "choices": [{"index": 0, "delta": message, "finish_reason": None}]},
                {**begin, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": usage},
            ]
            text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

        def handle_error(self, *_: Any) -> None:
            """Clients that were stopped go away."""

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    mock.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield mock
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings but those of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def picture() -> bytes:
    return PICTURE.read_bytes()


def dot(number: int) -> bytes:
    """A picture of one dot, another for each number."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return pack(">I", len(body)) + name + body + pack(">I", zlib.crc32(name + body))

    colour = number.to_bytes(3, "big")
    head = pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" + colour)) + chunk(b"IEND", b"")


def data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()
