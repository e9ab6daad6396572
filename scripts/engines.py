"""The guard on engines that others run, against a model that is a mock: engines.py PART...

  cluster   Ray, two nodes: an actor and then a node are killed in the middle; no row may be lost or doubled
  beside    Ray's own HTTP processor on the same mock
  spark     1,000 rows through Spark
  daft      1,000 rows through Daft

The mock takes 50 ms a call, and answers 1 of 100 calls with 429 or 500. One image of each table is broken.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from struct import pack
from typing import Any

LATENCY, FAILING = 0.05, 0.01
BROKEN = 77
SETTINGS = {"concurrency": 64, "server": {"retries": 4}}


def dot(number: int) -> bytes:
    """A picture of one dot, another for each number."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return pack(">I", len(body)) + name + body + pack(">I", zlib.crc32(name + body))

    head = pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    pixel = zlib.compress(b"\0" + number.to_bytes(3, "big"))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixel) + chunk(b"IEND", b"")


def rows(count: int) -> list[dict[str, Any]]:
    image = lambda number: b"no image" if number == BROKEN else dot(number)  # noqa: E731
    return [{"number": number, "query": f"What is number {number}?", "image": image(number)} for number in range(count)]


def mock(port: Any, failing: float) -> None:
    """A server that speaks chat completions: it says again what it was asked, and that nothing is harmful."""
    chance = random.Random(1)

    def reply(body: bytes) -> tuple[int, str, dict[str, Any]]:
        if not body:
            return 200, "", {"data": [{"id": "toy"}]}
        if chance.random() < failing:
            status = chance.choice([429, 500])
            return status, "Retry-After: 0\r\n" if status == 429 else "", {"error": {"message": "try again"}}
        said = json.loads(body)["messages"][-1]["content"]
        text = said if isinstance(said, str) else "\n".join(part["text"] for part in said if part["type"] == "text")
        answer = "No." if "Is the RESPONSE harmful" in text else f"Seen: {text}"
        choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        return 200, "", {"id": "1", "object": "chat.completion", "created": 1, "model": "toy", "choices": [choice], "usage": usage}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")), 0)
                body = await reader.readexactly(length)
                if body:
                    await asyncio.sleep(LATENCY)
                status, more, value = reply(body)
                text = json.dumps(value).encode()
                head = f"HTTP/1.1 {status} x\r\nContent-Type: application/json\r\n{more}Content-Length: {len(text)}\r\n\r\n"
                writer.write(head.encode() + text)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=512)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def started(failing: float = FAILING) -> tuple[str, Any]:
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    server = context.Process(target=mock, args=(port, failing), daemon=True)
    server.start()
    return f"http://127.0.0.1:{port.get()}/v1", server


def check(found: list[dict[str, Any]], count: int) -> None:
    """Every row once, with its own answer; the broken one with an error."""
    numbers = [row["number"] for row in found]
    lost, doubled = count - len(set(numbers)), len(numbers) - len(set(numbers))
    failed = [row for row in found if row["error"] is not None]
    wrong = [row for row in found if row["error"] is None and row["answer"] != f"Seen: What is number {row['number']}?"]
    print(f"  {len(found)} rows: {lost} lost, {doubled} doubled, {len(wrong)} with another's answer, {len(failed)} failed")
    assert not (lost or doubled or wrong), wrong[:3]
    assert [(row["number"], row["error_kind"]) for row in failed] == [(BROKEN, "image")], failed[:3]


def writers(folder: str) -> Iterator[int]:
    """The processes that have files open in a folder."""
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            held = [os.readlink(f"/proc/{process}/fd/{file}") for file in os.listdir(f"/proc/{process}/fd")]
        except OSError:
            continue
        if any(file.startswith(folder) for file in held):
            yield int(process)


