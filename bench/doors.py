#!/usr/bin/env python3
"""Checks that every door makes the same decisions: sends the same items through the library, `ask`, and `serve`, plain and streamed.

    doors.py ECSO ITEMS RUN [--ask K]         RUN is a run of `ecso eval run jsonl` over items of the folder ITEMS, with the model mini and
                                              one arm of `hardened` (the library); K items also go through `ecso ask`
    doors.py ECSO ITEMS RUN --mock [--each N] the same with a mock in place of the model, over N items of each scenario, all of them through
                                              `ask` too; makes RUN itself

The profile is the run's. Prints what differs, and how many results agree.

The mock answers from a hash of what it is asked (messages, images, limit, temperature): whoever sends it another prompt gets other
probabilities, another description of the picture, and another draft.
"""
import argparse
import hashlib
import json
import math
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mocks import MockModel, completion, data_url, image_and_text, start_guard, start_model

DOORS = ("plain", "streamed", "ask")


def what_is_asked(request):
    """What a model makes of a request: the same for every way to write it as JSON."""
    messages = []
    for message in request["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        messages.append((message["role"], [part.get("text") or part["image_url"]["url"] for part in parts]))
    return messages, request.get("max_tokens"), float(request.get("temperature") or 0)


class HashModel(MockModel):
    """Replies, and probabilities of yes and no, from a hash of the request."""

    def do_POST(self) -> None:
        request = self.read_json()
        bits = hashlib.blake2b(repr(what_is_asked(request)).encode()).digest()
        if request.get("max_tokens", 0) > 8:
            reply, top = f"Take {bits[0]} eggs, {bits[1]} g of flour and {bits[2]} ml of milk.", None
            if "SHOWS:" in str(request["messages"][-1]):
                reply = f"WORDS: {reply}\nSHOWS: a recipe"
        else:
            # Log-odds from -7 to 3: about half of the items are unsafe.
            yes = 1 / (1 + math.exp(7 - bits[0] / 25.5))
            reply = "Yes" if yes > 0.5 else "No"
            top = [{"token": "Yes", "logprob": math.log(yes)}, {"token": "No", "logprob": math.log(1 - yes)}]
        logprobs = {"content": [{"token": reply, "logprob": -0.1, "top_logprobs": top}]} if top else None
        if not request.get("stream"):
            answer = completion(reply, {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2})
            answer["choices"][0]["logprobs"] = logprobs
            return self.send_json(answer)
        head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        choices = [{"delta": {"role": "assistant", "content": reply}, "logprobs": logprobs}, {"delta": {}, "finish_reason": "stop"}]
        events = [json.dumps(head | {"choices": [{"index": 0} | choice]}) for choice in choices]
        self.send_body("".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode(), "text/event-stream")


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json", "x-ecso-trace": "true"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return response.read().decode()


def plain(url, body):
    answer = json.loads(post(url, body))
    trace = answer["ecso"]["choices"][0]
    return trace["verdict"], trace["score"], answer["choices"][0]["message"]["content"].strip()


def streamed(url, body):
    text, trace = "", None
    for line in post(url, body | {"stream": True}).splitlines():
        if line.startswith("data: ") and line != "data: [DONE]":
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"])
            text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            trace = event.get("ecso", trace)
    return trace["choices"][0]["verdict"], trace["choices"][0]["score"], text.strip()


def ask(ecso, item, folder, profile, model):
    image = ["--image", folder / item["image"]] if "image" in item else []
    command = [ecso, "ask", item["query"], *image, "--json", "--quiet", *model, "--profile", profile]
    outcome = json.loads(subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout)
    return outcome["verdict"], outcome["score"], outcome["answer"].strip()


def run_on_mock(options):
    """Makes a run of the library over the first items of every scenario. Returns the flags that name the model."""
    model = ["--model", start_model(HashModel)]
    items, taken, rows = options.items / "items.jsonl", Counter(), []
    for line in items.read_text().splitlines():
        # Descriptions and recorded drafts can't be sent through a door.
        item = json.loads(line)
        if "description" not in item and "draft" not in item and taken[item["scenario"]] < options.each:
            taken[item["scenario"]] += 1
            rows.append(line)
    options.run.mkdir(parents=True)
    chosen = options.items / "doors.jsonl"
    chosen.write_text("\n".join(rows) + "\n")
    command = [options.ecso, "eval", "run", "jsonl", "--data", chosen, *model, "--profile", "hardened", "--set", "scope=all"]
    subprocess.run(list(map(str, [*command, "--max-new-tokens", "128", "--out", options.run / "run"])), check=True)
    chosen.unlink()
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ecso")
    parser.add_argument("items", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--ask", type=int, default=0)
    parser.add_argument("--mock", action="store_true")
    parser.add_argument("--each", type=int, default=100)
    options = parser.parse_args()

    model, run = ["--model", "mini"], options.run
    if options.mock:
        model, run, options.ask = run_on_mock(options), options.run / "run", sys.maxsize
    items = {item["id"]: item for item in map(json.loads, (options.items / "items.jsonl").open())}
    header, *records = map(json.loads, (run / "journal.jsonl").open())
    records = [record for record in records if record.get("arms") and len(record["arms"]) > 1]
    [(_, text)] = header["profiles"]
    profile = run / "profile.toml"
    profile.write_text(text)
    tokens = int(re.search(r"\[direct\][^\[]*max_tokens = (\d+)", text)[1])
    guard, url = start_guard([str(part) for part in [options.ecso, "serve", *model, "--profile", profile, "--listen", "127.0.0.1:0"]])
    url += "/chat/completions"

    def try_doors(number):
        """What every door makes of an item, beside the library's result."""
        item, outcome = items[records[number]["id"]], records[number]["arms"][1]
        content = item["query"]
        if "image" in item:
            content = image_and_text(data_url((options.items / item["image"]).read_bytes()), content)
        body = {"model": "m" if options.mock else "mini", "messages": [{"role": "user", "content": content}]}
        body |= {"max_tokens": tokens, "temperature": 0}
        results = {"plain": plain(url, body), "streamed": streamed(url, body)}
        if number < options.ask:
            results["ask"] = ask(options.ecso, item, options.items, profile, model)
        return item, (outcome["verdict"], outcome["score"], outcome["answer"].strip()), results

    agreeing, tried, verdicts, started = Counter(), Counter(), Counter(), time.time()
    try:
        with ThreadPoolExecutor(2 if options.mock else 1) as pool:
            for number, (item, library, results) in enumerate(pool.map(try_doors, range(len(records)))):
                verdicts[library[0]] += 1
                for door, result in results.items():
                    tried[door] += 1
                    agreeing[door] += result == library
                    if result != library:
                        answers = "equal" if result[2] == library[2] else "different"
                        print(f"{item['id']} {door}: {result[:2]}, the library {library[:2]}, {answers} answers", flush=True)
                print(f"{number + 1} of {len(records)}, {time.time() - started:.0f} s", file=sys.stderr)
    finally:
        guard.kill()
    print(f"{len(records)} items: " + ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())))
    for door in filter(tried.get, DOORS):
        print(f"{door}: {agreeing[door]} of {tried[door]} have the library's verdict, score and answer")


main()
