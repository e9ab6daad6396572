"""Tests the guard as an external processor of Envoy, with a mock model: envoy.py ECSO ENVOY FOLDER. See scripts/envoy.

The model answers harmfully if it is asked to "be rude", and fails as a judge of "a broken judge". Other words in a request control
its behaviour: see `Model.do_POST`.
"""
import base64
import concurrent.futures
import gzip
import http.client
import http.server
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time

RUDE = "Rude words, which no client may ever read."
SECRET = "what the server says in its own words"
ECSO, ENVOY, FOLDER = sys.argv[1:4]
CHAT = "/v1/chat/completions"
PIXEL = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")


class Model(http.server.BaseHTTPRequestHandler):
    """A mock model with chat completions, and two other routes."""

    protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", -1, True
    taken, lock = [], threading.Lock()

    def log_message(self, *_):
        pass

    def respond(self, status, body, kind="application/json", **headers):
        body = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def chunk(self, text):
        data = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def do_GET(self):
        if self.path == "/v1/models":
            return self.respond(200, {"object": "list", "data": [{"id": "m", "object": "model"}]}, x_own="kept")
        self.respond(200, SECRET)

    def do_POST(self):
        if self.headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
        sent = body.decode()
        asked = json.loads(sent)
        is_judge = "harmful, unsafe and unethical" in sent
        with self.lock:
            self.taken.append((self.path, dict(self.headers), asked, is_judge))
        text = "A list of kinds of bread."
        if is_judge:
            if "a broken judge" in sent:
                return self.respond(500, {"error": {"message": SECRET}})
            time.sleep(2 if "a slow judge" in sent else 0)
            text = "Yes." if RUDE in sent else "No."
        elif "HARMLESS and ETHICAL" in sent:
            text = "Here is a kind answer."
        elif "describe the image" in sent:
            text = "A loaf."
        else:
            if "be rude" in sent:
                text = RUDE
            if "too often" in sent:
                return self.respond(429, {"error": {"message": SECRET, "code": "rate_limit_exceeded"}}, retry_after="7",
                                 x_own=SECRET)
            if "fail with nothing" in sent:
                return self.respond(500, "")
            if "say nothing" in sent:
                time.sleep(30)
            if "break off" in sent:
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", "1000")
                self.end_headers()
                self.wfile.write(RUDE.encode())
                self.wfile.flush()
                self.close_connection = True
                return None
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        message = {"role": "assistant", "content": text}
        if asked.get("stream"):
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for nth, piece in enumerate(re.findall(".{1,9}", text)):
                delta = {"id": "c", "created": 1, "choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
                self.chunk(f"data: {json.dumps(delta)}\n\n")
                time.sleep(0.3 if "slowly" in sent else 0)
                if "never end" in sent and nth > 1:
                    time.sleep(30)
            end = {"id": "c", "created": 1, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": usage}
            self.chunk(f"data: {json.dumps(end)}\n\ndata: [DONE]\n\n")
            return self.wfile.write(b"0\r\n\r\n")
        body = {"id": "c", "created": 1, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}
        if "packed" in sent:
            return self.respond(200, gzip.compress(json.dumps(body).encode()), content_encoding="gzip")
        self.respond(200, body, x_own=RUDE if "image_url" in sent else "kept")


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def wait_for(port):
    for _ in range(200):
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"nothing listens on {port}")


class Guarded:
    """Envoy and the guard with the settings in deploy/envoy and some changes."""

    def __init__(self, model, *arguments, upstream=None, changes=(), environment=()):
        self.environment = dict(environment)
        self.port, self.door, self.own = free_port(), free_port(), free_port()
        text = open("deploy/envoy/envoy.yaml", encoding="utf8").read()
        changes = [("port_value: 10000", f"port_value: {self.port}"), ("port_value: 8000", f"port_value: {model}"),
                   ("port_value: 9090", f"port_value: {self.door}"), ("0.0.0.0", "127.0.0.1"), *changes]
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        config = os.path.join(FOLDER, f"{self.port}.yaml")
        with open(config, "w", encoding="utf8") as file:
            file.write(text)
        self.command = [ECSO, "serve", "--upstream", (upstream or f"http://127.0.0.1:{model}/v1"), "--profile", "paper",
                        "--listen", f"127.0.0.1:{self.own}", "--ext-proc", f"127.0.0.1:{self.door}", *arguments]
        if upstream == "itself":
            self.command[3] = f"http://127.0.0.1:{self.port}/v1"
        self.start_guard()
        self.envoy = subprocess.Popen([ENVOY, "-c", config, "--use-dynamic-base-id", "--log-level", os.environ.get("ENVOY_LOG", "error"), "--concurrency", "2"],
                                      stderr=open(os.path.join(FOLDER, f"{self.port}.log"), "w", encoding="utf8"))
        wait_for(self.port)
        self.wait_until_ready()

    def start_guard(self):
        environment = {**os.environ, "ECSO__GATEWAY__METRICS": "true", "ECSO__GATEWAY__LIMITS__DEADLINE": "5",
                       "ECSO__GATEWAY__KEEP_ALIVE": "1", "ECSO__SERVER__RETRIES": "0", **self.environment}
        self.log = open(os.path.join(FOLDER, f"{self.port}.ecso"), "a", encoding="utf8")
        self.ecso = subprocess.Popen(self.command, stderr=self.log, env=environment)
        wait_for(self.door)

    def wait_until_ready(self):
        """Waits until Envoy has found the guard."""
        for _ in range(100):
            if self.ask("GET", "/v1/models")[0] != 503:
                return
            time.sleep(0.05)

    def open(self, method, path, body=None, headers=()):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=40)
        headers = {"content-type": "application/json", **dict(headers)}
        body = body if isinstance(body, (bytes, str, type(None))) else json.dumps(body)
        try:
            connection.request(method, path, body, headers)
        except OSError:
            pass  # answered before it was sent
        return connection, connection.getresponse()

    def ask(self, method, path, body=None, headers=()):
        """Sends a request. Returns status, headers and body of the answer."""
        connection, response = self.open(method, path, body, headers)
        try:
            read = response.read()
        except http.client.IncompleteRead as broken:
            read = broken.partial + b" BROKEN"
        connection.close()
        assert RUDE.encode() not in read and RUDE not in str(response.headers), (path, read)
        return response.status, {name.lower(): value for name, value in response.headers.items()}, read.decode()

    def chat(self, query, image=PIXEL, headers=(), **more):
        return self.ask("POST", CHAT, chat(query, image, **more), headers)

    def metric(self, name):
        connection = http.client.HTTPConnection("127.0.0.1", self.own)
        connection.request("GET", "/metrics")
        read = connection.getresponse().read().decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in read.splitlines() if line.startswith(name))

    def stop(self):
        self.ecso.terminate()
        assert self.ecso.wait(20) == 0, "the guard did not stop cleanly"
        self.envoy.terminate()
        self.envoy.wait()
        self.log.close()


