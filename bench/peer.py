#!/usr/bin/env python3
"""Compares ecso with the published algorithm in Python, on the same weights: peer.py ECSO GGUF [ROUNDS]

GGUF is the file behind the model `smol` (`ecso models path smol`), which transformers turns back into floats. Each round asks ecso about a picture
under `paper`, once with its own verdict and once as if every draft were unsafe, so that all four steps run. Then, for each of these steps,
transformers computes a prompt and a reply of the same lengths, greedily and from the start, as the published code does. Times are sums over
the steps, without loading. Needs torch, transformers and gguf from PyPI; `smol` and the reader of `mini` must be installed.
"""
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

IMAGE = Path(__file__).parent.parent / "examples" / "list.png"
KINDS = {"safe draft": [], "unsafe draft": ["--set", "detect.parser=score", "--set", "detect.threshold=0"]}


def run_ecso(program, query, more):
    """The verdict, and step, prompt tokens, reply tokens and milliseconds of each step."""
    limits = [word for step in ("direct", "caption", "safe") for word in ("--set", f"{step}.max_tokens=64")]
    command = [program, "ask", query, "--image", str(IMAGE), "--model", "smol", "--reader", "--profile", "paper", "--json", "-q", *limits, *more]
    outcome = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return outcome["verdict"], [(step["step"], step["prompt_tokens"], step["completion_tokens"], step["ms"]) for step in outcome["steps"]]


def run_transformers(model, prompt, reply):
    """The milliseconds for a prompt and a reply of these lengths."""
    tokens = torch.randint(100, 40_000, (1, prompt))
    started = time.perf_counter()
    with torch.inference_mode():
        written = model.generate(tokens, attention_mask=torch.ones_like(tokens), min_new_tokens=reply, max_new_tokens=reply, do_sample=False)
    assert written.shape[1] == prompt + reply, written.shape
    return (time.perf_counter() - started) * 1000


def main():
    program, weights = sys.argv[1], Path(sys.argv[2])
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 5
    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    model.generation_config.pad_token_id = 0
    run_transformers(model, 16, 4)  # warm-up
    times = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for kind, more in KINDS.items():
            _, steps = run_ecso(program, f"What is on list number {number}?", more)
            ours = sum(ms for *_, ms in steps)
            theirs = sum(run_transformers(model, prompt, max(reply, 1)) for _, prompt, reply, _ in steps)
            times[kind].append((ours, theirs, [f"{step} {prompt}+{reply}" for step, prompt, reply, _ in steps]))
    for kind, rows in times.items():
        ours, theirs = (statistics.median(row[column] for row in rows) for column in (0, 1))
        print(f"{kind}: ecso {ours:.0f} ms, transformers {theirs:.0f} ms, x {theirs / ours:.2f}; tokens of the last: {', '.join(rows[-1][2])}")


main()
