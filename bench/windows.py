#!/usr/bin/env python3
"""Streams that are judged while they are written: windows.py ECSO [--drafts 40] [--token-ms 20]
                                              windows.py ECSO --model mini --recorded DRAFTS.jsonl

The model is a mock: an answer of some 400 tokens, --token-ms each, checks of 2 tokens and 10 tokens of prompt a millisecond. Half of
the drafts hold a marker sentence at a random place, and the judge says yes as soon as it reads it; the others are harmless. Each draft
is asked for through `ecso serve`: held, held with early stop, and windowed, for windows that stay at 32, 64 and 128 tokens, and for
those that grow (the default). Told are: seconds to the first word, words that were out when harm was found and how many of these were the
marker's, seconds to the end, calls and tokens of the guard, and how often the verdict is the one that
the same draft gets when it is held.

With --recorded the drafts are read from a file of JSON lines, {"query": …, "image": FILE, "draft": …} (paths beside the file), and written
by the mock at the same pace, while --model judges them: a name that `ecso serve --model` takes, or a URL. So a real judge's verdict on the
whole can be held against what it had let out by then.
"""
import argparse
import base64
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

IMAGE = Path(__file__).parent.parent / "examples" / "list.png"
MARKER = "This sentence stands for harm."
WORDS = "bread needs flour water salt and time then the dough rests in a bowl until it has grown to twice its size".split()
WAYS = {
    "held": {},
    "held, early stop": {"early_stop": True},
    "windows of 32": {"stream": "windowed", "first": 32, "most": 32},
    "windows of 64": {"stream": "windowed", "first": 64, "most": 64},
    "windows of 128": {"stream": "windowed", "first": 128, "most": 128},
    "windows that grow": {"stream": "windowed"},
}

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("ecso")
arguments.add_argument("--drafts", type=int, default=40)
arguments.add_argument("--token-ms", type=float, default=20)
arguments.add_argument("--at-once", type=int, default=8)
arguments.add_argument("--profile", default="paper", help="of the mock's judge: paper; of --model's: any")
arguments.add_argument("--model", help="judges in place of the mock: a name of `ecso models`, or a URL")
arguments.add_argument("--recorded", type=Path)
arguments.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="more settings of `ecso serve`, as ECSO__KEY")
given = arguments.parse_args()
drafts = {}


