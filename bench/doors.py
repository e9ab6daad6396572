#!/usr/bin/env python3
"""Checks that every door makes the same decisions: sends the same items through the library, `ask`, and `serve`, plain and streamed.

    doors.py ECSO ITEMS RUN [--ask K]    ITEMS is the folder that hardened.py wrote; RUN a run of `ecso eval run jsonl` over its first
                                         items with one arm of `hardened` (the library); K items also go through `ecso ask`

Items and profile are those of the run. Prints what differs, and how many results agree.
"""
import argparse
import base64
import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


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


def ask(ecso, item, folder, profile):
    command = [ecso, "ask", item["query"], "--image", folder / item["image"], "--json", "--quiet", "--model", "mini", "--profile", profile]
    outcome = json.loads(subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout)
    return outcome["verdict"], outcome["score"], outcome["answer"].strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ecso")
    parser.add_argument("items", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--ask", type=int, default=0)
    options = parser.parse_args()

    items = {item["id"]: item for item in map(json.loads, (options.items / "items.jsonl").open())}
    header, *records = map(json.loads, (options.run / "journal.jsonl").open())
    records = [record for record in records if record.get("arms") and len(record["arms"]) > 1]
    [(_, text)] = header["profiles"]
    profile = options.run / "profile.toml"
    profile.write_text(text)
    tokens = int(re.search(r"\[direct\][^\[]*max_tokens = (\d+)", text)[1])

    serve = subprocess.Popen(
        [options.ecso, "serve", "--model", "mini", "--profile", profile, "--listen", "127.0.0.1:0"], stderr=subprocess.PIPE, text=True)
    url = re.search(r"on (http\S+)", serve.stderr.readline())[1] + "/chat/completions"
    same = {"plain": 0, "streamed": 0, "ask": 0}
    count = dict.fromkeys(same, 0)
    started = time.time()
    try:
        for number, record in enumerate(records):
            item, outcome = items[record["id"]], record["arms"][1]
            image = base64.b64encode((options.items / item["image"]).read_bytes()).decode()
            content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}, {"type": "text", "text": item["query"]}]
            body = {"model": "mini", "messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0}
            doors = {"plain": lambda: plain(url, body), "streamed": lambda: streamed(url, body)}
            if number < options.ask:
                doors["ask"] = lambda: ask(options.ecso, item, options.items, profile)
            library = outcome["verdict"], outcome["score"], outcome["answer"].strip()
            for name, door in doors.items():
                result = door()
                count[name] += 1
                same[name] += result == library
                if result != library:
                    answers = "equal" if result[2] == library[2] else "different"
                    print(f"{item['id']} {name}: {result[:2]}, the library {library[:2]}, {answers} answers", flush=True)
            print(f"{number + 1} of {len(records)}, {time.time() - started:.0f} s", file=sys.stderr)
    finally:
        serve.kill()
    for name, number in count.items():
        print(f"{name}: {same[name]} of {number} have the library's verdict, score and answer")


main()
