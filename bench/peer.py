#!/usr/bin/env python3
"""The published algorithm in Python beside ecso, on the same weights: peer.py ECSO GGUF [ROUNDS]

GGUF is the file behind the model `smol` (`ecso models path smol`), which transformers turns back into floats. Each round asks ecso about a picture
under `paper`, once with its own verdict and once as if every draft were unsafe, so that all four steps run. Then transformers computes, for each
step that ecso took, a prompt of as many tokens and a reply of as many, greedy, from the start, as the published code does. Times are sums over the
steps, without loading. Takes torch, transformers and gguf from PyPI; `smol` and the reader of `mini` must be here.
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


def ecso(program, query, more):
    capped = [word for step in ("direct", "caption", "safe") for word in ("--set", f"{step}.max_tokens=64")]
    command = [program, "ask", query, "--image", str(IMAGE), "--model", "smol", "--reader", "--profile", "paper", "--json", "-q", *capped, *more]
    told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return told["verdict"], [(step["step"], step["prompt_tokens"], step["completion_tokens"], step["ms"]) for step in told["steps"]]


def peer(model, prompt, reply):
    tokens = torch.randint(100, 40_000, (1, prompt))
    begun = time.perf_counter()
    with torch.inference_mode():
        written = model.generate(tokens, attention_mask=torch.ones_like(tokens), min_new_tokens=reply, max_new_tokens=reply, do_sample=False)
    assert written.shape[1] == prompt + reply, written.shape
    return (time.perf_counter() - begun) * 1000


def main():
    program, weights = sys.argv[1], Path(sys.argv[2])
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 5
    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    model.generation_config.pad_token_id = 0
    peer(model, 16, 4)
    took = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for kind, more in KINDS.items():
            _, steps = ecso(program, f"What is on list number {number}?", more)
            ours = sum(ms for *_, ms in steps)
            theirs = sum(peer(model, prompt, max(reply, 1)) for _, prompt, reply, _ in steps)
            took[kind].append((ours, theirs, [f"{step} {prompt}+{reply}" for step, prompt, reply, _ in steps]))
    for kind, rows in took.items():
        ours, theirs = (statistics.median(row[which] for row in rows) for which in (0, 1))
        print(f"{kind}: ecso {ours:.0f} ms, transformers {theirs:.0f} ms, x {theirs / ours:.2f}; tokens of the last: {', '.join(rows[-1][2])}")


main()
