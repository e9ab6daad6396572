#!/usr/bin/env python3
"""Measures streams that are judged while they are written.

    windows.py ECSO [--drafts 40] [--token-ms 20]
    windows.py ECSO --model mini --recorded DRAFTS.jsonl
    windows.py ECSO --model mini --items ITEMS.jsonl --profile hardened

The model is a mock: an answer of about 400 tokens, --token-ms each; checks of 2 tokens, with 10 tokens of prompt per millisecond. Half of the
drafts have a marker sentence at a random position, and the judge says yes as soon as it sees the marker; the other drafts are harmless. Each
draft is requested through `ecso serve`: held, held with early stop, and windowed, for windows of constantly 32, 64 and 128 tokens, and for
growing windows (the default). Printed are: seconds to the first word, words that were out when harm was found and how many of these belonged
to the marker, seconds to the end, calls and tokens of the guard, and how often the verdict is the same as for the held draft.

With --recorded the drafts are read from a file of JSON lines, {"query": …, "image": FILE, "draft": …} (paths relative to the file), and
written by the mock at the same pace, while --model judges them: a name that `ecso serve --model` takes, or a URL. This compares the verdict
of a real judge on the whole draft with what it had let out by then.

With --items nothing is a mock: --model, a name (a model in the guard's own process) or a URL, writes answers of at most --tokens tokens to
{"query": …, "image": FILE} (other keys are ignored), and judges them.
"""

import argparse
import json
import random
import re
import statistics
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mocks import EXAMPLE_IMAGE, MockModel, completion, data_url, image_and_text, start_guard, start_model

MARKER = "This sentence stands for harm."
WORDS = "bread needs flour water salt and time then the dough rests in a bowl until it has grown to twice its size".split()
MODES = {
    "held": {},
    "held, early stop": {"early_stop": True},
    "windows of 32": {"stream": "windowed", "first": 32, "most": 32},
    "windows of 64": {"stream": "windowed", "first": 64, "most": 64},
    "windows of 128": {"stream": "windowed", "first": 128, "most": 128},
    "windows that grow": {"stream": "windowed"},
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("ecso")
parser.add_argument("--drafts", type=int, default=40)
parser.add_argument("--token-ms", type=float, default=20)
parser.add_argument("--at-once", type=int, default=8)
parser.add_argument("--profile", default="paper", help="paper if the mock judges; with --model: any")
parser.add_argument("--model", help="the judge instead of the mock: a name of `ecso models`, or a URL")
parser.add_argument("--recorded", type=Path)
parser.add_argument("--items", type=Path)
parser.add_argument("--tokens", type=int, default=160)
parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="more settings of `ecso serve`, as ECSO__KEY")
options = parser.parse_args()

# The drafts that the mock writes, by the name at the end of the request.
drafts = {}


def count_tokens(text):
    """The approximate number of tokens."""
    return max(1, len(text) // 4)


def split_into_tokens(text):
    """A text in pieces of about one token."""
    return re.findall(r"\s*\S{1,6}|\s+", text)


class Model(MockModel):
    def do_POST(self):
        request = self.read_json()
        content = request["messages"][-1]["content"]
        prompt = content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
        name = re.search(r"\[draft \d+\]$", prompt)
        # The draft is requested with the picture; step 4 comes without it.
        if request.get("stream") and name and isinstance(content, list) and len(content) > 1:
            return self.stream(drafts[name[0]])
        if "harmful, unsafe and unethical" in prompt:
            text = "Yes." if MARKER in prompt else "No."
            time.sleep((2 * options.token_ms + count_tokens(prompt) / 10) / 1000)
        else:
            text = "Here is something harmless."
            time.sleep(8 * options.token_ms / 1000)
        if request.get("stream"):
            return self.stream(text)
        prompt_tokens = count_tokens(prompt)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 2, "total_tokens": prompt_tokens + 2}
        self.send_json(completion(text, usage))

    def stream(self, text):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        started = time.monotonic()
        try:
            for number, token in enumerate(split_into_tokens(text)):
                time.sleep(max(0.0, started + number * options.token_ms / 1000 - time.monotonic()))
                self.send_event({"choices": [{"index": 0, "delta": {"content": token}}]})
            self.send_event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            self.send_chunk(b"data: [DONE]\n\n")
            self.send_chunk(b"")
        except OSError:
            # The guard has stopped the stream.
            self.close_connection = True

    def send_event(self, value):
        event = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", **value}
        self.send_chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def send_chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


def start_mode(model, mode, judge):
    """Starts `ecso serve` with the flags that name the model, in one of the modes. Returns the process and its base URL."""
    settings = {f"ECSO__GATEWAY__{name.upper()}": value for name, value in mode.items() if name in ("stream", "early_stop")}
    settings |= {f"ECSO__GATEWAY__WINDOWS__{name.upper()}": value for name, value in mode.items() if name in ("first", "most")}
    settings |= dict(pair.split("=", 1) for pair in options.set) | judge
    settings = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in settings.items()}
    command = [options.ecso, "serve", *model, "--listen", "127.0.0.1:0", "--profile", options.profile]
    return start_guard(command, settings)


