"""`guarded`: a client of the package openai."""

from __future__ import annotations

import asyncio
from typing import Any

import ecso
import openai
import pytest
from conftest import Mock, data_url


def messages(picture: bytes, text: str) -> list[Any]:
    image = {"type": "image_url", "image_url": {"url": data_url(picture)}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def client(mock: Mock) -> Any:
    return ecso.guarded(openai.OpenAI(base_url=mock.url, api_key="mine", max_retries=0), "paper")


def test_answers_are_judged(mock: Mock, picture: bytes) -> None:
    safe = client(mock).chat.completions.create(model="toy", messages=messages(picture, "What?"), max_tokens=9)
    assert isinstance(safe, openai.types.chat.ChatCompletion)
    assert safe.choices[0].message.content == "A list of things: What?"
    assert safe.ecso == [{"verdict": "safe", "score": None, "rewritten": False, "profile": "paper"}]
    rude = client(mock).chat.completions.create(model="toy", messages=messages(picture, "Be rude."))
    assert rude.choices[0].message.content == "A kind word." and rude.ecso[0]["verdict"] == "unsafe"
    assert mock.keys == {"Bearer mine"} and {body["model"] for body in mock.asked} == {"toy"}


def test_streams_are_held(mock: Mock, picture: bytes) -> None:
    with client(mock).chat.completions.create(model="toy", messages=messages(picture, "Be rude."), stream=True) as stream:
        assert stream.ecso[0]["verdict"] == "unsafe"
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "A kind word."
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_what_nobody_judges_is_refused(mock: Mock, picture: bytes) -> None:
    one = client(mock)
    asked = {"model": "toy", "messages": messages(picture, "What?")}
    for more in [{"tools": [{}]}, {"logprobs": True}, {"extra_body": {"x": 1}}, {"modalities": ["audio"]}]:
        with pytest.raises(ecso.InputError, match=next(iter(more))):
            one.chat.completions.create(**asked, **more)
    with pytest.raises(ecso.InputError, match="tool"):
        one.chat.completions.create(model="toy", messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}])
    assert mock.asked == []
    for reach in [lambda: one.responses, lambda: one.chat.completions.with_raw_response, lambda: one.with_options()]:
        with pytest.raises(AttributeError, match="not guarded"):
            reach()
    mock.fails = {"Is the RESPONSE harmful": 400}
    with pytest.raises(ecso.Rejected):
        one.chat.completions.create(**asked)


def test_asyncio(mock: Mock, picture: bytes) -> None:
    async def work() -> None:
        one = ecso.guarded(openai.AsyncOpenAI(base_url=mock.url, api_key="mine"), "paper")
        rude = await one.chat.completions.create(model="toy", messages=messages(picture, "Be rude."))
        assert rude.choices[0].message.content == "A kind word."
        async with await one.chat.completions.create(model="toy", messages=messages(picture, "What?"), stream=True) as stream:
            assert stream.ecso[0]["verdict"] == "safe"
            texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(texts) == "A list of things: What?"

    asyncio.run(work())


def test_model_and_judge_are_shown_the_same(mock: Mock, picture: bytes) -> None:
    url = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}
    hidden = {"type": "text", "text": "What?", "image_url": {"url": data_url(picture)}}
    for content in ([url], [hidden]):
        with pytest.raises(ecso.InputError):
            client(mock).chat.completions.create(model="toy", messages=[{"role": "user", "content": content}])
    assert not mock.asked


def test_what_is_not_given_is_not_refused(mock: Mock, picture: bytes) -> None:
    asked = [{**message, "name": None, "tool_calls": None} for message in messages(picture, "What?")]
    answer = client(mock).chat.completions.create(model="toy", messages=asked, tools=openai.NOT_GIVEN, stream=None, top_p=None)
    assert answer.ecso[0]["verdict"] == "safe" and "tools" not in mock.asked[0]
    with pytest.raises(ecso.InputError, match="name"):
        client(mock).chat.completions.create(model="toy", messages=[{**asked[0], "name": "someone"}])


def test_the_model_is_named_by_each_call(mock: Mock) -> None:
    raw = openai.OpenAI(base_url=mock.url, api_key="k")
    for name in ("model", "model_name"):
        with pytest.raises(TypeError, match="each call"):
            ecso.guarded(raw, **{name: "x"})
    with pytest.raises(ecso.SettingsError, match="scop"):
        ecso.guarded(raw, set={"scop": "all"})
    with pytest.raises(TypeError, match="Azure"):
        ecso.guarded(openai.AzureOpenAI(base_url=mock.url, api_key="k", api_version="1"))


