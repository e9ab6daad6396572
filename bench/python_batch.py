"""What `Guard.process_batch` takes: python_batch.py [PART...], with the package `ecso` and pyarrow installed.

  rate      64 rows in flight against a mock that takes 200 ms a call: rows a second, beside what the mock gives at most
  overhead  a mock that takes no time: time a row of this process, the HTTP client and all; and of rows that a journal has
  memory    100,000 rows of 50 KB images (ROWS=… for fewer), in batches of 500: memory as it goes
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import zlib
from struct import pack
from typing import Any

import ecso
import pyarrow

ANSWER = (
    b'{"id":"1","object":"chat.completion","created":1,"model":"toy","choices":[{"index":0,"message":{"role":"assistant","content":"No."},'
    b'"finish_reason":"stop"}],"usage":{"prompt_tokens":10,"completion_tokens":2,"total_tokens":12}}'
)
MODELS = b'{"data":[{"id":"toy"}]}'


def picture(number: int, size: int = 1) -> bytes:
    """A picture of noise, about `size` x `size` x 3 bytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return pack(">I", len(body)) + name + body + pack(">I", zlib.crc32(name + body))

    noise = random.Random(number).randbytes
    pixels = b"".join(b"\0" + noise(3 * size) for _ in range(size))
    head = pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels, 0)) + chunk(b"IEND", b"")


def table(first: int, count: int, size: int = 1) -> pyarrow.RecordBatch:
    numbers = range(first, first + count)
    columns = {"query": [f"What is number {n}?" for n in numbers], "image": [picture(n, size) for n in numbers]}
    return pyarrow.RecordBatch.from_pydict(columns)


def mock(port: Any, latency: float) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")), 0)
                body = await reader.readexactly(length)
                if body and latency:
                    await asyncio.sleep(latency)
                text = ANSWER if body else MODELS
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
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


def started(latency: float) -> tuple[str, Any]:
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    server = context.Process(target=mock, args=(port, latency), daemon=True)
    server.start()
    return f"http://127.0.0.1:{port.get()}/v1", server


def used() -> float:
    """CPU seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def rate(rows: int = 4000) -> None:
    url, server = started(0.2)
    guard = ecso.Guard(url, "paper", concurrency=64)
    guard.process_batch(table(0, 64))
    batch = table(64, rows)
    begun = time.perf_counter()
    answered = guard.process_batch(batch)
    took = time.perf_counter() - begun
    assert pyarrow.table(answered)["error"].null_count == rows
    most = 64 / 0.2 / 2
    print(f"rate: {rows / took:.1f} rows/s, two calls each; the mock gives {most:.0f} at most to 64 in flight: {rows / took / most:.1%}")
    server.terminate()


def overhead(rows: int = 10_000) -> None:
    url, server = started(0.0)
    guard = ecso.Guard(url, "paper", concurrency=64, set={"gate": "never"})
    guard.process_batch(table(0, 64))
    batch = table(64, rows)
    with tempfile.TemporaryDirectory() as journal:
        for what in ["asked, one call a row", "known from the journal"]:
            begun, cpu = time.perf_counter(), used()
            guard.process_batch(batch, journal=journal)
            took, cpu = time.perf_counter() - begun, used() - cpu
            print(f"overhead: {1000 * cpu / rows:.3f} ms of CPU a row, {1000 * took / rows:.3f} ms a row: {what}")
    server.terminate()


def memory(rows: int = int(os.environ.get("ROWS", "100000"))) -> None:
    url, server = started(0.0)
    guard = ecso.Guard(url, "paper", concurrency=64, set={"gate": "never"})
    begun = time.perf_counter()
    for first in range(0, rows, 500):
        answered = guard.process_batch(table(first, 500, 129))
        assert pyarrow.table(answered)["error"].null_count == 500
        if first % (rows // 10) == 0:
            pages = int(open("/proc/self/statm").read().split()[1])
            print(f"memory: {pages * os.sysconf('SC_PAGESIZE') >> 20} MiB after {first + 500} rows, {time.perf_counter() - begun:.0f} s", flush=True)
    server.terminate()


if __name__ == "__main__":
    for name in sys.argv[1:] or ["rate", "overhead", "memory"]:
        {"rate": rate, "overhead": overhead, "memory": memory}[name]()
