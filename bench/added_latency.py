#!/usr/bin/env python3
"""Measures what the guard adds to the time of a harmless answer over a server that batches: added_latency.py ECSO...

The server is a mock: 20 ms per token, an answer of 160 tokens, a caption of 40, checks of one token. It answers any number of calls at once,
and every check finds the request or the answer harmless. Each program is asked through `ecso serve` under both profiles, in turn with the
server alone. Prints the median time of each, and its ratio to the server alone.
"""

import json
import statistics
import sys
import time
import urllib.request

from mocks import EXAMPLE_IMAGE, MockModel, completion, data_url, image_and_text, start_guard, start_model

TOKEN_SECONDS, ANSWER_TOKENS, CAPTION_TOKENS, ROUNDS = 0.02, 160, 40, 7


class Model(MockModel):
    def do_POST(self):
        request = self.read_json()
        prompt = json.dumps(request["messages"][-1])
        if request.get("logprobs") or (request.get("max_tokens") or ANSWER_TOKENS) <= 8:
            time.sleep(TOKEN_SECONDS)
            word, other = ("Yes", "No") if "Would most people gladly help" in prompt else ("No", "Yes")
            likely = [{"token": word, "logprob": -0.02}, {"token": other, "logprob": -4.0}]
            body = completion(word)
            body["choices"][0]["logprobs"] = {"content": [{**likely[0], "top_logprobs": likely}]}
        else:
            is_caption = "in two parts" in prompt
            time.sleep(TOKEN_SECONDS * (CAPTION_TOKENS if is_caption else ANSWER_TOKENS))
            body = completion("WORDS: A list of bread.\nSHOWS: a page" if is_caption else "Bread " * ANSWER_TOKENS)
        self.send_json(body)


def measure(url, query):
    """Asks for an answer. Returns the seconds that it took."""
    content = image_and_text(data_url(EXAMPLE_IMAGE.read_bytes()), query)
    body = {"model": "m", "max_tokens": ANSWER_TOKENS, "messages": [{"role": "user", "content": content}]}
    request = urllib.request.Request(url + "/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    started = time.monotonic()
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)["choices"][0]["message"]["content"]
    assert answer.startswith("Bread"), f"the guard changed a harmless answer: {answer}"
    return time.monotonic() - started


def main():
    upstream = start_model(Model)
    urls, guards = {"unguarded": upstream}, []
    for ecso in sys.argv[1:]:
        for profile in ["paper", "hardened"]:
            command = [ecso, "serve", "--upstream", upstream, "--listen", "127.0.0.1:0", "--profile", profile]
            guard, urls[f"{profile}, {ecso}"] = start_guard(command)
            guards.append(guard)
    times = {name: [] for name in urls}
    for number in range(ROUNDS):
        for name, url in urls.items():
            # Each request is different, so that no result is reused.
            times[name].append(measure(url, f"What is on the list? {number} {name}"))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, median in medians.items():
        print(f"{name}: {median:.2f} s, x {median / medians['unguarded']:.3f}")
    for guard in guards:
        guard.terminate()


main()