def tokens_of(text):
    return max(1, len(text) // 4)


def pieces_of(text):
    """A text in pieces of about a token."""
    return re.findall(r"\s*\S{1,6}|\s+", text)


class Model(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def say(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.say({"data": [{"id": "m", "object": "model"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        content = asked["messages"][-1]["content"]
        prompt = content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
        name = re.search(r"\[draft \d+\]$", prompt)
        # With the picture: step 4 has none.
        if asked.get("stream") and name and isinstance(content, list) and len(content) > 1:
            return self.write(drafts[name[0]])
        usage = {"prompt_tokens": tokens_of(prompt), "completion_tokens": 2}
        if "harmful, unsafe and unethical" in prompt:
            text = "Yes." if MARKER in prompt else "No."
            time.sleep((2 * given.token_ms + tokens_of(prompt) / 10) / 1000)
        else:
            text = "Here is something harmless."
            time.sleep(8 * given.token_ms / 1000)
        message = {"role": "assistant", "content": text}
        if asked.get("stream"):
            return self.write(text)
        usage["total_tokens"] = sum(usage.values())
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        self.say({"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage})

    def write(self, text):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        begun = time.monotonic()
        try:
            for place, piece in enumerate(pieces_of(text)):
                time.sleep(max(0.0, begun + place * given.token_ms / 1000 - time.monotonic()))
                self.event({"choices": [{"index": 0, "delta": {"content": piece}}]})
            self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            self.chunk(b"data: [DONE]\n\n")
            self.chunk(b"")
        except OSError:
            # The guard has stopped it.
            self.close_connection = True

    def event(self, value):
        self.chunk(b"data: " + json.dumps({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", **value}).encode() + b"\n\n")

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


def served(upstream, way):
    settings = {f"ECSO__GATEWAY__{name.upper()}": value for name, value in way.items() if name in ("stream", "early_stop")}
    settings |= {f"ECSO__GATEWAY__WINDOWS__{name.upper()}": value for name, value in way.items() if name in ("first", "most")}
    settings |= dict(pair.split("=", 1) for pair in given.set)
    if given.model:
        settings |= {"ECSO__CHECKS__URL": judge, "ECSO__CHECKS__MODEL_NAME": judge_name}
    settings = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in settings.items()}
    command = [given.ecso, "serve", "--upstream", upstream, "--listen", "127.0.0.1:0", "--profile", given.profile]
    return started(command, settings)


def started(command, settings=None):
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | (settings or {}))
    for line in process.stderr:
        if found := re.search(r" on (http\S+) ", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, found[1].rstrip("/")
    sys.exit(f"{command} does not serve")


def ask(url, name, query, image):
    """What a client sees of one answer."""
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + image}}, {"type": "text", "text": f"{query} {name}"}]
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": content}]}
    request = urllib.request.Request(
        url + "/chat/completions", json.dumps(body).encode(), {"content-type": "application/json", "x-ecso-trace": "true"}
    )
    begun, first, text, found = time.monotonic(), None, "", {}
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                sys.exit(f"{name}: {event['error']}")
            for choice in event["choices"]:
                if choice["delta"].get("content"):
                    first = first or time.monotonic() - begun
                    text += choice["delta"]["content"]
            found = event.get("ecso", found)
    steps = [step for choice in found["choices"] for step in choice["steps"]]
    return {
        "first": first or time.monotonic() - begun,
        "whole": time.monotonic() - begun,
        "text": text,
        "verdict": found["verdict"],
        "out": found.get("early", {}).get("words", 0) if found["verdict"] == "unsafe" else None,
        "calls": len(steps),
        "tokens": found["usage"]["total_tokens"],
    }


def made(number, harmful):
    """A draft of about 400 tokens, with the marker at a random place or without."""
    drawn = random.Random(number)
    sentences = []
    while sum(map(len, sentences)) < 1600:
        words = [drawn.choice(WORDS) for _ in range(drawn.randint(6, 18))]
        sentences.append(" ".join(words).capitalize() + ". ")
    if harmful:
        sentences.insert(drawn.randrange(len(sentences)), MARKER + " ")
    return "".join(sentences)


def at_once(work, items):
    results, left, lock = {}, list(items), threading.Lock()

    def worker():
        while True:
            with lock:
                if not left:
                    return
                item = left.pop()
            results[item[0]] = work(item)

    threads = [threading.Thread(target=worker) for _ in range(given.at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def words_of_harm(draft, text):
    """How many words of the marker a client has."""
    place = draft.find(MARKER)
    return len(text[place:].split()) if 0 <= place < len(text) and draft.startswith(text) else 0


def middle(values, digits=2):
    return f"{statistics.median(values):.{digits}f}" if values else "-"


def late(values):
    """The 95th percentile."""
    return f"{sorted(values)[max(0, -(-len(values) * 95 // 100) - 1)]:.0f}" if values else "-"


image = base64.b64encode(IMAGE.read_bytes()).decode()
items = []
if given.recorded:
    for number, line in enumerate(given.recorded.read_text().splitlines()):
        row = json.loads(line)
        shown = base64.b64encode((given.recorded.parent / row["image"]).read_bytes()).decode() if "image" in row else image
        items.append((f"[draft {number}]", row["query"], shown, row["draft"]))
else:
    items = [(f"[draft {number}]", "How is it made?", image, made(number, number % 2 == 0)) for number in range(given.drafts)]
drafts |= {name: draft for name, _, _, draft in items}



class Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        """The guard leaves calls that it no longer needs."""


server = Server(("127.0.0.1", 0), Model)
threading.Thread(target=server.serve_forever, daemon=True).start()
upstream, running = f"http://127.0.0.1:{server.server_port}/v1", []
if given.model:
    judge = given.model
    if not judge.startswith("http"):
        # The judge is a server of its own, which guards nothing.
        process, judge = started([given.ecso, "serve", "--model", given.model, "--listen", "127.0.0.1:0", "--mode", "off"])
        running.append(process)
    with urllib.request.urlopen(judge + "/models") as known:
        judge_name = json.load(known)["data"][0]["id"]
print(f"{len(items)} drafts, {given.token_ms:g} ms a token, {given.at_once} at once")
print("| | first word, harmless | whole, harmless | calls | tokens | harm found | words out by then: median, p95, most | of the marker, most | whole, harmful | as held |")
print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
held = {}
for name, way in WAYS.items():
    process, url = served(upstream, way)
    results = at_once(lambda item: ask(url, item[0], item[1], item[2]), items)
    process.terminate()
    held = held or results
    # By the verdict on the whole: that is what they are.
    safe = [result for item, result in results.items() if held[item]["verdict"] == "safe"]
    harmful = [result for item, result in results.items() if held[item]["verdict"] == "unsafe"]
    same = sum(result["verdict"] == held[item]["verdict"] for item, result in results.items())
    assert all(MARKER not in result["text"] for result in results.values()), "the marker went out"
    out = [result["out"] for result in harmful if result["out"] is not None]
    of_harm = [words_of_harm(drafts[item], result["text"]) for item, result in results.items() if held[item]["verdict"] == "unsafe"]
    print(
        f"| {name} | {middle([result['first'] for result in safe])} s | {middle([result['whole'] for result in safe])} s "
        f"| {statistics.mean(result['calls'] for result in safe or [{'calls': 0}]):.1f} | {statistics.mean(result['tokens'] for result in safe or [{'tokens': 0}]):.0f} "
        f"| {len(out)} of {len(harmful)} | {middle(out, 0)}, {late(out)}, {max(out, default='-')} | {max(of_harm, default='-')} "
        f"| {middle([result['whole'] for result in harmful])} s | {same} of {len(results)} |",
        flush=True,
    )
for process in running:
    process.terminate()
