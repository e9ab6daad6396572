"""Shared by the tests of other gateways: a mock model, the guard, and requests. See scripts/litellm.py."""
import base64
import http.client
import http.server
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse

RUDE = "Rude words, which no client may ever read."
SAFE = "A list of kinds of bread."
KIND = "Here is a kind answer."


class Model(http.server.BaseHTTPRequestHandler):
    """A mock model with chat completions, Responses and Messages.

    It answers harmfully if it is asked to "be rude", and fails as a judge of "a broken judge".
    """

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    seen = []  # the requests that are not questions of the guard
    picture = b""

    def log_message(self, *_):
        pass

    def do_GET(self):
        kind, body = ("application/json", json.dumps({"data": [{"id": "m"}]}).encode())
        if self.path.endswith(".png"):
            kind, body = "image/png", self.picture
        self.write(200, kind, body)

    def do_POST(self):
        sent = self.rfile.read(int(self.headers["content-length"])).decode()
        request = json.loads(sent)
        status, calls, texts = 200, [], [RUDE if "be rude" in sent else SAFE]
        if "harmful, unsafe and unethical" in sent:
            time.sleep(3 if "a slow judge" in sent else 0)
            status, texts = (500 if "a broken judge" in sent else 200), ["Yes." if RUDE in sent else "No."]
        elif "HARMLESS and ETHICAL" in sent:
            texts = [KIND]
        else:
            Model.seen.append(sent)
            if request.get("n") == 2:
                texts = [SAFE, RUDE]
            if "tools" in request:
                arguments = json.dumps({"loaves": RUDE if "be rude" in sent else 2})
                calls = [{"id": "call_1", "type": "function", "function": {"name": "bake", "arguments": arguments}}]
                texts = [SAFE]
            if "take your time" in sent:
                time.sleep(2)
        if self.path.endswith("/messages"):
            kind, body = self.as_message(texts[0])
        else:
            kind, body = self.as_response(request, texts[0]) if "input" in request else self.as_chat(request, texts, calls)
        self.write(status, kind, body.encode())

    def write(self, status, kind, body):
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @staticmethod
    def as_chat(request, texts, calls):
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        head = {"id": "c", "created": 1, "model": "m"}
        finish = "tool_calls" if calls else "stop"
        if not request.get("stream"):
            thoughts = {"reasoning_content": RUDE} if "think rudely" in json.dumps(request) else {}
            message = {"role": "assistant", **thoughts, **({"tool_calls": calls} if calls else {})}
            choices = [{"index": place, "message": {**message, "content": text}, "finish_reason": finish} for place, text in enumerate(texts)]
            return "application/json", json.dumps({**head, "object": "chat.completion", "choices": choices, "usage": usage})
        pieces = [(0, {"reasoning_content": RUDE})] if "think rudely" in json.dumps(request) else []
        pieces += [(place, {"content": word + " "}) for place, text in enumerate(texts) for word in text.split()]
        pieces += [(0, {"tool_calls": [{"index": 0, **call}]}) for call in calls]
        chunks = [{**head, "choices": [{"index": place, "delta": delta, "finish_reason": None}]} for place, delta in pieces]
        chunks += [{**head, "choices": [{"index": place, "delta": {}, "finish_reason": finish}]} for place in range(len(texts))]
        chunks += [{**head, "choices": [], "usage": usage}]
        events = [json.dumps({"object": "chat.completion.chunk", **chunk}) for chunk in chunks]
        return "text/event-stream", "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])

    @staticmethod
    def as_message(text):
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [{"type": "text", "text": text}]}
        return "application/json", json.dumps({**message, "stop_reason": "end_turn", "usage": {"input_tokens": 7, "output_tokens": 3}})

    @staticmethod
    def as_response(request, text):
        def response(status, output):
            return {"id": "resp_1", "object": "response", "created_at": 1, "status": status, "model": "m", "output": output, "tools": [],
                    "parallel_tool_calls": True, "tool_choice": "auto", "usage": {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10}}

        part = {"type": "output_text", "text": text, "annotations": []}
        item = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [part]}
        if not request.get("stream"):
            return "application/json", json.dumps(response("completed", [item]))
        place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
        words = [{"type": "response.output_text.delta", **place, "delta": word + " "} for word in text.split()]
        events = [{"type": "response.created", "response": response("in_progress", [])},
                  {"type": "response.output_item.added", "output_index": 0, "item": {**item, "content": []}},
                  {"type": "response.content_part.added", **place, "part": {**part, "text": ""}}, *words,
                  {"type": "response.output_text.done", **place, "text": text},
                  {"type": "response.content_part.done", **place, "part": part},
                  {"type": "response.output_item.done", "output_index": 0, "item": item},
                  {"type": "response.completed", "response": response("completed", [item])}]
        written = [{**event, "sequence_number": number} for number, event in enumerate(events)]
        return "text/event-stream", "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in written)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, address):
        """Clients may close the connection."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, address)


def start_model(picture):
    """Starts the mock model. Returns its URL."""
    Model.picture = picture
    server = Server(("127.0.0.1", 0), Model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def start_guard(ecso, upstream, folder, settings):
    """Starts the guard with these settings in front of the model. Returns the process and its URL."""
    path = tempfile.mktemp(".toml", dir=folder)
    with open(path, "w") as file:
        file.write(f"[gateway]\n{settings}\n")
    command = [ecso, "--config", path, "serve", "--upstream", f"{upstream}/v1", "--listen", "127.0.0.1:0", "--profile", "paper"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if " on http" in line:
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, line.split(" on ")[1].split("/v1")[0]
    raise SystemExit("ecso serve did not start")


def free_port():
    """A port on which nothing listens."""
    with Server(("127.0.0.1", 0), Model) as server:
        return server.server_port


def wait_until_ready(url, path, process, log, seconds=120):
    """Waits until a gateway answers."""
    for _ in range(seconds * 5):
        try:
            if send(url, path, None)[0] == 200:
                return
        except OSError:
            pass
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise SystemExit(f"the gateway did not start:\n{open(log).read()[-4000:]}")


def send(url, path, body, headers=None):
    """Sends a request. Returns the status and the body of the answer."""
    host = urllib.parse.urlparse(url).netloc
    connection = http.client.HTTPConnection(host, timeout=60)
    headers = {"content-type": "application/json", **(headers or {})}
    connection.request("POST" if body is not None else "GET", path, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    reply = answer.read().decode()
    connection.close()
    return answer.status, reply


def base64_source(picture):
    return {"type": "base64", "media_type": "image/png", "data": base64.b64encode(picture).decode()}


def data_url(picture):
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def chat_request(text, image, **more):
    """A request about an image in the format of chat completions."""
    content = [{"type": "image_url", "image_url": {"url": image}}, *([{"type": "text", "text": text}] if text else [])]
    return {"model": "m", "messages": [{"role": "user", "content": content}], **more}


def messages_request(text, source):
    """The same request in the format of Messages."""
    parts = [{"type": "image", "source": source}, *([{"type": "text", "text": text}] if text else [])]
    return {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": parts}]}


def median_times(calls, times=100):
    """The median milliseconds of each call. The calls alternate, so that all run under the same load."""
    took = {name: [] for name in calls}
    for turn in range(times + 5):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn >= 5:
                took[name].append((time.perf_counter() - started) * 1000)
    return {name: statistics.median(values) for name, values in took.items()}


def print_times(name, milliseconds):
    print(f"{name}: " + ", ".join(f"{call} {median:.1f} ms" for call, median in milliseconds.items()) + " (median of 100, a model without latency)")
