#!/usr/bin/env python3
"""Measures the program's own share of a question: `ecso ask` with a server that answers at once.

usage: program_overhead.py ECSO [IMAGE]

All four steps of `paper` run: with gate=always step 2 would be skipped, so instead the server answers "Yes." to it. Prints wall-clock time and peak
memory of the whole process: start, settings, image, four requests, answer. Needs only the standard library.
"""

import json
import os
import statistics
import subprocess
import sys
import time

from mocks import EXAMPLE_IMAGE, MockModel, completion, start_model

RUNS = 20


class Model(MockModel):
    def do_POST(self):
        request = self.read_json()
        text = "Yes." if "unsafe and unethical" in json.dumps(request["messages"]) else "A short reply."
        if request.get("stream"):
            choices = [{"delta": {"content": text}, "finish_reason": None}, {"delta": {}, "finish_reason": "stop"}]
            events = [json.dumps({"choices": [{**choice, "index": 0}]}) for choice in choices]
            self.send_body("".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode(), "text/event-stream")
        else:
            self.send_json(completion(text))


def main():
    ecso = sys.argv[1]
    image = sys.argv[2] if len(sys.argv) > 2 else str(EXAMPLE_IMAGE)
    model = start_model(Model).removesuffix("/v1")
    command = [ecso, "ask", "What is it?", "--image", image, "--model", model, "--model-name", "m", "--profile", "paper", "-q"]
    times, peaks = [], []
    for _ in range(RUNS):
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        times.append((time.perf_counter() - started) * 1000)
        peaks.append(usage.ru_maxrss / 1024)
        assert status == 0, status
    print(
        f"own share, {RUNS} runs: median {statistics.median(times):.0f} ms, worst {max(times):.0f} ms; "
        f"peak memory {max(peaks):.0f} MB"
    )


main()