def test_replies_that_are_none(mock: Mock, picture: bytes) -> None:
    asked = messages(picture, "What?")
    for change, says in [
        ({"choices": None}, "no choices"),
        ({"choices": [], "error": {"message": "too busy"}}, "too busy"),
        ({"choices": [None]}, "no message"),
        ({"choices": [{"index": 0}]}, "no message"),
        ({"choices": [{"index": 0, "message": {"role": "assistant", "content": "\ud800"}}]}, "not a text"),
    ]:
        mock.changes = change
        with pytest.raises(ecso.BadReply, match=says):
            client(mock).chat.completions.create(model="toy", messages=asked)
    mock.changes = {"id": None, "model": None, "created": 1.5, "usage": {"prompt_tokens": 1}}
    answer = client(mock).chat.completions.create(model="toy", messages=asked)
    assert answer.choices[0].message.content == "A list of things: What?" and answer.usage is None


def test_what_is_sent_is_plain(mock: Mock, picture: bytes) -> None:
    one = client(mock)

    class Sly(list[Any]):
        def __deepcopy__(self, _: object) -> Any:
            return self

        def __iter__(self) -> Any:
            return iter(messages(picture, "Something else.") if mock.asked else list.__iter__(self))

    rude = Sly(messages(picture, "Be rude."))
    assert one.chat.completions.create(model="toy", messages=rude).ecso[0]["verdict"] == "unsafe"
    mock.asked = []
    first = one.chat.completions.create(model="toy", messages=messages(picture, "What?")).choices[0].message
    again = one.chat.completions.create(model="toy", messages=[*messages(picture, "What?"), first, {"role": "user", "content": "And?"}])
    assert again.ecso[0]["verdict"] == "safe"
    mock.asked = []
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    odd = {"type": "image_url", "image_url": {"url": data_url(picture), "other": "x"}}
    for part, error in [(broken, ecso.ImageError), (odd, ecso.InputError)]:
        with pytest.raises(error):
            one.chat.completions.create(model="toy", messages=[{"role": "user", "content": [part]}])
    assert not mock.asked


def test_only_counts_of_the_usage_are_kept(mock: Mock, picture: bytes) -> None:
    mock.more_usage, mock.finish = {"note": "Rude words."}, "Rude words."
    answer = client(mock).chat.completions.create(model="toy", messages=messages(picture, "What?"))
    assert answer.usage.total_tokens == 12 and answer.choices[0].finish_reason == "stop"
    assert "Rude" not in answer.model_dump_json()
    mock.finish = "length"
    assert client(mock).chat.completions.create(model="toy", messages=messages(picture, "What?")).choices[0].finish_reason == "length"


def test_what_was_sent_is_judged(mock: Mock, picture: bytes) -> None:
    mock.wait = 0.3

    async def work() -> None:
        asked = messages(picture, "Be kind.")
        one = ecso.guarded(openai.AsyncOpenAI(base_url=mock.url, api_key="mine"), "paper")
        answer = asyncio.create_task(one.chat.completions.create(model="toy", messages=asked))
        while not mock.asked:
            await asyncio.sleep(0.01)
        asked[0]["content"][1]["text"] = "Something else."
        await answer

    asyncio.run(work())
    assert len(mock.asked) == 2 and "Something else." not in str(mock.asked)


def test_the_judge_has_the_key_of_the_client(mock: Mock, picture: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of the environment")
    raw = openai.OpenAI(base_url=mock.url, api_key="first")
    one = ecso.guarded(raw, "paper")
    one.chat.completions.create(model="toy", messages=messages(picture, "What?"))
    raw.api_key = "second"
    one.chat.completions.create(model="toy", messages=messages(picture, "What?"))
    assert mock.keys == {"Bearer first", "Bearer second"} and len(mock.asked) == 4
    with pytest.raises(ecso.InputError, match="no fixed key"):
        ecso.guarded(openai.OpenAI(base_url=mock.url, api_key=lambda: "made"), "paper").chat.completions.create(
            model="toy", messages=messages(picture, "What?")
        )
    assert len(mock.asked) == 4