def chat(query, image=PIXEL, **more):
    image = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}] if image else []
    return {"model": "m", "messages": [{"role": "user", "content": [*image, {"type": "text", "text": query}]}], **more}


def large(size):
    """A picture that is padded to this many bytes."""
    picture = base64.b64decode(PIXEL)
    end, noise = picture[-12:], random.Random(1).randbytes(size)
    return base64.b64encode(picture[:-12] + len(noise).to_bytes(4, "big") + b"raNd" + noise + b"\0\0\0\0" + end).decode()


def events(body):
    return [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]


def streamed(body):
    return "".join(choice["delta"].get("content") or "" for event in events(body) for choice in event.get("choices", []))


def last(is_judge=False):
    """The last request that reached the model: path, headers in lower case, body."""
    path, headers, body, _ = [taken for taken in Model.taken if taken[3] == is_judge][-1]
    return path, {name.lower(): value for name, value in headers.items()}, body


def at_once(function, cases):
    """Calls the function for all cases at once. Returns the results in order."""
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        return list(pool.map(function, cases))


CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


@check
def whole_answers(guarded):
    """a safe answer to 3 MB, and a rewritten one"""
    picture = large(3 << 20)
    sent = {"x-inject": "1", "x-envoy-original-path": "/v1/rye", "accept-encoding": "gzip"}
    status, headers, body = guarded.chat("Which kinds?", picture, sent.items())
    assert (status, headers["x-ecso-verdict"]) == (200, "safe"), (status, headers, body)
    assert json.loads(body)["choices"][0]["message"]["content"] == "A list of kinds of bread.", body
    assert "x-own" not in headers and headers["content-type"] == "application/json", headers
    path, sent, asked = last()
    assert path == CHAT and asked["messages"][0]["content"][0]["image_url"]["url"].endswith(picture)
    assert not {"x-inject", "x-envoy-original-path"} & set(sent) and sent["accept-encoding"] == "identity", sent
    assert not any(name.startswith("x-ecso") for name in sent), sent
    assert last(True)[1].get("x-ecso-own-call") == "true"
    status, headers, body = guarded.chat("Please be rude.", picture)
    assert (status, headers["x-ecso-verdict"]) == (200, "unsafe"), (status, headers, body)
    assert json.loads(body)["choices"][0]["message"]["content"] == "Here is a kind answer.", body


