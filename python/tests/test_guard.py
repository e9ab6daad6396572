"""`Guard` and `AsyncGuard`, one conversation at a time."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import ecso
import numpy
import PIL.Image
import pytest
from conftest import PICTURE, Mock, data_url, images_of

from ecso import chats


def guard(mock: Mock, **settings: object) -> ecso.Guard:
    return ecso.Guard(mock.url, "paper", **settings)  # type: ignore[arg-type]


def test_a_safe_answer_goes_out_as_it_is(mock: Mock) -> None:
    outcome = guard(mock).answer("What is on it?", images=PICTURE)
    assert (outcome.verdict, outcome.rewritten, outcome.answer) == ("safe", False, "A list of things: What is on it?")
    assert [step.step for step in outcome.steps] == ["direct", "detect"]
    assert outcome.tokens == 24 and outcome.model == "toy" and outcome.profile == "paper"
    assert all(step.ms >= 0 and step.prompt and step.reply for step in outcome.steps)


def test_an_unsafe_one_is_written_anew(mock: Mock) -> None:
    outcome = guard(mock).answer("Be rude.", images=PICTURE)
    assert (outcome.verdict, outcome.rewritten, outcome.answer) == ("unsafe", True, "A kind word.")
    assert [step.step for step in outcome.steps] == ["direct", "detect", "caption", "safe"]
    with pytest.raises(AttributeError):
        outcome.answer = "other"  # type: ignore[misc]
    plain = outcome.to_dict()
    assert json.loads(json.dumps(plain)) == plain and plain["steps"][1]["verdict"] == "unsafe"


def test_a_draft_is_reviewed(mock: Mock) -> None:
    outcome = guard(mock).review("What is it?", PICTURE, draft="Rude words.")
    assert (outcome.verdict, outcome.answer) == ("unsafe", "A kind word.")
    assert "direct" not in [step.step for step in outcome.steps]


def test_steps_are_seen_and_the_answer_comes_after_the_verdict(mock: Mock) -> None:
    events = list(guard(mock).stream("Be rude.", PICTURE))
    kinds = [type(event) for event in events]
    assert kinds[0] is ecso.Started and kinds[-1] is ecso.Done
    assert kinds.index(ecso.Decided) < kinds.index(ecso.Answer)
    done = events[-1]
    assert isinstance(done, ecso.Done)
    text = "".join(event.text for event in events if isinstance(event, ecso.Answer))
    assert text == done.outcome.answer == "A kind word."
    steps = [event.step for event in events if isinstance(event, ecso.Finished)]
    assert tuple(steps) == done.outcome.steps


def test_images_of_all_kinds(mock: Mock, picture: bytes) -> None:
    shown = PIL.Image.open(PICTURE)
    array = numpy.asarray(shown.convert("RGB"))
    for image in [
        PICTURE,
        str(PICTURE),
        picture,
        bytearray(picture),
        memoryview(picture),
        data_url(picture),
        shown,
        array,
        array[:, :, 0],
        array / 255.0,
    ]:
        assert guard(mock).answer("What?", image).verdict == "safe"
    sent = [body["messages"][-1]["content"] for body in mock.asked[::2]]
    urls = [next(part["image_url"]["url"] for part in content if part["type"] == "image_url") for content in sent]
    assert all(url == data_url(picture) for url in urls[:6]), "bytes go out as they came in"
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    guard(mock).answer("What?", [PICTURE, picture])
    assert images_of(mock.asked[-2]["messages"][-1]) == 2


def test_messages_are_a_conversation(mock: Mock, picture: bytes) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(picture)}}, {"type": "text", "text": "What?"}]},
    ]
    assert guard(mock).answer(messages).answer == "A list of things: What?"
    assert [message["role"] for message in mock.asked[0]["messages"]] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("query", "images", "error", "says"),
    [
        ("", None, ecso.InputError, "empty"),
        (None, None, ecso.InputError, "NoneType"),
        ({"role": "user", "content": "x"}, None, ecso.InputError, "a list of messages"),
        ([{"role": "tool", "content": "x"}], None, ecso.InputError, "tool"),
        ([{"role": "assistant", "content": "x"}], None, ecso.InputError, "no turn of the user"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], None, ecso.InputError, "input_audio"),
        ([{"role": "assistant", "content": "x", "tool_calls": [1]}], None, ecso.InputError, "tool_calls"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}],
            None,
            ecso.ImageError,
            "data URL",
        ),
        ("What?", b"no image", ecso.ImageError, "not an image"),
        ("What?", "/nowhere/a.png", ecso.ImageError, "/nowhere/a.png"),
        ("What?", "ftp://example.org/a.png", ecso.ImageError, "http or https"),
        ("What?", "iVBORw0K" * 1000, ecso.ImageError, "pass encoded images as bytes"),
        ("What?", 3, ecso.ImageError, "int is not an image"),
        ("What?", numpy.zeros((2, 2, 7), numpy.uint8), ecso.ImageError, "(2, 2, 7)"),
        ("What?", numpy.full((2, 2), 9.0), ecso.ImageError, "0..1"),
        ("What?", "http://127.0.0.1:1/a.png", ecso.ImageError, "not public"),
    ],
)
def test_what_cannot_be_asked(mock: Mock, query: object, images: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says.replace("(", r"\(").replace(")", r"\)")):
        guard(mock).answer(query, images)  # type: ignore[arg-type]
    assert mock.asked == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"colour": "blue"}, "colour"),
        ({"set": {"detect.colour": "blue"}}, "^detect.colour: unknown field `colour`, expected one of [^:]*$"),
        ({"set": {"direct": {"max_tokens": "many"}}}, "^direct: invalid type: string \"many\", expected u32$"),
        ({"server": {"retries": "many"}}, "retries"),
        ({"profile": "lenient"}, "lenient"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE"),
    ],
)
def test_settings_are_those_of_the_program(mock: Mock, settings: dict[str, object], says: str) -> None:
    with pytest.raises(ecso.SettingsError, match=says):
        ecso.Guard(mock.url, **{"profile": "paper", **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("login", ["me:secret", "me:se'cr@secret", "me:se secret"])
def test_a_login_is_not_shown(mock: Mock, login: str) -> None:
    shown = repr(ecso.Guard(f"http://{login}@localhost:1/v1?key=secret", "paper", server={"proxy": f"http://{login}@there"}))
    assert "secret" not in shown and "//***@localhost" in shown and "//***@there" in shown
    assert mock.url in repr(guard(mock))
    with pytest.raises(ecso.EcsoError) as unknown:
        ecso.Guard(f"{login}@localhost/v1", "paper").answer("What?")
    assert "secret" not in str(unknown.value)


def test_texts_are_not_shown_by_a_repr(mock: Mock) -> None:
    for event in guard(mock).stream("What is on it?", PICTURE):
        assert isinstance(event, ecso.Answer) or "What is on it?" not in repr(event).replace("A list of things: What is on it?", "")


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (lambda: ecso.Guard("http://a/v1", scope="all"), ecso.SettingsError, "pass it in `set`"),
        (lambda: ecso.Guard("http://a/v1", api_key=b"k"), TypeError, "not bytes"),
        (lambda: ecso.Guard("http://a/v1", api_key="k\n"), ecso.SettingsError, "line break"),
        (lambda: ecso.Guard("http://a/v1", set=["a=b"]), TypeError, "dictionary"),
        (lambda: ecso.Guard("http://a/v1", set={"threshold": None}), TypeError, "leave the field out"),
        (lambda: ecso.Guard("http://a/v1", concurrency=2**64), ValueError, "concurrency"),
        (lambda: ecso.Guard(b"http://a/v1"), TypeError, "bytes"),
        (lambda: ecso.Guard("http://a/v1", "/dev/zero"), ecso.SettingsError, "/dev/zero"),
        (lambda: ecso.Guard("http://a/v1").answer(b"What?"), ecso.InputError, "not bytes"),
        (lambda: ecso.Guard("http://a/v1").review("What?", PICTURE, draft=None), TypeError, "NoneType"),
        (lambda: ecso.Guard("http://a/v1").process_batch(None, image_bytes=-1), ValueError, "image_bytes"),
        (lambda: ecso.Guard("http://a/v1").process_batch(None, map=[]), TypeError, "dictionary"),
        (lambda: ecso.Guard("http://a/v1").process_batch(None, journal=""), ValueError, "empty"),
    ],
)
def test_wrong_arguments(wrong: Callable[[], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        wrong()


def test_pictures_that_cannot_be_read(mock: Mock, picture: bytes) -> None:
    cut = PIL.Image.open(io.BytesIO(picture[: len(picture) // 2]))
    for image in (cut, numpy.zeros((0, 5, 3), numpy.uint8)):
        with pytest.raises(ecso.ImageError):
            guard(mock).answer("What?", image)
    turned = PIL.Image.new("RGB", (9, 5))
    turned.getexif()[0x0112] = 6
    sent = io.BytesIO()
    turned.save(sent, format="JPEG", exif=turned.getexif())
    with PIL.Image.open(io.BytesIO(chats.image(PIL.Image.open(sent))[1])) as upright:
        assert upright.size == (5, 9)
    with pytest.raises(ecso.ImageError, match="binary"):
        guard(mock).answer("What?", io.StringIO("text"))  # type: ignore[arg-type]
    assert chats.image(io.BytesIO(picture)) == ("bytes", picture)
    with pytest.raises(ecso.ImageError, match="image 2 of 2"):
        guard(mock).answer("What?", [PICTURE, b"none"])
    for query, system, draft in [("What \ud800?", None, ""), ("What?", "\ud800", ""), ("What?", None, "\ud800")]:
        with pytest.raises(ecso.InputError, match="surrogates"):
            guard(mock).review(query, PICTURE, system=system, draft=draft)
    assert not mock.asked


def test_settings_change_what_is_sent(mock: Mock) -> None:
    one = guard(mock, set={"direct.max_tokens": 7, "scope": "all"}, model_name="named", api_key="secret", server={"omit": "seed"})
    assert one.answer("Hello.").verdict == "safe"
    assert mock.asked[0]["model"] == "named"
    assert 7 in (mock.asked[0].get("max_tokens"), mock.asked[0].get("max_completion_tokens"))
    assert mock.keys == {"Bearer secret"}
    assert "secret" not in repr(one)
    guard(mock, set={"direct": {"max_tokens": 5}, "caption": {"template": 'Say "what" it is: {query}'}}).answer("Hello.")
    assert 5 in (mock.asked[-1].get("max_tokens"), mock.asked[-1].get("max_completion_tokens"))


def test_failures_have_kinds(mock: Mock) -> None:
    quick = guard(mock, server={"retries": 0})
    mock.statuses = [(429, {"Retry-After": "7"})]
    with pytest.raises(ecso.RateLimited) as limited:
        quick.answer("What?", PICTURE)
    assert limited.value.retry_after == 7.0
    assert pickle.loads(pickle.dumps(limited.value)).retry_after == 7.0
    mock.statuses = [(401, {})]
    with pytest.raises(ecso.Rejected):
        quick.answer("What?", PICTURE)
    mock.statuses = [(500, {})]
    with pytest.raises(ecso.ModelError):
        quick.answer("What?", PICTURE)
    with pytest.raises(ecso.Unreachable) as away:
        ecso.Guard("http://127.0.0.1:9/v1", "paper", server={"retries": 0}).answer("What?", PICTURE)
    assert isinstance(away.value, ConnectionError)
    mock.wait = 3.0
    with pytest.raises(ecso.Timeout):
        guard(mock, server={"retries": 0, "reply_timeout": 1}).answer("What?", PICTURE)


def test_a_model_in_this_process_needs_the_engine() -> None:
    if ecso.has_engine():
        pytest.skip("this wheel has the engine")
    with pytest.raises(ecso.SettingsError, match="no engine"):
        ecso.Guard("mini", "paper").answer("What?", PICTURE)


def test_it_can_be_pickled(mock: Mock) -> None:
    fields = {"direct.max_tokens": 7}
    original = guard(mock, set=fields, concurrency=3)
    fields["no.such.field"] = 1
    copy = pickle.loads(pickle.dumps(original))
    assert (copy.profile, copy.concurrency) == ("paper+", 3)
    assert copy.answer("What?", PICTURE).verdict == "safe"
    awaited = pickle.loads(pickle.dumps(ecso.AsyncGuard(mock.url, "paper")))
    assert isinstance(awaited, ecso.AsyncGuard)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_opens_its_own(mock: Mock) -> None:
    shared = guard(mock)
    assert shared.answer("What?", PICTURE).verdict == "safe"
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if shared.answer("What?", PICTURE).verdict == "safe" else 1)
        finally:
            os._exit(2)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the forked process hangs")
    assert os.waitstatus_to_exitcode(status) == 0
    assert shared.answer("What?", PICTURE).verdict == "safe"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_stream_is_of_the_process_that_began_it(mock: Mock) -> None:
    events = guard(mock).stream("What?", PICTURE)
    next(events)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            next(events)
        except RuntimeError as error:
            events.close()
            os._exit(0 if "fork" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert isinstance(list(events)[-1], ecso.Done)


def test_other_threads_run_meanwhile(mock: Mock) -> None:
    mock.wait = 0.4
    shared, outcomes = guard(mock), []
    threads = [threading.Thread(target=lambda: outcomes.append(shared.answer("What?", PICTURE))) for _ in range(8)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    ticks = 0
    while any(thread.is_alive() for thread in threads):
        ticks += 1
        time.sleep(0.01)
    assert len(outcomes) == 8 and ticks > 20
    assert time.monotonic() - begun < 8 * 0.8 * 0.6, "they wait side by side"


def test_ctrl_c_ends_the_work(mock: Mock, tmp_path: Path) -> None:
    mock.wait = 20.0
    script = tmp_path / "wait.py"
    script.write_text(
        "import ecso, sys\n"
        f"guard = ecso.Guard({mock.url!r}, 'paper')\n"
        "print('ready', flush=True)\n"
        "try:\n"
        f"    guard.answer('What?', {str(PICTURE)!r})\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(42)\n"
    )
    waiting = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
    assert waiting.stdout is not None and waiting.stdout.readline() == b"ready\n"
    while not mock.asked:
        time.sleep(0.02)
    begun = time.monotonic()
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(10) == 42
    assert time.monotonic() - begun < 3


def test_asyncio(mock: Mock) -> None:
    async def work() -> None:
        waiting = ecso.AsyncGuard(mock.url, "paper")
        mock.wait = 0.3
        begun = time.monotonic()
        outcomes = await asyncio.gather(*(waiting.answer(f"What is {n}?", PICTURE) for n in range(6)))
        assert [outcome.answer[-2:] for outcome in outcomes] == [f"{n}?" for n in range(6)]
        assert time.monotonic() - begun < 6 * 0.6 * 0.6
        events = [event async for event in waiting.stream("Be rude.", PICTURE)]
        assert isinstance(events[-1], ecso.Done)
        assert (await waiting.review("What?", PICTURE, draft="Rude words.")).rewritten
        mock.wait = 0.0
        mock.fails = {"forbidden": 400}
        with pytest.raises(ecso.Rejected):
            await waiting.answer("forbidden", PICTURE)

    asyncio.run(work())


def test_a_cancelled_task_ends_its_work(mock: Mock) -> None:
    async def work() -> None:
        mock.wait = 0.5
        task = asyncio.create_task(ecso.AsyncGuard(mock.url, "paper").answer("What?", PICTURE))
        while not mock.asked:
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(1.0)
        assert len(mock.asked) == 1, "no further step was asked"

    asyncio.run(work())


def test_a_loop_that_is_left_ends_the_work(mock: Mock) -> None:
    mock.wait = 0.2
    for _ in guard(mock).stream("What?", PICTURE):
        break
    time.sleep(0.6)
    assert len(mock.asked) <= 1


def test_mini_answers() -> None:
    models = os.environ.get("ECSO_TEST_MODELS")
    if not (models and ecso.has_engine()):
        pytest.skip("skipped: no models (ECSO_TEST_MODELS), or a wheel without the engine")
    outcome = ecso.Guard("mini", "paper", models_dir=models, set={"direct.max_tokens": 24}).answer(
        "What is the heading of the list?", PICTURE
    )
    assert "bread" in outcome.answer.lower() and outcome.model == "mini"
    assert outcome.score is not None and 0 <= outcome.score <= 1
