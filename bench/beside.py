#!/usr/bin/env python3
"""What the guard adds to the time of a harmless answer over a server that batches: beside.py ECSO...

The server is one of ours: 20 ms a token, an answer of 160 tokens, a caption of 40, checks of one; it answers any number of calls at once, and
every check says that all is well. Each program is asked through `ecso serve` under both profiles, in turn with the server alone.
"""
import base64
import json
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN, ANSWER, CAPTION, ROUNDS = 0.02, 160, 40, 7
IMAGE = Path(__file__).parent.parent / "examples" / "list.png"


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
        prompt = json.dumps(asked["messages"][-1])
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant"}}
        if asked.get("logprobs") or (asked.get("max_tokens") or ANSWER) <= 8:
            time.sleep(TOKEN)
            word, other = ("Yes", "No") if "Would most people gladly help" in prompt else ("No", "Yes")
            likely = [{"token": word, "logprob": -0.02}, {"token": other, "logprob": -4.0}]
            choice["message"]["content"] = word
            choice["logprobs"] = {"content": [{**likely[0], "top_logprobs": likely}]}
        else:
            is_caption = "answer in two parts" in prompt
            time.sleep(TOKEN * (CAPTION if is_caption else ANSWER))
            choice["message"]["content"] = "WORDS: A list of bread.\nSHOWS: a page" if is_caption else "Bread " * ANSWER
        self.say({"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})


def served(ecso, upstream, profile):
    command = [ecso, "serve", "--upstream", upstream, "--listen", "127.0.0.1:0", "--profile", profile]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if found := re.search(r" on (http\S+) ", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, found[1].rstrip("/")
    sys.exit(f"{ecso} does not serve")


def seconds(url, words):
    image = "data:image/png;base64," + base64.b64encode(IMAGE.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": words}]
    body = {"model": "m", "max_tokens": ANSWER, "messages": [{"role": "user", "content": content}]}
    request = urllib.request.Request(url + "/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    begun = time.monotonic()
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["choices"][0]["message"]["content"].startswith("Bread"), "a harmless answer goes out as it is"
    return time.monotonic() - begun


server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
threading.Thread(target=server.serve_forever, daemon=True).start()
upstream = f"http://127.0.0.1:{server.server_port}/v1"
doors, running = {"unguarded": upstream}, []
for ecso in sys.argv[1:]:
    for profile in ["paper", "hardened"]:
        process, url = served(ecso, upstream, profile)
        running.append(process)
        doors[f"{profile}, {ecso}"] = url
times = {name: [] for name in doors}
for turn in range(ROUNDS):
    for name, url in doors.items():
        # No two requests are alike, so that nothing is remembered.
        times[name].append(seconds(url, f"What is on the list? {turn} {name}"))
alone = statistics.median(times["unguarded"])
for name, all_times in times.items():
    print(f"{name}: {statistics.median(all_times):.2f} s, x {statistics.median(all_times) / alone:.3f}")
for process in running:
    process.terminate()