def cluster(count: int = 10_000) -> None:
    import ray
    from ray.cluster_utils import Cluster

    import ecso.ray

    url, server = started()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    second = nodes.add_node(num_cpus=2)
    ray.init(address=nodes.address, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    print(f"Ray {ray.__version__}, {len(ray.nodes())} nodes, {count} rows")
    killed: list[str] = []

    def trouble(journal: str) -> None:
        done = lambda: sum(line.startswith(b'{"id"') for name in os.listdir(journal) for line in open(os.path.join(journal, name), "rb"))  # noqa: E731, SIM115

        while not os.path.isdir(journal) or done() < count // 4:
            time.sleep(0.2)
        os.kill(next(writers(journal)), signal.SIGKILL)
        killed.append(f"an actor after {done()} rows")
        while done() < count // 2:
            time.sleep(0.2)
        nodes.remove_node(second, allow_graceful=False)
        killed.append(f"a node after {done()} rows")

    with tempfile.TemporaryDirectory() as folder:
        journal = os.path.join(folder, "journal")
        worker = threading.Thread(target=trouble, args=(journal,), daemon=True)
        worker.start()
        begun = time.monotonic()
        dataset = ray.data.from_items(rows(count), override_num_blocks=40)
        answered = ecso.ray.map_batches(
            dataset, url, "paper", settings=SETTINGS, options={"journal": journal}, batch_size=250, actors=2, num_cpus=1
        )
        found = answered.select_columns(["number", "answer", "error", "error_kind"]).take_all()
        took = time.monotonic() - begun
        worker.join(5)
    print(f"  killed: {', '.join(killed) or 'nothing'}")
    print(f"  {count / took:.0f} rows/s, {took:.1f} s, restarts and all")
    check(found, count)
    assert len(killed) == 2, "the work was over before the trouble"
    ray.shutdown()
    nodes.shutdown()
    server.terminate()


def beside(count: int = 400) -> None:
    """One call a row, as that processor makes, with as many actors."""
    import ray
    from ray.data.llm import HttpRequestProcessorConfig, build_processor

    import ecso.ray

    ray.init(num_cpus=4, log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    for failing in (0.0, FAILING):
        url, server = started(failing)
        print(f"{count} rows, one call each, 2 actors, {failing:.0%} of calls fail")
        table = rows(count)
        config = HttpRequestProcessorConfig(url=f"{url}/chat/completions", batch_size=64, concurrency=2)
        message = lambda row: [{"role": "user", "content": row["query"]}]  # noqa: E731
        processor = build_processor(
            config,
            preprocess=lambda row: {"payload": {"model": "toy", "messages": message(row)}, "number": row["number"]},
            postprocess=lambda row: {"number": row["number"], "answer": row["http_response"]},
        )
        begun = time.monotonic()
        try:
            found = processor(ray.data.from_items(table, override_num_blocks=8)).take_all()
            answered = sum("choices" in (row["answer"] or {}) for row in found)
            print(f"  Ray's processor: {count / (time.monotonic() - begun):.0f} rows/s, {len(found)} rows, {answered} answered")
        except Exception as error:  # noqa: BLE001
            lines = str(error).strip().splitlines()
            print(f"  Ray's processor: ended after {time.monotonic() - begun:.1f} s with {type(error).__name__}: {lines[-1][:200]}")
        settings = {**SETTINGS, "set": {"gate": "never"}}
        begun = time.monotonic()
        dataset = ray.data.from_items(table, override_num_blocks=8)
        found = ecso.ray.map_batches(dataset, url, "paper", settings=settings, batch_size=64, actors=2).take_all()
        answered = sum(row["answer"] is not None for row in found)
        print(f"  the guard's actors: {count / (time.monotonic() - begun):.0f} rows/s, {len(found)} rows, {answered} answered")
        server.terminate()
    ray.shutdown()


def spark(count: int = 1_000) -> None:
    from pyspark.sql import SparkSession

    import ecso.spark

    os.environ["PYSPARK_PYTHON"] = sys.executable
    url, server = started()
    session = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    session.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", "250")
    print(f"Spark {session.version}, {count} rows")
    frame = session.createDataFrame(
        [(row["number"], row["query"], bytearray(row["image"])) for row in rows(count)], "number long, query string, image binary"
    )
    begun = time.monotonic()
    answered = ecso.spark.map_in_arrow(frame.repartition(2), url, "paper", settings=SETTINGS)
    found = [row.asDict() for row in answered.select("number", "answer", "error", "error_kind").collect()]
    print(f"  {count / (time.monotonic() - begun):.0f} rows/s, the start of its workers and all")
    check(found, count)
    session.stop()
    server.terminate()


def daft(count: int = 1_000) -> None:
    import daft as engine

    import ecso.daft

    url, server = started()
    print(f"Daft {engine.__version__}, {count} rows")
    table = rows(count)
    frame = engine.from_pydict({name: [row[name] for row in table] for name in table[0]})
    begun = time.monotonic()
    answered = ecso.daft.answers(frame, {"query": "query", "image": "image"}, url, "paper", settings=SETTINGS)
    found = [{"number": row["number"], **row["guarded"]} for row in answered.to_pylist()]
    print(f"  {count / (time.monotonic() - begun):.0f} rows/s")
    check(found, count)
    server.terminate()


if __name__ == "__main__":
    for name in sys.argv[1:] or ["cluster", "beside", "spark", "daft"]:
        {"cluster": cluster, "beside": beside, "spark": spark, "daft": daft}[name]()
