#!/usr/bin/env python3
"""Measures `mini`: the time until it can read a prompt, peak memory, and steps 2 to 4 with and without the shared prefix.

usage: mini.py ECSO [IMAGE]        (standard library only)
"""
import json
import os
import statistics
import subprocess
import sys

ecso = sys.argv[1]
image = sys.argv[2] if len(sys.argv) > 2 else os.path.join(os.path.dirname(__file__), "../examples/list.png")
limits = [flag for step in ("direct", "caption", "safe") for flag in ("--set", step + ".max_tokens=24")]


def ask(query, arguments=(), environment=()):
    command = [ecso, "ask", query, "--image", image, "--json", "-q", *limits, *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **dict(environment)})
    text = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, status
    return json.loads(text), usage.ru_maxrss / 1048576


def doctor():
    checks = json.loads(subprocess.run([ecso, "doctor", "--json"], stdout=subprocess.PIPE).stdout)["checks"]
    return next(check["says"] for check in checks if check["check"] == "model")


doctor()
print("warm start:", ", ".join(doctor() for _ in range(3)))
_, peak = ask("What is the list about?")
print("peak memory of one answer: %.2f GiB" % peak)

# With a threshold of 0 every draft counts as unsafe, so that steps 2, 3 and 4 all run.
unsafe = ["--set", "detect.parser=score", "--set", "detect.threshold=0"]
shared, unshared = [], []
for _ in range(5):
    for times, environment in ((shared, {}), (unshared, {"ECSO__ENGINE__NO_REUSE": "true"})):
        outcome, _ = ask("What is the list about?", unsafe, environment)
        steps = {step["step"]: step["ms"] for step in outcome["steps"]}
        times.append([steps["detect"], steps["caption"], steps["safe"]])
for name, times in (("shared prefix", shared), ("from the start", unshared)):
    medians = [statistics.median(column) for column in zip(*times)]
    print("%-15s detect %5.0f ms  caption %5.0f ms  safe %5.0f ms  together %5.0f ms" % (name, *medians, sum(medians)))
