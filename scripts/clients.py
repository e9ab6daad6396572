"""Tests the OpenAI client for Python and LangChain, used as their users do; see scripts/clients."""
import base64
import sys

import openai
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

image = "data:image/png;base64," + base64.b64encode(open(sys.argv[1], "rb").read()).decode()
client = openai.OpenAI(max_retries=0)
model = client.models.list().data[0].id


def content(url=image):
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is on the list?"}]


def request(**more):
    return dict(model=model, messages=[{"role": "user", "content": content()}], max_tokens=12, **more)


raw = client.chat.completions.with_raw_response.create(**request(), extra_headers={"x-ecso-trace": "true"})
answer = raw.parse()
assert raw.headers["x-ecso-verdict"] in ("safe", "unsafe"), raw.headers
assert answer.choices[0].message.content and answer.usage.total_tokens > 0, answer
assert answer.ecso["choices"][0]["steps"], answer.ecso

chunks = list(client.chat.completions.create(**request(stream=True, stream_options={"include_usage": True})))
text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
assert text and chunks[-1].ecso["verdict"] in ("safe", "unsafe") and chunks[-1].usage.total_tokens > 0, chunks

assert len(client.chat.completions.create(**request(n=2)).choices) == 2

moderation = client.moderations.create(input=content()[::-1])
assert moderation.results[0].flagged in (True, False) and moderation.results[0].categories.harm == moderation.results[0].flagged, moderation
assert len(client.moderations.create(input=["Say hello.", "What is bread?"]).results) == 2

plain = dict(model=model, messages=[{"role": "user", "content": "Say hello."}], max_tokens=4)
assert client.chat.completions.create(**plain).choices[0].message.content
assert list(client.chat.completions.create(**plain, stream=True))

try:
    broken = [{"role": "user", "content": content("data:image/png;base64,AAAA")}]
    client.chat.completions.create(model=model, messages=broken)
    raise SystemExit("a broken image was accepted")
except openai.BadRequestError as error:
    assert error.code == "invalid_image", error

chat = ChatOpenAI(model=model, max_tokens=12)
message = HumanMessage(content=content())
assert chat.invoke([message]).content
assert "".join(chunk.text for chunk in chat.stream([message]))
print(f"openai {openai.__version__} and LangChain: model {model}, plain, streamed, n = 2, text alone, moderations, errors: all passed")
