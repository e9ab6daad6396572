"""`Guard.process_batch`: tables of Arrow."""

from __future__ import annotations

import asyncio
import email.utils
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ecso
import polars
import pyarrow as pa
import pytest
from conftest import PICTURE, Mock, dot

NEW = ["answer", "verdict", "score", "caption", "tokens", "milliseconds", "error", "error_kind"]
PATIENT = {"retries": 0, "away_timeout": 1}


def guard(mock: Mock, **settings: Any) -> ecso.Guard:
    return ecso.Guard(mock.url, "paper", **settings)


def rows(count: int, **columns: list[Any]) -> pa.RecordBatch:
    table: dict[str, list[Any]] = {
        "number": list(range(count)),
        "query": [f"What is {n}?" for n in range(count)],
        "image": [dot(n) for n in range(count)],
    }
    return pa.RecordBatch.from_pydict({**table, **columns})


def test_as_many_rows_in_the_same_order(mock: Mock) -> None:
    batch = rows(50, query=["Be rude." if n % 7 == 0 else f"What is {n}?" for n in range(50)])
    answered = guard(mock).process_batch(batch)
    assert len(answered) == 50 and answered.column_names == ["number", "query", "image", *NEW]
    table = pa.record_batch(answered)
    assert table.select(["number", "query", "image"]).equals(batch)
    for row in table.to_pylist():
        is_rude = row["number"] % 7 == 0
        assert row["verdict"] == ("unsafe" if is_rude else "safe")
        assert row["answer"] == ("A kind word." if is_rude else f"A list of things: What is {row['number']}?")
        assert (row["caption"] is not None) == is_rude
        assert row["tokens"] == (48 if is_rude else 24) and row["milliseconds"] >= 0
        assert row["error"] is None and row["error_kind"] is None


def test_types_are_the_same_whatever_is_in_a_table(mock: Mock) -> None:
    kinds = [pa.string(), pa.string(), pa.float64(), pa.string(), pa.int64(), pa.int64(), pa.string(), pa.string()]
    one = guard(mock)
    empty = rows(0).cast(rows(1).schema)
    for batch in [rows(2), empty, rows(2, image=[b"none", b"none"]), pa.Table.from_batches([], rows(1).schema)]:
        schema = pa.table(one.process_batch(batch)).schema
        assert schema.names[-8:] == NEW and [schema.field(name).type for name in NEW] == kinds


def test_tables_of_others(mock: Mock) -> None:
    batch = rows(5)
    one = guard(mock)
    frame = polars.DataFrame(one.process_batch(polars.DataFrame(batch)))
    assert frame.shape == (5, 11) and frame["verdict"].to_list() == ["safe"] * 5
    parts = pa.Table.from_batches([batch, batch.slice(1, 2), batch.slice(0, 0)])
    table = pa.table(one.process_batch(parts))
    assert table.num_rows == 7 and [len(chunk) for chunk in table["answer"].chunks if len(chunk)] == [5, 2]
    assert pa.record_batch(one.process_batch(parts)).num_rows == 7
    with pytest.raises(TypeError, match="PyCapsule"):
        one.process_batch([{"query": "What?"}])  # type: ignore[arg-type]