@check
def streams(guarded):
    """streams: signs of life at once, no word before the verdict"""
    for query, told in [("a slow judge", "A list of kinds of bread."), ("be rude to a slow judge", "Here is a kind answer.")]:
        started = time.monotonic()
        connection, response = guarded.open("POST", CHAT, chat(query, stream=True))
        first, at = response.readline(), time.monotonic() - started
        body = response.read()
        assert at < 1 and time.monotonic() - started > 2, at
        assert RUDE.encode() not in body and b"[DONE]" in body, body
        assert body.count(b"the answer is being checked") >= 1, body
        assert streamed(body.decode()) == told, body
        connection.close()


@check
def formats(guarded):
    """Responses and Messages"""
    url = f"data:image/png;base64,{PIXEL}"
    source = {"type": "base64", "media_type": "image/png", "data": PIXEL}
    for query, told in [("Which kinds?", "A list of kinds of bread."), ("be rude", "Here is a kind answer.")]:
        for stream in (False, True):
            content = [{"type": "input_image", "image_url": url, "detail": "auto"}, {"type": "input_text", "text": query}]
            asked = {"model": "m", "input": [{"role": "user", "content": content}], "stream": stream}
            status, _, body = guarded.ask("POST", "/v1/responses", asked)
            assert status == 200 and told in body, body
            assert last()[0] == CHAT, last()
            content = [{"type": "image", "source": source}, {"type": "text", "text": query}]
            asked = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": content}], "stream": stream}
            status, _, body = guarded.ask("POST", "/v1/messages?beta=true", asked, {"x-api-key": "k"}.items())
            assert status == 200 and told in body.replace('"}}\n\nevent: content_block_delta', ""), body
            assert last()[0] == CHAT and last()[1]["authorization"] == "Bearer k" and "x-api-key" not in last()[1], last()


@check
def requests(guarded):
    """requests that go no further: unreadable, empty, too large, unknown"""
    before = len(Model.taken)
    for method, path, body, told in [
        ("POST", CHAT, chat("x", unknown_field=1), (400, "unknown_field")),
        ("POST", CHAT, "{", (400, "invalid_request")),
        ("POST", CHAT, None, (400, "invalid_request")),
        ("POST", CHAT, chat("x", large(26 << 20)), (413, "body_too_large")),
        ("POST", "/v1/completions", {"prompt": "x"}, (404, "route_not_guarded")),
        ("POST", "/v1/chat/completions/", {"prompt": "x"}, (404, "route_not_guarded")),
        ("GET", "/v1/files/x", None, (404, "route_not_guarded")),
    ]:
        status, headers, body = guarded.ask(method, path, body)
        assert (status, json.loads(body)["error"]["code"]) == told, (path, status, body)
        assert headers["content-type"] == "application/json" and headers["x-ecso-request-id"], headers
    assert len(Model.taken) == before


@check
def upstream_errors(guarded):
    """errors of the model's server, in our words; packed answers"""
    for stream in (False, True):
        status, headers, body = guarded.chat("too often", stream=stream)
        assert status == 429 and headers["retry-after"] == "7" and "x-own" not in headers, (status, headers)
        assert SECRET not in body and json.loads(body)["error"]["code"] == "rate_limit_exceeded", body
        status, _, body = guarded.chat("fail with nothing", stream=stream)
        assert status == 500 and json.loads(body)["error"]["code"] == "upstream_refused", (status, body)
    status, _, body = guarded.chat("break off")
    assert status in (502, 503), (status, body)
    status, headers, body = guarded.chat("packed")
    assert status == 200 and "content-encoding" not in headers and "kinds of bread" in body, (status, headers, body)
    status, headers, body = guarded.chat("packed and be rude")
    assert status == 200 and "kind answer" in body, body


@check
def failures(guarded):
    """failures of the guard: closed"""
    status, _, body = guarded.chat("a broken judge")
    assert status == 502 and json.loads(body)["error"]["type"] == "ecso_guard_error" and SECRET not in body, (status, body)
    status, _, body = guarded.chat("a broken judge", stream=True)
    assert status == 200 and "event: error" in body and "bread" not in body, (status, body)
    started, late = time.monotonic(), [("say nothing", False), ("say nothing", True), ("never end", True)]
    for (query, _), (status, _, body) in zip(late, at_once(lambda case: guarded.chat(case[0], stream=case[1]), late)):
        assert "guard_deadline" in body and "bread" not in body, (status, body)
        assert status == (504 if query == "say nothing" else 200), (query, status, body)
    assert 4 < time.monotonic() - started < 8


