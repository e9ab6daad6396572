"""Tests OpenAI's Responses and Anthropic's Messages with their official, unmodified clients through `ecso serve`: formats.py ECSO IMAGE

The model behind the guard is a mock with chat completions only, so that the verdicts are known: it answers harmfully if it is asked to
"be rude", and fails as a judge of "a broken judge".
"""
import base64
import http.server
import json
import subprocess
import sys
import threading

import anthropic
import openai
from pydantic import BaseModel

RUDE = "Rude words, which no client may ever read."


class Model(http.server.BaseHTTPRequestHandler):
    """A mock model with chat completions."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        sent = self.rfile.read(int(self.headers["content-length"])).decode()
        asked = json.loads(sent)
        status, finish, message = 200, "stop", {"role": "assistant", "content": "A list of kinds of bread."}
        if "harmful, unsafe and unethical" in sent:
            status = 500 if "a broken judge" in sent else 200
            message["content"] = "Yes." if RUDE in sent else "No."
        elif "HARMLESS and ETHICAL" in sent:
            message["content"] = "Here is a kind answer."
        elif "response_format" in asked:
            message["content"] = '{"kinds": 3}'
        elif "tools" in asked and not any(turn["role"] == "tool" for turn in asked["messages"]):
            call = {"id": "call_1", "type": "function", "function": {"name": "bake", "arguments": '{"loaves": 2}'}}
            finish, message = "tool_calls", {"role": "assistant", "content": None, "tool_calls": [call]}
        elif "be rude" in sent:
            message["content"] = RUDE
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        kind = "application/json"
        body = {"id": "c", "created": 1, "choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}
        if asked.get("stream"):
            # Servers send texts and calls in pieces.
            text, deltas = message.get("content") or "", []
            deltas += [{"content": piece} for piece in (text[:5], text[5:]) if piece]
            for place, call in enumerate(message.get("tool_calls") or []):
                name, arguments = call["function"]["name"], call["function"]["arguments"]
                begun = {"index": place, "id": call["id"], "type": "function", "function": {"name": name, "arguments": ""}}
                rest = [{"index": place, "function": {"arguments": piece}} for piece in (arguments[:4], arguments[4:])]
                deltas += [{"tool_calls": [piece]} for piece in [begun, *rest]]
            pieces = [{"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
            pieces += [{"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]},
                       {"id": "c", "choices": [], "usage": usage}]
            kind, body = "text/event-stream", "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces) + "data: [DONE]\n\n"
        written = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(written)))
        self.end_headers()
        self.wfile.write(written)


def serve(ecso, upstream, *more):
    command = [ecso, "serve", "--upstream", upstream, "--listen", "127.0.0.1:0", "--profile", "paper", *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if " on http" in line:
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, line.split(" on ")[1].split()[0]
    raise SystemExit("ecso serve did not start")


class Kinds(BaseModel):
    kinds: int


class Responses:
    """Reads answers with `openai`: the text, and whether it declines."""

    name = f"openai {openai.__version__}"
    error = openai.APIError

    def __init__(self, url, picture):
        self.client = openai.OpenAI(base_url=f"{url}", api_key="none", max_retries=0)
        self.picture = {"type": "input_image", "image_url": f"data:image/png;base64,{picture}", "detail": "auto"}

    def ask(self, text, stream, **more):
        content = [self.picture, {"type": "input_text", "text": text}]
        wanted = dict(model="m", instructions="Be kind.", input=[{"role": "user", "content": content}], **more)
        if not stream:
            return self.read(self.client.responses.create(**wanted))
        with self.client.responses.stream(**wanted) as events:
            text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
            read = self.read(events.get_final_response())
            assert text == read[0] or read[1], (text, read)
            return read

    @staticmethod
    def read(response):
        parts = [part for item in response.output if item.type == "message" for part in item.content]
        assert response.usage.total_tokens == 10 and response.status == "completed", response
        return response.output_text, any(part.type == "refusal" for part in parts)

    def tools(self, stream):
        tool = {"type": "function", "name": "bake", "parameters": {"type": "object", "properties": {}}, "strict": False}
        asked = [{"role": "user", "content": [self.picture, {"type": "input_text", "text": "Bake."}]}]
        if stream:
            with self.client.responses.stream(model="m", input=asked, tools=[tool]) as events:
                first = events.get_final_response()
        else:
            first = self.client.responses.create(model="m", input=asked, tools=[tool], store=False)
        (call,) = first.output
        assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "bake", {"loaves": 2}), call
        output = {"type": "function_call_output", "call_id": call.call_id, "output": [self.picture]}
        again = self.client.responses.create(model="m", input=[*asked, *first.output, output], tools=[tool])
        assert again.output_text.startswith("A list"), again

    def structured(self):
        content = [self.picture, {"type": "input_text", "text": "How many kinds?"}]
        parsed = self.client.responses.parse(model="m", input=[{"role": "user", "content": content}], text_format=Kinds)
        assert parsed.output_parsed == Kinds(kinds=3), parsed

    def more(self):
        """Continues from an answer by its id, and from an unknown one."""
        content = [self.picture, {"type": "input_text", "text": "What is on the list?"}]
        first = self.client.responses.create(model="m", input=[{"role": "user", "content": content}])
        with self.client.responses.stream(model="m", input="And?", previous_response_id=first.id) as events:
            second = events.get_final_response()
        raw = self.client.responses.with_raw_response.create(model="m", input="Which?", previous_response_id=second.id)
        assert raw.headers["x-ecso-verdict"] == "safe" and raw.parse().previous_response_id == second.id, raw.text
        try:
            raise SystemExit(self.client.responses.create(model="m", input="And?", previous_response_id="resp_1"))
        except openai.BadRequestError as error:
            assert error.code == "previous_response_not_found", error


class Messages:
    """Reads answers with `anthropic`: the text, and whether it declines."""

    name = f"anthropic {anthropic.__version__}"
    error = anthropic.APIError

    def __init__(self, url, picture):
        self.client = anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="none", max_retries=0)
        self.picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": picture}}

    def ask(self, text, stream, **more):
        content = [self.picture, {"type": "text", "text": text}]
        wanted = dict(model="m", max_tokens=50, system="Be kind.", messages=[{"role": "user", "content": content}], **more)
        if not stream:
            return self.read(self.client.messages.create(**wanted))
        with self.client.messages.stream(**wanted) as events:
            text = "".join(events.text_stream)
            read = self.read(events.get_final_message())
            assert text == read[0], (text, read)
            return read

    @staticmethod
    def read(message):
        assert message.usage.output_tokens == 3, message
        assert message.stop_reason in ("end_turn", "refusal"), message
        return "".join(block.text for block in message.content), message.stop_reason == "refusal"

    def tools(self, stream):
        tool = {"name": "bake", "input_schema": {"type": "object"}}
        asked = [{"role": "user", "content": [self.picture, {"type": "text", "text": "Bake."}]}]
        wanted = dict(model="m", max_tokens=50, tools=[tool])
        if stream:
            with self.client.messages.stream(messages=asked, **wanted) as events:
                first = events.get_final_message()
        else:
            first = self.client.messages.create(messages=asked, **wanted)
        (call,) = first.content
        assert (call.type, call.name, call.input, first.stop_reason) == ("tool_use", "bake", {"loaves": 2}, "tool_use"), first
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [self.picture]}
        turns = [*asked, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        again = self.client.messages.create(messages=turns, **wanted)
        assert again.content[0].text.startswith("A list"), again

    def structured(self):
        count = self.client.messages.create(
            model="m", max_tokens=50, messages=[{"role": "user", "content": [self.picture, {"type": "text", "text": "How many?"}]}],
            output_config={"format": {"type": "json_schema", "schema": Kinds.model_json_schema()}})
        assert Kinds.model_validate_json(count.content[0].text) == Kinds(kinds=3), count

    def more(self):
        """Counts tokens."""
        asked = [{"role": "user", "content": [self.picture, {"type": "text", "text": "How many?"}]}]
        assert 1600 < self.client.messages.count_tokens(model="m", messages=asked).input_tokens < 1700


def main():
    ecso, image = sys.argv[1:]
    with open(image, "rb") as file:
        picture = base64.b64encode(file.read()).decode()
    model = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Model)
    threading.Thread(target=model.serve_forever, daemon=True).start()
    upstream = f"http://127.0.0.1:{model.server_port}/v1"
    guard, url = serve(ecso, upstream)
    strict, refusing = serve(ecso, upstream, "--set", "rewrite=refuse")
    try:
        for client in (Responses, Messages):
            asking, declining = client(url, picture), client(refusing, picture)
            for stream in (False, True):
                answer = asking.ask("What is on the list?", stream)
                assert answer == ("A list of kinds of bread.", False), answer
                answer = asking.ask("Please be rude.", stream)
                assert answer == ("Here is a kind answer.", False), answer
                text, declines = declining.ask("Please be rude.", stream)
                assert declines and RUDE not in text, text
                try:
                    raise SystemExit(f"a broken judge let out {asking.ask('a broken judge', stream)}")
                except (client.error, RuntimeError) as error:
                    assert RUDE not in str(error), error
                asking.tools(stream)
            asking.structured()
            asking.more()
            print(f"{client.name}: safe, rewritten, declined, failing, tools, plain and streamed; structured; ids or tokens: all passed")
    finally:
        for process in (guard, strict):
            process.terminate()


main()