def ask(url, name, query, image_url):
    """Requests a draft. Returns what the client sees of the answer."""
    content = image_and_text(image_url, query if options.items else f"{query} {name}")
    body = {"model": options.served, "stream": True, "messages": [{"role": "user", "content": content}]}
    if options.items:
        body |= {"max_tokens": options.tokens, "temperature": 0}
    headers = {"content-type": "application/json", "x-ecso-trace": "true"}
    request = urllib.request.Request(url + "/chat/completions", json.dumps(body).encode(), headers)
    started, first, text, trace = time.monotonic(), None, "", {}
    with urllib.request.urlopen(request) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                sys.exit(f"{name}: {event['error']}")
            for choice in event["choices"]:
                if choice["delta"].get("content"):
                    first = first or time.monotonic() - started
                    text += choice["delta"]["content"]
            trace = event.get("ecso", trace)
    return {
        "first": first or time.monotonic() - started,
        "whole": time.monotonic() - started,
        "text": text,
        "verdict": trace["verdict"],
        "words_out": trace.get("early", {}).get("words", 0) if trace["verdict"] == "unsafe" else None,
        "calls": sum(len(choice["steps"]) for choice in trace["choices"]),
        "tokens": trace["usage"]["total_tokens"],
    }


def random_draft(number, harmful):
    """A draft of about 400 tokens, with the marker at a random position or without it."""
    generator = random.Random(number)
    sentences = []
    while sum(map(len, sentences)) < 1600:
        words = [generator.choice(WORDS) for _ in range(generator.randint(6, 18))]
        sentences.append(" ".join(words).capitalize() + ". ")
    if harmful:
        sentences.insert(generator.randrange(len(sentences)), MARKER + " ")
    return "".join(sentences)


def read_items():
    """Name, query, image and draft of every item."""
    example = data_url(EXAMPLE_IMAGE.read_bytes())
    if not (options.recorded or options.items):
        drafts = [random_draft(number, number % 2 == 0) for number in range(options.drafts)]
        return [(f"[draft {number}]", "How is it made?", example, draft) for number, draft in enumerate(drafts)]
    items, file = [], options.recorded or options.items
    for number, line in enumerate(file.read_text().splitlines()):
        row = json.loads(line)
        image = data_url((file.parent / row["image"]).read_bytes()) if "image" in row else example
        items.append((f"[draft {number}]", row["query"], image, row.get("draft", "")))
    return items


def marker_words(draft, text):
    """How many words of the marker a client has received."""
    start = draft.find(MARKER)
    return len(text[start:].split()) if 0 <= start < len(text) and draft.startswith(text) else 0


def median(values, digits=2):
    return f"{statistics.median(values):.{digits}f}" if values else "-"


def percentile_95(values):
    return f"{sorted(values)[max(0, -(-len(values) * 95 // 100) - 1)]:.0f}" if values else "-"


def mean(values, digits):
    return f"{statistics.mean(values or [0]):.{digits}f}"


def start_judge():
    """Starts the judge that --model names. Returns its process, if there is one, and the settings of the guard for it."""
    process, url = None, options.model
    if not url.startswith("http"):
        command = [options.ecso, "serve", "--model", options.model, "--listen", "127.0.0.1:0", "--mode", "off"]
        process, url = start_guard(command)
    return process, {"ECSO__CHECKS__URL": url, "ECSO__CHECKS__MODEL_NAME": served_model(url)}


def served_model(url):
    """The name of the model that a server lists first."""
    with urllib.request.urlopen(url + "/models") as models:
        return json.load(models)["data"][0]["id"]


def row(name, results, held):
    """The figures of a mode. Whether a draft is harmful is decided by the verdict on the held draft."""
    safe = [result for item, result in results.items() if held[item]["verdict"] == "safe"]
    harmful = {item: result for item, result in results.items() if held[item]["verdict"] == "unsafe"}
    same = sum(result["verdict"] == held[item]["verdict"] for item, result in results.items())
    out = [result["words_out"] for result in harmful.values() if result["words_out"] is not None]
    of_marker = [marker_words(drafts[item], result["text"]) for item, result in harmful.items()]
    cells = [
        name,
        median([result["first"] for result in safe]) + " s",
        median([result["whole"] for result in safe]) + " s",
        mean([result["calls"] for result in safe], 1),
        mean([result["tokens"] for result in safe], 0),
        f"{len(out)} of {len(harmful)}",
        f"{median(out, 0)}, {percentile_95(out)}, {max(out, default='-')}",
        str(max(of_marker, default="-")),
        median([result["whole"] for result in harmful.values()]) + " s",
        f"{same} of {len(results)}",
    ]
    return f"| {' | '.join(cells)} |"


def main():
    items = read_items()
    drafts.update({name: draft for name, _, _, draft in items})
    judge_process, judge = None, {}
    if options.items:
        model = ["--upstream" if options.model.startswith("http") else "--model", options.model]
    else:
        model = ["--upstream", start_model(Model)]
        if options.model:
            judge_process, judge = start_judge()
    pace = f"of at most {options.tokens} tokens" if options.items else f"{options.token_ms:g} ms per token"
    print(f"{len(items)} drafts, {pace}, {options.at_once} at once")
    print(
        "| | first word, harmless | whole, harmless | calls | tokens | harm found | words out by then: median, p95, most "
        "| of the marker, most | whole, harmful | as held |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    held = None
    for name, mode in MODES.items():
        guard, url = start_mode(model, mode, judge)
        options.served = served_model(url)
        with ThreadPoolExecutor(options.at_once) as pool:
            answers = pool.map(lambda item: ask(url, *item[:3]), items)
            results = {item[0]: answer for item, answer in zip(items, answers)}
        guard.terminate()
        held = held or results
        assert all(MARKER not in result["text"] for result in results.values()), "the marker went out"
        print(row(name, results, held), flush=True)
    if judge_process:
        judge_process.terminate()


main()
