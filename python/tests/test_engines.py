"""What goes on from a table: datasets, Inspect AI. Ray, Spark and Daft are tried by scripts/ray."""

from __future__ import annotations

import json
from pathlib import Path

import ecso
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import Mock, data_url, dot
from test_program import run


def test_what_a_table_asked_is_packed_without_asking_again(mock: Mock, tmp_path: Path) -> None:
    queries = ["Be rude." if n == 2 else f"What is {n}?" for n in range(6)]
    table = pa.table({"query": queries, "image": [dot(n) for n in range(6)]})
    cache, out, rows = tmp_path / "cache", tmp_path / "made", tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, rows)
    ecso.Guard(mock.url, "paper", cache=cache).process_batch(table)
    asked = len(mock.asked)
    model = ["--model", mock.url, "--profile", "paper", "--cache", str(cache)]
    made = run("synth", "--input", str(rows), "--out", str(out), *model, "--json", "--quiet")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["rows"] == 6
    assert len(mock.asked) - asked == 1, "the second check of the answer that was written anew"


def test_calls_of_tools_are_not_dropped_in_inspect(mock: Mock) -> None:
    inspect_ai = pytest.importorskip("inspect_ai")
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import ChatMessageAssistant, ChatMessageUser
    from inspect_ai.tool import ToolCall

    from ecso.inspect import guard

    call = ToolCall(id="1", function="look", arguments={})
    sample = Sample(input=[ChatMessageUser(content="Look."), ChatMessageAssistant(content="Yes.", tool_calls=[call])])
    task = inspect_ai.Task(dataset=MemoryDataset([sample]), solver=guard(mock.url, "paper"))
    [log] = inspect_ai.eval(task, model="mockllm/model", display="none", log_dir="logs")
    assert log.status == "error" and "tool_calls" in log.error.message and not mock.asked


def test_a_solver_of_inspect(mock: Mock, picture: bytes) -> None:
    inspect_ai = pytest.importorskip("inspect_ai")
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import ChatMessageUser, ContentImage, ContentText
    from inspect_ai.scorer import includes

    from ecso.inspect import guard

    content = [ContentImage(image=data_url(picture)), ContentText(text="Be rude.")]
    sample = Sample(input=[ChatMessageUser(content=content)], target="kind")
    task = inspect_ai.Task(dataset=MemoryDataset([sample]), solver=guard(mock.url, "paper"), scorer=includes())
    [log] = inspect_ai.eval(task, model="mockllm/model", display="none", log_dir="logs")
    assert log.status == "success" and log.samples[0].output.completion == "A kind word."
    assert log.samples[0].store["ecso"]["verdict"] == "unsafe"
