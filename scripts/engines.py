"""Tests the guard on engines of others (Ray, Spark, Daft), against a mock model: engines.py PART...

  cluster   Ray with two nodes: an actor and then a node are killed in the middle; no row may be lost or duplicated
  beside    Ray's own HTTP processor on the same mock, for comparison
  spark     1,000 rows through Spark
  daft      1,000 rows through Daft

The mock takes 50 ms per call, and answers 1 of 100 calls with 429 or 500. One image of each table is broken.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

from mocks import Response, completion, png, start_fast_model  # noqa: E402

LATENCY, FAILURE_RATE = 0.05, 0.01
BROKEN = 77
SETTINGS = {"concurrency": 64, "server": {"retries": 4}}


def rows(count: int) -> list[dict[str, Any]]:
    """Rows with images of one pixel, a different one for each number."""
    image = lambda number: b"no image" if number == BROKEN else png(1, number.to_bytes(3, "big"))  # noqa: E731
    return [{"number": number, "query": f"What is number {number}?", "image": image(number)} for number in range(count)]


class EchoModel:
    """Repeats the question, finds nothing harmful, and fails at the given rate."""

    def __init__(self, failure_rate: float) -> None:
        self.failure_rate, self.random = failure_rate, random.Random(1)

    def __call__(self, request: bytes) -> Response:
        if not request:
            return 200, "", b'{"data": [{"id": "m"}]}'
        if self.random.random() < self.failure_rate:
            status = self.random.choice([429, 500])
            return status, "Retry-After: 0\r\n" if status == 429 else "", b'{"error": {"message": "try again"}}'
        content = json.loads(request)["messages"][-1]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        answer = "No." if "Is the RESPONSE harmful" in text else f"Seen: {text}"
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        return 200, "", json.dumps(completion(answer, usage)).encode()


def start_mock(failure_rate: float = FAILURE_RATE) -> tuple[str, Any]:
    return start_fast_model(EchoModel(failure_rate), LATENCY)


def check(answers: list[dict[str, Any]], count: int) -> None:
    """Checks that every row is there once with its own answer, and the broken one with an error."""
    numbers = [row["number"] for row in answers]
    lost, duplicated = count - len(set(numbers)), len(numbers) - len(set(numbers))
    failed = [row for row in answers if row["error"] is not None]
    wrong = [row for row in answers if row["error"] is None and row["answer"] != f"Seen: What is number {row['number']}?"]
    print(f"  {len(answers)} rows: {lost} lost, {duplicated} duplicated, {len(wrong)} with a wrong answer, {len(failed)} failed")
    assert not (lost or duplicated or wrong), wrong[:3]
    assert [(row["number"], row["error_kind"]) for row in failed] == [(BROKEN, "image")], failed[:3]


def processes_with_open_files(folder: str) -> Iterator[int]:
    """The processes that have files open in a folder."""
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            files = [os.readlink(f"/proc/{process}/fd/{file}") for file in os.listdir(f"/proc/{process}/fd")]
        except OSError:
            continue
        if any(file.startswith(folder) for file in files):
            yield int(process)


def cluster(count: int = 10_000) -> None:
    import ray
    from ray.cluster_utils import Cluster

    import ecso.ray

    url, server = start_mock()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    second = nodes.add_node(num_cpus=2)
    ray.init(address=nodes.address, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    print(f"Ray {ray.__version__}, {len(ray.nodes())} nodes, {count} rows")
    killed: list[str] = []

    def kill_actor_and_node(journal: str) -> None:
        done = lambda: sum(line.startswith(b'{"id"') for name in os.listdir(journal) for line in open(os.path.join(journal, name), "rb"))  # noqa: E731, SIM115

        while not os.path.isdir(journal) or done() < count // 4:
            time.sleep(0.2)
        os.kill(next(processes_with_open_files(journal)), signal.SIGKILL)
        killed.append(f"an actor after {done()} rows")
        while done() < count // 2:
            time.sleep(0.2)
        nodes.remove_node(second, allow_graceful=False)
        killed.append(f"a node after {done()} rows")

    with tempfile.TemporaryDirectory() as folder:
        journal = os.path.join(folder, "journal")
        worker = threading.Thread(target=kill_actor_and_node, args=(journal,), daemon=True)
        worker.start()
        started = time.monotonic()
        dataset = ray.data.from_items(rows(count), override_num_blocks=40)
        answered = ecso.ray.map_batches(
            dataset, url, "paper", settings=SETTINGS, options={"journal": journal}, batch_size=250, actors=2, num_cpus=1
        )
        answers = answered.select_columns(["number", "answer", "error", "error_kind"]).take_all()
        seconds = time.monotonic() - started
        worker.join(5)
    print(f"  killed: {', '.join(killed) or 'nothing'}")
    print(f"  {count / seconds:.0f} rows/s, {seconds:.1f} s, including restarts")
    check(answers, count)
    assert len(killed) == 2, "the run ended before both were killed"
    ray.shutdown()
    nodes.shutdown()
    server.terminate()


def beside(count: int = 400) -> None:
    """One call per row, as Ray's processor makes, with the same number of actors."""
    import ray
    from ray.data.llm import HttpRequestProcessorConfig, build_processor

    import ecso.ray

    ray.init(num_cpus=4, log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    for failure_rate in (0.0, FAILURE_RATE):
        url, server = start_mock(failure_rate)
        print(f"{count} rows, one call each, 2 actors, {failure_rate:.0%} of calls fail")
        table = rows(count)
        config = HttpRequestProcessorConfig(url=f"{url}/chat/completions", batch_size=64, concurrency=2)
        message = lambda row: [{"role": "user", "content": row["query"]}]  # noqa: E731
        processor = build_processor(
            config,
            preprocess=lambda row: {"payload": {"model": "m", "messages": message(row)}, "number": row["number"]},
            postprocess=lambda row: {"number": row["number"], "answer": row["http_response"]},
        )
        started = time.monotonic()
        try:
            answers = processor(ray.data.from_items(table, override_num_blocks=8)).take_all()
            answer_count = sum("choices" in (row["answer"] or {}) for row in answers)
            print(f"  Ray's processor: {count / (time.monotonic() - started):.0f} rows/s, {len(answers)} rows, {answer_count} answered")
        except Exception as error:  # noqa: BLE001
            lines = str(error).strip().splitlines()
            print(f"  Ray's processor: ended after {time.monotonic() - started:.1f} s with {type(error).__name__}: {lines[-1][:200]}")
        settings = {**SETTINGS, "set": {"gate": "never"}}
        started = time.monotonic()
        dataset = ray.data.from_items(table, override_num_blocks=8)
        answers = ecso.ray.map_batches(dataset, url, "paper", settings=settings, batch_size=64, actors=2).take_all()
        answer_count = sum(row["answer"] is not None for row in answers)
        print(f"  the guard's actors: {count / (time.monotonic() - started):.0f} rows/s, {len(answers)} rows, {answer_count} answered")
        server.terminate()
    ray.shutdown()


def spark(count: int = 1_000) -> None:
    from pyspark.sql import SparkSession

    import ecso.spark

    os.environ["PYSPARK_PYTHON"] = sys.executable
    url, server = start_mock()
    session = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    session.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", "250")
    print(f"Spark {session.version}, {count} rows")
    frame = session.createDataFrame(
        [(row["number"], row["query"], bytearray(row["image"])) for row in rows(count)], "number long, query string, image binary"
    )
    started = time.monotonic()
    answered = ecso.spark.map_in_arrow(frame.repartition(2), url, "paper", settings=SETTINGS)
    answers = [row.asDict() for row in answered.select("number", "answer", "error", "error_kind").collect()]
    print(f"  {count / (time.monotonic() - started):.0f} rows/s, including the start of its workers")
    check(answers, count)
    session.stop()
    server.terminate()


def daft(count: int = 1_000) -> None:
    import daft as engine

    import ecso.daft

    url, server = start_mock()
    print(f"Daft {engine.__version__}, {count} rows")
    table = rows(count)
    frame = engine.from_pydict({name: [row[name] for row in table] for name in table[0]})
    started = time.monotonic()
    answered = ecso.daft.answers(frame, {"query": "query", "image": "image"}, url, "paper", settings=SETTINGS)
    answers = [{"number": row["number"], **row["guarded"]} for row in answered.to_pylist()]
    print(f"  {count / (time.monotonic() - started):.0f} rows/s")
    check(answers, count)
    server.terminate()


if __name__ == "__main__":
    for name in sys.argv[1:] or ["cluster", "beside", "spark", "daft"]:
        {"cluster": cluster, "beside": beside, "spark": spark, "daft": daft}[name]()
