"""Measures `Guard.process_batch`: python_batch.py [PART...], with the package `ecso` and pyarrow installed.

  rate      64 rows in flight against a mock that takes 200 ms per call: rows per second, and the share of what the mock allows
  overhead  a mock without latency: the time per row of this process, including its HTTP client; also for rows that a journal has
  memory    100,000 rows with images of 50 KB (ROWS=… for fewer), in batches of 500: memory over time
"""

from __future__ import annotations

import os
import random
import resource
import sys
import tempfile
import time

import ecso
import pyarrow

from mocks import Response, png, start_fast_model

ANSWER = (
    b'{"id":"1","object":"chat.completion","created":1,"model":"toy","choices":[{"index":0,"message":{"role":"assistant","content":"No."},'
    b'"finish_reason":"stop"}],"usage":{"prompt_tokens":10,"completion_tokens":2,"total_tokens":12}}'
)
MODELS = b'{"data":[{"id":"toy"}]}'


def respond(request: bytes) -> Response:
    return 200, "", ANSWER if request else MODELS


def table(first: int, count: int, side: int = 1) -> pyarrow.RecordBatch:
    """Rows with images of `side` x `side` random pixels."""
    numbers = range(first, first + count)
    images = [png(side, random.Random(number).randbytes(3 * side * side)) for number in numbers]
    return pyarrow.RecordBatch.from_pydict({"query": [f"What is number {number}?" for number in numbers], "image": images})


def cpu_seconds() -> float:
    """The CPU time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def rate(rows: int = 4000) -> None:
    url, server = start_fast_model(respond, latency=0.2)
    guard = ecso.Guard(url, "paper", concurrency=64)
    guard.process_batch(table(0, 64))
    batch = table(64, rows)
    started = time.perf_counter()
    answers = guard.process_batch(batch)
    seconds = time.perf_counter() - started
    assert pyarrow.table(answers)["error"].null_count == rows
    limit = 64 / 0.2 / 2
    print(f"rate: {rows / seconds:.1f} rows/s with two calls each; the mock allows {limit:.0f} with 64 in flight: {rows / seconds / limit:.1%}")
    server.terminate()


def overhead(rows: int = 10_000) -> None:
    url, server = start_fast_model(respond)
    guard = ecso.Guard(url, "paper", concurrency=64, set={"gate": "never"})
    guard.process_batch(table(0, 64))
    batch = table(64, rows)
    with tempfile.TemporaryDirectory() as journal:
        for case in ["asked, one call per row", "known from the journal"]:
            started, cpu_before = time.perf_counter(), cpu_seconds()
            guard.process_batch(batch, journal=journal)
            wall, cpu = time.perf_counter() - started, cpu_seconds() - cpu_before
            print(f"overhead: {1000 * cpu / rows:.3f} ms of CPU per row, {1000 * wall / rows:.3f} ms per row: {case}")
    server.terminate()


def memory(rows: int = int(os.environ.get("ROWS", "100000"))) -> None:
    url, server = start_fast_model(respond)
    guard = ecso.Guard(url, "paper", concurrency=64, set={"gate": "never"})
    started = time.perf_counter()
    for first in range(0, rows, 500):
        answers = guard.process_batch(table(first, 500, 129))
        assert pyarrow.table(answers)["error"].null_count == 500
        if first % (rows // 10) == 0:
            pages = int(open("/proc/self/statm").read().split()[1])
            mebibytes, seconds = pages * os.sysconf("SC_PAGESIZE") >> 20, time.perf_counter() - started
            print(f"memory: {mebibytes} MiB after {first + 500} rows, {seconds:.0f} s", flush=True)
    server.terminate()


if __name__ == "__main__":
    for name in sys.argv[1:] or ["rate", "overhead", "memory"]:
        {"rate": rate, "overhead": overhead, "memory": memory}[name]()
