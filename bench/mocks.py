"""Mock models and helpers that the measurements in bench/ and the tests in scripts/ share."""

from __future__ import annotations

import asyncio
import base64
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from struct import pack
from typing import Any

EXAMPLE_IMAGE = Path(__file__).parent.parent / "examples" / "list.png"


def png(side: int, pixels: bytes) -> bytes:
    """An uncompressed PNG of `side` x `side` RGB pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return pack(">I", len(body)) + name + body + pack(">I", zlib.crc32(name + body))

    header = pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = b"".join(b"\0" + pixels[3 * side * row : 3 * side * (row + 1)] for row in range(side))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 0)) + chunk(b"IEND", b"")


def data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def image_and_text(image_url: str, text: str) -> list[dict[str, Any]]:
    """The content of a user turn in the format of chat completions."""
    return [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": text}]


def completion(text: str, usage: dict[str, int] | None = None) -> dict[str, Any]:
    """A chat completion with this answer."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    body = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return body if usage is None else body | {"usage": usage}


class MockModel(BaseHTTPRequestHandler):
    """A server of chat completions with the model `m`. Subclasses define `do_POST`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def read_json(self) -> dict[str, Any]:
        return json.loads(self.rfile.read(int(self.headers["content-length"])))

    def send_body(self, body: bytes, content_type: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_json(self, value: dict[str, Any]) -> None:
        self.send_body(json.dumps(value).encode())

    def do_GET(self) -> None:
        self.send_json({"data": [{"id": "m", "object": "model"}]})


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """The guard closes connections whose replies it no longer needs."""


def start_model(model: type[MockModel]) -> str:
    """Serves a mock model on a thread. Returns its base URL."""
    server = QuietServer(("127.0.0.1", 0), model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/v1"


def start_guard(command: list[str], settings: dict[str, str] | None = None) -> tuple[subprocess.Popen[str], str]:
    """Starts `ecso serve` with these settings in its environment. Returns the process and its base URL."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | (settings or {}))
    assert process.stderr
    for line in process.stderr:
        if url := re.search(r" on (http\S+) ", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, url[1].rstrip("/")
    sys.exit(f"this command did not start serving: {' '.join(command)}")


# The status of a response, additional header lines that end with CRLF, and its body.
Response = tuple[int, str, bytes]


def start_fast_model(respond: Callable[[bytes], Response], latency: float = 0.0) -> tuple[str, Any]:
    """Serves a mock model from a process of its own, which handles many calls at once.

    `respond` turns the body of a request into a response; it is sent to the process, so it must be picklable. Calls with a body take
    `latency` seconds. Returns the base URL and the process.
    """
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    process = context.Process(target=_serve_fast_model, args=(port, respond, latency), daemon=True)
    process.start()
    return f"http://127.0.0.1:{port.get()}/v1", process


def _serve_fast_model(port: Any, respond: Callable[[bytes], Response], latency: float) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")), 0)
                request = await reader.readexactly(length)
                if request and latency:
                    await asyncio.sleep(latency)
                status, headers, body = respond(request)
                head = f"HTTP/1.1 {status} x\r\nContent-Type: application/json\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode()
                writer.write(head + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=512, limit=1 << 20)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())