def test_images_and_conversations_as_datasets_have_them(mock: Mock, picture: bytes, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Be rude."}]
    tables = [
        {"prompt": ["What?"], "image": [{"bytes": picture, "path": None}]},
        {"question": ["What?"], "images": [[{"bytes": picture, "path": "a.png"}]]},
        {"query": ["What?"], "image_path": [str(PICTURE)]},
        {"asked": ["What?"], "photo": [picture]},
    ]
    for table in tables[:3]:
        row = pa.table(guard(mock).process_batch(pa.table(table))).to_pylist()[0]
        assert (row["error"], row["answer"]) == (None, "A list of things: What?"), table.keys()
    mapped = guard(mock).process_batch(pa.table(tables[3]), map={"query": "asked", "image": "photo"})
    assert pa.table(mapped)["verdict"].to_pylist() == ["safe"]
    told = guard(mock).process_batch(pa.table({"messages": [talk], "image": [picture]}))
    assert pa.table(told)["verdict"].to_pylist() == ["unsafe"]
    asked = guard(mock).process_batch(pa.table({"image": [picture]}), query="What?")
    assert pa.table(asked)["verdict"].to_pylist() == ["safe"]
    drafted = guard(mock).process_batch(pa.table({"query": ["What?"], "image": [picture], "draft": ["Rude words."]}))
    assert pa.table(drafted)["verdict"].to_pylist() == ["unsafe"]


def test_a_row_that_fails_is_a_row(mock: Mock) -> None:
    mock.fails = {"What is 4?": 400}
    images: list[Any] = [dot(n) for n in range(8)]
    images[1], images[2] = b"no image", b"\x89PNG\r\n\x1a\nbroken"
    queries: list[Any] = [f"What is {n}?" for n in range(8)]
    queries[3] = None
    table = pa.table(guard(mock, server=PATIENT).process_batch(rows(8, image=images, query=queries)))
    kinds = table["error_kind"].to_pylist()
    assert kinds == [None, "image", "image", "input", "rejected", None, None, None]
    assert [error is None for error in table["error"].to_pylist()] == [kind is None for kind in kinds]
    assert all(len(error) < 400 for error in table["error"].to_pylist() if error)


def test_urls_inside_are_not_reached(mock: Mock) -> None:
    url = mock.url.replace("/v1", "/a.png")
    table = pa.table(guard(mock).process_batch(pa.table({"query": ["What?"], "image": [url]})))
    assert table["error_kind"].to_pylist() == ["image"] and "not public" in table["error"][0].as_py()
    refusing = guard(mock, gateway={"image_urls": "refuse"}).process_batch(pa.table({"query": ["What?"], "image": [url]}))
    assert "not fetched here" in pa.table(refusing)["error"][0].as_py()


def test_a_table_without_queries_is_an_error(mock: Mock) -> None:
    with pytest.raises(ecso.InputError, match="query"):
        guard(mock).process_batch(pa.table({"number": [1]}))
    with pytest.raises(ecso.SettingsError, match="colour"):
        guard(mock).process_batch(rows(1), map={"colour": "query"})
    twice = guard(mock).process_batch(rows(1))
    with pytest.raises(ecso.SettingsError, match="prefix"):
        guard(mock).process_batch(twice)
    again = guard(mock).process_batch(twice, prefix="second_")
    assert again.column_names[-1] == "second_error_kind"


def test_equal_rows_are_asked_about_once(mock: Mock) -> None:
    batch = rows(30, image=[dot(n % 3) for n in range(30)], query=["What?"] * 30)
    table = pa.table(guard(mock).process_batch(batch))
    assert table["verdict"].to_pylist() == ["safe"] * 30 and len(mock.asked) == 6


def test_rows_are_under_way_together(mock: Mock) -> None:
    mock.wait = 0.1
    begun = time.monotonic()
    guard(mock, concurrency=16).process_batch(rows(64))
    assert 8 < mock.most <= 16
    assert time.monotonic() - begun < 64 * 0.2 / 16 * 2


def test_too_many_calls_are_made_fewer(mock: Mock) -> None:
    mock.statuses = [(429, {"Retry-After": "1"})] * 4
    begun = time.monotonic()
    table = pa.table(guard(mock, server={"retries": 0}).process_batch(rows(20)))
    assert table["error"].null_count == 20 and time.monotonic() - begun > 0.9


def test_a_share_of_failures_ends_a_table(mock: Mock) -> None:
    batch = rows(20, image=[b"none" if n < 8 else dot(n) for n in range(20)])
    one = guard(mock)
    assert pa.table(one.process_batch(batch, max_failures=0.5))["error"].null_count == 12
    with pytest.raises(ecso.TooManyFailures, match="of 20 rows"):
        one.process_batch(batch, max_failures=0.1)
    with pytest.raises(ValueError, match="0..1"):
        one.process_batch(batch, max_failures=7)


def test_a_model_that_stays_away_ends_a_table(mock: Mock) -> None:
    away = ecso.Guard("http://127.0.0.1:9/v1", "paper", model_name="toy", server=PATIENT)
    with pytest.raises(ecso.Unreachable):
        away.process_batch(rows(3))


def test_a_model_that_is_back_is_asked_again(mock: Mock) -> None:
    one = guard(mock, server=PATIENT)
    one.process_batch(rows(1))
    mock.fails = {"": 500}
    with pytest.raises(ecso.ModelError):
        one.process_batch(rows(3))
    mock.fails = {}
    assert pa.table(one.process_batch(rows(3)))["error"].null_count == 3


def test_a_server_with_another_model_is_opened_again(mock: Mock, tmp_path: Path) -> None:
    one = guard(mock, server=PATIENT)
    one.process_batch(rows(1))
    mock.model, mock.statuses = "other", [(500, {})]
    with pytest.raises(ecso.ModelError, match="another model"):
        one.process_batch(rows(3))
    mock.statuses, mock.asked = [], []
    assert pa.table(one.process_batch(rows(3)))["error"].null_count == 3
    assert {body["model"] for body in mock.asked} == {"other"}


def test_a_wait_may_be_a_date(mock: Mock) -> None:
    date = email.utils.formatdate(time.time() + 3, usegmt=True)
    mock.statuses = [(429, {"Retry-After": date})]
    begun = time.monotonic()
    assert pa.table(guard(mock, server={"retries": 0}).process_batch(rows(2)))["error"].null_count == 2
    assert 1.5 < time.monotonic() - begun < 6


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits on files")
def test_a_full_disk_costs_no_journal(mock: Mock, tmp_path: Path) -> None:
    script = (
        "import ecso, pyarrow as pa, resource, sys\n"
        "from pathlib import Path\n"
        "url, journal = sys.argv[1], Path(sys.argv[2])\n"
        "guard = ecso.Guard(url, 'paper', set={'scope': 'all'})\n"
        "table = lambda *queries: pa.table({'query': queries})\n"
        "guard.process_batch(table('What is 0?'), journal=journal)\n"
        "[file] = journal.iterdir()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 40, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    guard.process_batch(table('What is 1?'), journal=journal)\n"
        "except ecso.EcsoError as error:\n"
        "    print(error)\n"
        "print(file.read_bytes()[-1:])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "for _ in range(2):\n"
        "    print(len(guard.process_batch(table('What is 0?', 'What is 2?'), journal=journal)))\n"
    )
    journal = tmp_path / "journal"
    ran = subprocess.run([sys.executable, "-c", script, mock.url, journal], capture_output=True, text=True, timeout=60)
    error, last, *counts = ran.stdout.splitlines()
    assert "journal" in error and last != repr(b"\n"), ran.stderr + ran.stdout
    assert counts == ["2", "2"], ran.stderr
    asked = len(mock.asked)
    table = pa.table({"query": ["What is 2?"]})
    guard(mock, set={"scope": "all"}).process_batch(table, journal=journal)
    assert len(mock.asked) == asked


def test_ctrl_c_while_a_table_is_made(mock: Mock) -> None:
    schema = rows(1).schema

    def batches() -> Iterator[pa.RecordBatch]:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        guard(mock).process_batch(pa.RecordBatchReader.from_batches(schema, batches()))


def test_a_journal_that_is_a_file_is_a_wrong_setting(mock: Mock) -> None:
    with pytest.raises(ecso.SettingsError, match="the journal can't be used"):
        guard(mock).process_batch(rows(1), journal=PICTURE)


def test_warnings_are_those_of_logging(mock: Mock, caplog: pytest.LogCaptureFixture) -> None:
    mock.statuses = [(429, {"Retry-After": "1"})]
    batch = pa.table({"query": ["What?", "Why?"], "image": [dot(1), None]})
    guard(mock, server={"retries": 0}).process_batch(batch, prefix="new_")
    told = [(record.name, record.levelname, record.message) for record in caplog.records if record.name == "ecso"]
    assert [level for _, level, _ in told] == ["WARNING"] * 2
    assert "overloaded" in told[0][2] and "1 of 2 rows have no image" in told[1][2]
    caplog.clear()
    guard(mock, set={"scope": "all"}).process_batch(batch)
    assert not [record for record in caplog.records if record.name == "ecso"]


def test_images_in_odd_columns_are_seen(mock: Mock) -> None:
    avif, pdf = b"\0\0\0\x20ftypavif" + bytes(40), b"%PDF-1.7\n" + bytes(40)
    numbers = pa.UnionArray.from_sparse(pa.array([1], pa.int8()), [pa.array([1]), pa.array([dot(1)])])
    mapped = pa.array([[(dot(1), "x")]], pa.map_(pa.binary(), pa.string()))
    for odd in [pa.array([avif]), pa.array([pdf]), pa.array([b"II*\0" + bytes(9)]), numbers, mapped]:
        table = pa.Table.from_arrays([pa.array(["What?"]), odd], names=["query", "detail"])
        assert pa.table(guard(mock).process_batch(table))["error_kind"].to_pylist() == ["input"], odd.type
    assert not mock.asked


def test_a_journal_stays_where_it_is(mock: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = guard(mock, cache="cache")
    one.process_batch(rows(1), journal="journal")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    one.process_batch(rows(2), journal="journal")
    assert len(list(tmp_path.glob("journal/*"))) == len(list(tmp_path.glob("below/journal/*"))) == 1
    assert not (tmp_path / "below" / "cache").exists()


def test_a_table_that_is_made_only_now(mock: Mock) -> None:
    batch = rows(2)

    def batches() -> Iterator[pa.RecordBatch]:
        for _ in range(3):
            time.sleep(0.2)
            yield batch

    async def work() -> None:
        reader = pa.RecordBatchReader.from_batches(batch.schema, batches())
        task = asyncio.create_task(ecso.AsyncGuard(mock.url, "paper").process_batch(reader))
        ticks = 0
        while not task.done():
            await asyncio.sleep(0.02)
            ticks += 1
        assert len(await task) == 6 and ticks > 20, "the event loop went on"

    asyncio.run(work())


def test_what_a_journal_has_is_not_asked_again(mock: Mock, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    mock.fails = {"What is 3?": 400}
    first = pa.table(guard(mock, server=PATIENT).process_batch(rows(10), journal=journal))
    assert first["error_kind"].to_pylist()[3] == "rejected"
    asked, mock.fails = len(mock.asked), {}
    # Another process would open a guard of its own; so does this one.
    second = pa.table(guard(mock).process_batch(rows(12), journal=journal))
    assert len(mock.asked) - asked == 3 * 2, "the one that failed, and two that are new"
    assert second["error"].null_count == 12
    assert second["answer"].to_pylist()[:3] == first["answer"].to_pylist()[:3]
    assert second["tokens"].to_pylist()[:3] == first["tokens"].to_pylist()[:3]
    # Under another profile answers are others.
    asked = len(mock.asked)
    guard(mock, set={"direct.max_tokens": 9}).process_batch(rows(2), journal=journal)
    assert len(mock.asked) - asked == 4
    files = list(journal.glob("answers-*.jsonl"))
    assert len(files) == 3
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sum("id" in line for line in lines) == 10 + 3 + 2


def test_a_journal_that_was_cut_off_is_read(mock: Mock, tmp_path: Path) -> None:
    guard(mock).process_batch(rows(5), journal=tmp_path / "journal")
    [file] = (tmp_path / "journal").iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    asked = len(mock.asked)
    table = pa.table(guard(mock).process_batch(rows(5), journal=tmp_path / "journal"))
    assert table["error"].null_count == 5 and len(mock.asked) - asked == 2


def test_replies_are_kept_for_others(mock: Mock, tmp_path: Path) -> None:
    guard(mock, cache=tmp_path / "cache").process_batch(rows(5))
    asked = len(mock.asked)
    guard(mock, cache=tmp_path / "cache").process_batch(rows(5))
    assert len(mock.asked) == asked


def test_asyncio(mock: Mock) -> None:
    async def work() -> None:
        table = await ecso.AsyncGuard(mock.url, "paper").process_batch(rows(4))
        assert pa.table(table)["verdict"].to_pylist() == ["safe"] * 4

    asyncio.run(work())


def test_texts_and_conversations_name_no_files(mock: Mock, picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(picture)
    path = str(tmp_path / "mine.png")
    told = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": path}}, {"type": "text", "text": "What?"}]}]
    for table in (
        pa.table({"query": [f"<img>{path}</img> What?", f"<img>{path}x</img> What?"]}),
        pa.table({"messages": [json.dumps(told)]}),
    ):
        answers = pa.table(guard(mock).process_batch(table)).to_pylist()
        assert {row["error_kind"] for row in answers} == {"input"}, answers
        assert all("only columns of images may" in row["error"] for row in answers), answers
    assert not mock.asked
    # A column of images is the data team's own.
    named = pa.table({"query": ["What?"], "image": [path]})
    assert pa.table(guard(mock).process_batch(named)).to_pylist()[0]["verdict"] == "safe"


def test_tables_that_are_broken_are_errors(mock: Mock) -> None:
    twice = pa.Table.from_arrays([pa.array(["What?"])] * 2, names=["query", "query"])
    with pytest.raises(ecso.EcsoError, match="two columns"):
        guard(mock).process_batch(twice)
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    with pytest.raises(ValueError, match="invalid"):
        guard(mock).process_batch(pa.table({"query": broken}))


def test_equal_rows_that_fail_are_all_counted(mock: Mock) -> None:
    mock.fails = {"What?": 400}
    table = pa.table({"query": ["What?"] * 9 + ["Why?"], "image": [dot(1)] * 10})
    with pytest.raises(ecso.TooManyFailures):
        guard(mock, server=PATIENT).process_batch(table, max_failures=0.5)
