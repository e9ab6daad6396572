#!/usr/bin/env python3
"""The program's own share of a question: `ecso ask` on a server that answers at once.

usage: own_share.py PATH_OF_ECSO [IMAGE]

All four steps run (gate=always would skip step 2, so the server says "Yes." to it). Prints wall-clock time and peak memory of
the whole process: start, settings, image, four requests, answer. Standard library only.
"""
import http.server
import json
import os
import statistics
import subprocess
import sys
import threading
import time


class Model(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.connection.setsockopt(6, 1, 1)  # no delay

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        reply = "Yes." if "unsafe and unethical" in json.dumps(body["messages"]) else "A short reply."
        if body.get("stream"):
            chunks = [{"delta": {"content": reply}, "finish_reason": None}, {"delta": {}, "finish_reason": "stop"}]
            data = "".join("data: %s\n\n" % json.dumps({"choices": [dict(chunk, index=0)]}) for chunk in chunks)
            self.reply((data + "data: [DONE]\n\n").encode(), "text/event-stream")
        else:
            choice = {"message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
            self.reply(json.dumps({"choices": [choice]}).encode(), "application/json")

    def reply(self, data, kind):
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def main():
    ecso = sys.argv[1]
    image = sys.argv[2] if len(sys.argv) > 2 else os.path.join(os.path.dirname(__file__), "../examples/list.png")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [ecso, "ask", "What is it?", "--image", image, "--model", "http://127.0.0.1:%d" % server.server_port]
    command += ["--model-name", "m", "-q"]
    times, peaks = [], []
    for _ in range(20):
        begun = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        times.append((time.perf_counter() - begun) * 1000)
        peaks.append(usage.ru_maxrss / 1024)
        assert status == 0, status
    print("own share, 20 runs: median %.0f ms, worst %.0f ms; peak memory %.0f MB"
          % (statistics.median(times), max(times), max(peaks)))


main()
