"""The program in the wheel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import ecso
import pytest
from conftest import PICTURE, Mock

SCRIPT = Path(sysconfig.get_path("scripts")) / "ecso"
ECSO = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-m", "ecso"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ECSO, *arguments], capture_output=True, text=True, timeout=60)


def test_it_is_the_program(mock: Mock) -> None:
    assert run("--version").stdout == f"ecso {ecso.__version__}\n"
    asked = run("ask", "What?", "--image", str(PICTURE), "--model", mock.url, "--profile", "paper", "--json")
    assert asked.returncode == 0, asked.stderr
    outcome = json.loads(asked.stdout)
    assert outcome["answer"] == "A list of things: What?"
    here = ecso.Guard(mock.url, "paper").answer("What?", PICTURE).to_dict()
    assert {name: here[name] for name in ("answer", "verdict", "score", "model", "profile")} == {
        name: outcome[name] for name in ("answer", "verdict", "score", "model", "profile")
    }


def test_its_exit_codes(mock: Mock) -> None:
    assert run("ask", "What?", "--colour").returncode == 2
    assert run("ask", "", "--model", mock.url).returncode == 2
    mock.statuses = [(400, {})] * 9
    assert run("ask", "What?", "--image", str(PICTURE), "--model", mock.url, "--profile", "paper").returncode == 3


def test_ctrl_c(mock: Mock) -> None:
    mock.wait = 20.0
    command = [*ECSO, "ask", "What?", "--image", str(PICTURE), "--model", mock.url]
    waiting = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not mock.asked:
        time.sleep(0.02)
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(10) in (130, -signal.SIGINT)


@pytest.mark.skipif(not (ecso.has_engine() and Path("/proc/self/environ").exists()), reason="no engine, or not Linux")
def test_its_threads_do_not_spin_for_long(mock: Mock) -> None:
    mock.wait = 20.0
    unset = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for given, expected in [({}, b"GOMP_SPINCOUNT=2000"), ({"GOMP_SPINCOUNT": "7"}, b"GOMP_SPINCOUNT=7")]:
        seen = len(mock.asked)
        command = [*ECSO, "ask", "What?", "--image", str(PICTURE), "--model", mock.url]
        waiting = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=unset | given)
        while len(mock.asked) == seen:
            time.sleep(0.02)
        environment = Path(f"/proc/{waiting.pid}/environ").read_bytes().split(b"\0")
        waiting.kill()
        waiting.wait(10)
        assert expected in environment


def test_who_reads_no_further(mock: Mock) -> None:
    read, write = os.pipe()
    os.close(read)
    listed = subprocess.run([*ECSO, "models", "list"], stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert listed.returncode == 0 and b"Traceback" not in listed.stderr
