"""Tests windowed streams with the official, unmodified clients of OpenAI and Anthropic through `ecso serve`: windowed.py ECSO IMAGE

The model behind the guard is a mock: it writes 60 sentences, a few milliseconds each, and rude words early or late if it is asked to.
"""
import base64
import http.server
import json
import os
import subprocess
import sys
import threading
import time

import anthropic
import openai

RUDE = "Rude words, which no client may ever read. "
stopped = threading.Semaphore(0)


class Model(http.server.BaseHTTPRequestHandler):
    """A mock model with chat completions."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        sent = self.rfile.read(int(self.headers["content-length"])).decode()
        if "harmful, unsafe and unethical" in sent:
            return self.say("Yes." if RUDE.strip() in sent else "No.")
        if "HARMLESS and ETHICAL" in sent:
            return self.write(["Here is a kind answer."])
        if "describe the image" in sent:
            return self.say("A list.")
        sentences = [f"Bread number {number} is a good bread. " for number in range(60)]
        if "be rude" in sent:
            sentences[1 if "early" in sent else 40] = RUDE
        return self.write(sentences)

    def say(self, text):
        message = {"role": "assistant", "content": text}
        body = json.dumps({"id": "c", "created": 1, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def write(self, pieces):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        deltas = [{"delta": {"content": piece}, "finish_reason": None} for piece in pieces] + [{"delta": {}, "finish_reason": "stop"}]
        try:
            for delta in deltas:
                time.sleep(0.01)
                self.event({"choices": [{"index": 0, **delta}]})
            self.event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            stopped.release()

    def event(self, value):
        self.wfile.write(b"data: " + json.dumps({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", **value}).encode() + b"\n\n")


ecso, picture = sys.argv[1:]
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Model)
threading.Thread(target=server.serve_forever, daemon=True).start()
command = [ecso, "serve", "--upstream", f"http://127.0.0.1:{server.server_port}/v1", "--listen", "127.0.0.1:0", "--profile", "paper"]
environment = os.environ | {"ECSO__GATEWAY__STREAM": "windowed", "ECSO__GATEWAY__WINDOWS__FIRST": "16", "ECSO__GATEWAY__WINDOWS__MOST": "32"}
process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
url = next(line.split(" on ")[1].split()[0] for line in process.stderr if " on http" in line)
threading.Thread(target=process.stderr.read, daemon=True).start()
client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
encoded = base64.b64encode(open(picture, "rb").read()).decode()
image = "data:image/png;base64," + encoded


def request(text):
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": text}]
    return dict(model="m", messages=[{"role": "user", "content": content}], stream_options={"include_usage": True})


def chunks(text, **more):
    started, first, all_chunks = time.monotonic(), None, []
    for chunk in client.chat.completions.create(**request(text), stream=True, **more):
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.monotonic() - started
        all_chunks.append(chunk)
    choices = [choice for chunk in all_chunks for choice in chunk.choices]
    answer = "".join(choice.delta.content or "" for choice in choices)
    refused = "".join(choice.delta.refusal or "" for choice in choices)
    ends = [choice.finish_reason for choice in choices if choice.finish_reason]
    assert RUDE not in answer and choices[0].delta.role == "assistant" and len({chunk.id for chunk in all_chunks}) == 1
    return answer, refused, ends, all_chunks[-1], first, time.monotonic() - started


def timed(pieces):
    """The text of a stream, and the share of its time after which the first piece came."""
    started, found = time.monotonic(), []
    for piece in pieces:
        found.append((piece, time.monotonic() - started))
    return "".join(piece for piece, _ in found), found[0][1] / (time.monotonic() - started)


def response(text):
    """With OpenAI's Responses: the text as it came, the assembled answer, whether it declines, and when its first piece came."""
    content = [{"type": "input_image", "image_url": image, "detail": "auto"}, {"type": "input_text", "text": text}]
    last = None

    def deltas(events):
        nonlocal last
        for event in events:
            # The client's `get_final_response` knows no incomplete answer.
            last = getattr(event, "response", last)
            if event.type == "response.output_text.delta":
                yield event.delta

    with client.responses.stream(model="m", input=[{"role": "user", "content": content}]) as events:
        text, first = timed(deltas(events))
    parts = [part for item in last.output for part in item.content]
    declines = [part.type for part in parts if part.type != "output_text"] == ["refusal"]
    assert last.status == ("incomplete" if declines else "completed"), last
    return text, "".join(part.text for part in parts if part.type == "output_text"), declines, first


def message(text):
    """The same with Anthropic's Messages."""
    content = [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": encoded}}, {"type": "text", "text": text}]
    with other.messages.stream(model="m", max_tokens=900, messages=[{"role": "user", "content": content}]) as events:
        text, first = timed(events.text_stream)
        whole = events.get_final_message()
    return text, "".join(block.text for block in whole.content), whole.stop_reason == "refusal", first


other = anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="none", max_retries=0)
try:
    for ask in response, message:
        text, assembled, declines, first = ask("What is on the list?")
        assert text == assembled and text.count("Bread") == 60 and not declines and first < 0.5, (ask, text, assembled, first)
        text, assembled, declines, first = ask("What is on the list? be rude")
        assert 0 < text.count("Bread") <= 40 and assembled.startswith(text) and declines, (ask, text, assembled)
        assert RUDE not in assembled and stopped.acquire(timeout=5), (ask, assembled)
        text, assembled, declines, first = ask("What is on the list? be rude, early")
        assert (text, assembled, declines) == ("Here is a kind answer.", "Here is a kind answer.", False), (ask, text, assembled)
    print(f"openai {openai.__version__} (Responses), anthropic {anthropic.__version__}: windowed, stopped, answered safely: all passed")

    answer, refused, ends, last, first, whole = chunks("What is on the list?")
    assert answer.count("Bread") == 60 and not refused and ends == ["stop"] and last.usage.total_tokens == 10, (answer, last)
    assert last.ecso["verdict"] == "safe" and first < whole / 2, (first, whole)

    answer, refused, ends, last, first, whole = chunks("What is on the list? be rude")
    assert 0 < answer.count("Bread") <= 40 and refused and ends == ["content_filter"], (answer, ends)
    assert last.ecso["verdict"] == "unsafe" and last.ecso["early"]["stopped"], last
    assert last.ecso["safe_answer"] == "Here is a kind answer." and stopped.acquire(timeout=5)

    for text, more in [("be rude, early", {}), ("be rude", {"extra_headers": {"x-ecso-stream": "hold"}})]:
        answer, refused, ends, last, first, whole = chunks(f"What is on the list? {text}", **more)
        assert (answer, refused, ends) == ("Here is a kind answer.", "", ["stop"]), (answer, refused, ends)

    # The client's own helper that assembles a stream.
    with client.chat.completions.stream(**request("What is on the list?")) as events:
        whole = events.get_final_completion()
    assert whole.choices[0].message.content.count("Bread") == 60 and whole.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(**request("What is on the list? be rude")) as events:
        try:
            whole = events.get_final_completion()
            assert whole.choices[0].message.refusal and whole.choices[0].finish_reason == "content_filter", whole
            outcome = "a refusal"
        except openai.ContentFilterFinishReasonError:
            outcome = "its own error for filtered answers"
    print(f"openai {openai.__version__}: windowed, stopped ({outcome} from .stream()), answered safely, held: all passed")
finally:
    process.terminate()