@check
def passed_through(guarded):
    """what is not guarded: both ways, not held"""
    status, headers, body = guarded.ask("GET", "/v1/models")
    assert status == 200 and json.loads(body)["data"][0]["id"] == "m" and headers["x-own"] == "kept", (status, headers, body)
    status, headers, body = guarded.ask("OPTIONS", CHAT)
    assert status == 501, (status, body)
    connection, response = guarded.open("POST", CHAT, chat("slowly", None, stream=True))
    times = []
    while line := response.readline():
        times.append(time.monotonic())
        assert RUDE.encode() not in line
    assert times[-1] - times[0] > 0.6, "it was held"
    connection.close()
    status, headers, body = guarded.chat("Which kinds?", None)
    assert status == 200 and headers["x-own"] == "kept" and "x-ecso-verdict" not in headers, headers


@check
def left_alone(guarded):
    """a client that leaves, and many at once"""
    for query in ("a slow judge", "say nothing"):
        for stream in (False, True):
            client = socket.create_connection(("127.0.0.1", guarded.port))
            body = json.dumps(chat(query, stream=stream))
            client.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
            time.sleep(0.2)
            client.close()
    for _ in range(40):
        if guarded.metric("ecso_running") == 0:
            break
        time.sleep(0.1)
    assert guarded.metric("ecso_running") == 0
    picture = large(1 << 20)
    found = at_once(lambda nth: guarded.chat("be rude" if nth % 2 else "Which kinds?", picture, stream=nth % 4 > 1), range(12))
    for nth, (status, _, body) in enumerate(found):
        if status == 503:  # no room for so many bodies: refused, in our words
            assert "guard_full" in body, body
            continue
        assert status == 200 and "error" not in body, (nth, status, body)
        told = streamed(body) if nth % 4 > 1 else json.loads(body)["choices"][0]["message"]["content"]
        assert status == 200 and told == ("Here is a kind answer." if nth % 2 else "A list of kinds of bread."), (nth, status, body)
    print("    refused for want of room:", sum(status == 503 for status, _, _ in found), "of 12")
    assert guarded.metric('ecso_requests_total{door="ext_proc",route="chat"') > 0


@check
def killed(guarded):
    """the guard killed in the middle, and Envoy without it"""
    for stream in (False, True):
        found = []
        thread = threading.Thread(target=lambda: found.append(guarded.chat("be rude to a slow judge", stream=stream)))
        thread.start()
        time.sleep(0.7)
        guarded.ecso.send_signal(signal.SIGKILL)
        guarded.ecso.wait()
        thread.join()
        status, _, body = found[0]
        print(f"    killed: status {status}, {body!r}")
        assert (status == 503 and not stream) or (status == 200 and stream and body.endswith("BROKEN")), found
        assert guarded.chat("Which kinds?")[0] == 503
        guarded.start_guard()
        guarded.wait_until_ready()
    assert guarded.chat("Which kinds?")[0] == 200


MODES = "FULL_DUPLEX_STREAMED"


def other_settings(port, run):
    """Guards and gateways that are set up in another way, each for itself."""

    def observed(guarded):
        """observe: nothing is held, the answer is judged beside it"""
        connection, response = guarded.open("POST", CHAT, chat("slowly", stream=True))
        times = []
        while response.readline():
            times.append(time.monotonic())
        assert times[-1] - times[0] > 0.6, "it was held"
        connection.close()
        for _ in range(50):
            if guarded.metric('ecso_answers_total{verdict="safe",mode="observe"') == 1:
                return
            time.sleep(0.1)
        raise AssertionError("it was not judged")

    def opened(guarded):
        """fail-open: what the guard can't judge goes out where the operator wants that"""
        for stream in (False, True):
            status, _, body = guarded.chat("a broken judge", stream=stream)
            assert status == 200 and "bread" in (streamed(body) if stream else body), (status, body)

    def loop(guarded):
        """calls of the guard that come back through Envoy are refused"""
        before = len(Model.taken)
        status, _, body = guarded.chat("Which kinds?")
        assert status == 502 and json.loads(body)["error"]["code"] == "guard_failed", (status, body)
        assert len(Model.taken) == before + 1, "a loop"
        assert "the guard's own calls come back to the guard" in open(guarded.log.name, encoding="utf8").read()

    def misled(guarded):
        """a processing_mode that guards nothing is refused"""
        status, _, body = guarded.chat("be rude")
        assert status == 500 and "FULL_DUPLEX_STREAMED" in body, (status, body)

    def model_is_late(guarded):
        """the route's timeout is the model's: judging does not count"""
        for stream in (False, True):
            status, _, body = guarded.chat("a slow judge", stream=stream)
            assert status == 200 and "bread" in (streamed(body) if stream else body), (status, body)
            status, _, body = guarded.chat("say nothing", stream=stream)
            assert status == 504 and json.loads(body)["error"]["code"] == "upstream_refused", (status, body)

    def guard_is_late(guarded):
        """the timeout of grpc_service ends no exchange: the guard's deadline does"""
        status, _, body = guarded.chat("a slow judge")
        assert status == 200, (status, body)
        status, _, body = guarded.chat("say nothing")
        assert status == 504 and json.loads(body)["error"]["code"] == "guard_deadline", (status, body)

    def all_is_late(guarded):
        """stream_idle_timeout ends an answer that is held, but no stream: that shows signs of life"""
        status, _, body = guarded.chat("be rude to a slow judge")
        assert (status, body) == (504, "stream timeout"), (status, body)
        status, _, body = guarded.chat("be rude to a slow judge", stream=True)
        assert status == 200 and streamed(body) == "Here is a kind answer.", (status, body)

    settings = [
        (observed, ["--mode", "observe"], {}),
        (opened, [], {"environment": {"ECSO__GATEWAY__ON_FAILURE": "fail-open"}}),
        (loop, [], {"upstream": "itself"}),
        (misled, [], {"changes": [(f"request_body_mode: {MODES}", "request_body_mode: BUFFERED")]}),
        (misled, [], {"changes": [(f"response_body_mode: {MODES}", "response_body_mode: NONE"),
                                  ("response_trailer_mode: SEND", "response_trailer_mode: SKIP")]}),
        (model_is_late, [], {"changes": [("timeout: 620s", "timeout: 1s")]}),
        (guard_is_late, [], {"changes": [("timeout: 630s\n              # If the guard", "timeout: 1s\n              # If the guard")]}),
        (all_is_late, [], {"changes": [("stream_idle_timeout: 630s", "stream_idle_timeout: 1.5s")]}),
    ]
    for function, arguments, more in settings:
        guarded = Guarded(port, *arguments, **more)
        run(function, guarded)
        guarded.stop()


def latency(port, run):
    """Measures what the guard adds, without the model's time: medians of 100 requests, one after the other."""
    text = open("deploy/envoy/envoy.yaml", encoding="utf8").read()
    begin, end = text.index("          - name: envoy.filters.http.ext_proc"), text.index("          - name: envoy.filters.http.router")
    plain = Guarded(port, changes=[(text[begin:end], "")])
    guarded = Guarded(port)

    def measured(_):
        """latency"""
        picture = large(100 << 10)
        for name, query, image in [("text, not guarded", "Which kinds?", None), ("image of 100 KB, judged", "Which kinds?", picture)]:
            body, medians = json.dumps(chat(query, image)), []
            for which, address in [("Envoy alone", plain.port), ("ecso serve", guarded.own), ("Envoy and the guard", guarded.port)]:
                connection, times = http.client.HTTPConnection("127.0.0.1", address), []
                for _ in range(110):
                    started = time.monotonic()
                    connection.request("POST", CHAT, body, {"content-type": "application/json"})
                    assert connection.getresponse().read()
                    times.append(time.monotonic() - started)
                medians.append(f"{which} {statistics.median(times[10:]) * 1000:.2f} ms")
            print(f"    {name}: " + ", ".join(medians))

    run(measured, guarded)
    plain.stop()
    guarded.stop()


def main():
    model = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Model)
    model.handle_error = lambda *_: None  # clients close connections on purpose
    model.daemon_threads = True
    threading.Thread(target=model.serve_forever, daemon=True).start()
    port = model.server_port
    failed = 0

    def run(function, guarded):
        nonlocal failed
        started = time.monotonic()
        try:
            function(guarded)
            print(f"ok ({time.monotonic() - started:.1f} s): {function.__doc__}", flush=True)
        except Exception as error:  # noqa: BLE001
            failed += 1
            print(f"FAILED: {function.__doc__}: {type(error).__name__}: {str(error)[:600]}", flush=True)

    guarded = Guarded(port)
    only = sys.argv[4:]
    for function in CHECKS:
        if not only or function.__name__ in only:
            run(function, guarded)
    guarded.stop()
    if not only or "other" in only:
        other_settings(port, run)
    if not only or "latency" in only:
        latency(port, run)
    raise SystemExit(failed)


main()
