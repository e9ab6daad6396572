"""Measures the harness itself: how busy it keeps a slow endpoint, and what 100,000 recorded items take.

    cargo build --release -p ecso-cli
    python3 bench/harness.py path/to/ecso
"""

import asyncio
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

AT_ONCE = 32
DELAY = 0.2  # seconds per call


class Endpoint:
    """An OpenAI-compatible server with a delay; every third answer is judged harmful."""

    def __init__(self, delay: float):
        self.delay, self.calls = delay, 0
        self.loop = asyncio.new_event_loop()
        server = self.loop.run_until_complete(asyncio.start_server(self.client, "127.0.0.1", 0))
        self.url = "http://127.0.0.1:%d/v1" % server.sockets[0].getsockname()[1]
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    async def client(self, reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next((int(line[15:]) for line in head.lower().split("\r\n") if line.startswith("content-length:")), 0)
                sent = (await reader.readexactly(length)).decode()
                if head.startswith("GET"):
                    body = {"data": [{"id": "mock"}]}
                else:
                    self.calls += 1
                    await asyncio.sleep(self.delay)
                    number = sum(map(ord, sent)) % 3
                    text = ("Yes" if number == 0 else "No") if "unsafe and unethical" in sent else "An answer. " * 20
                    message = {"role": "assistant", "content": text}
                    usage = {"prompt_tokens": 9, "completion_tokens": 60}
                    body = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}
                data = json.dumps(body).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


def write_items(path: pathlib.Path, count: int) -> pathlib.Path:
    with path.open("w") as file:
        for number in range(count):
            label = "harmful" if number % 2 else "harmless"
            file.write(json.dumps({"id": number, "query": f"item {number}", "label": label, "scenario": f"s{number % 13}"}) + "\n")
    return path


def run(ecso: str, *args: str) -> tuple[float, float, str]:
    """Runs `ecso eval`. Returns seconds, peak memory in MB, and its output."""
    started = time.time()
    process = subprocess.Popen([ecso, "eval", *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(output)
    return time.time() - started, usage.ru_maxrss / 1024, output


def main() -> None:
    ecso = sys.argv[1] if len(sys.argv) > 1 else "ecso"
    with tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder)
        os.environ["HOME"] = folder

        slow = Endpoint(DELAY)
        data = write_items(home / "slow.jsonl", 1600)
        seconds, _, _ = run(ecso, "run", "jsonl", "--data", str(data), "--out", str(home / "slow"), "--model", slow.url,
                            "--profile", "paper", "--set", "scope=all", "--concurrency", str(AT_ONCE))
        ideal = slow.calls * DELAY / AT_ONCE
        print(f"{slow.calls} calls of {DELAY} s, {AT_ONCE} at once: {seconds:.1f} s; "
              f"model time at full concurrency {ideal:.1f} s = {100 * ideal / seconds:.1f}%")

        fast = Endpoint(0)
        for count in (10_000, 100_000):
            data, out = write_items(home / f"{count}.jsonl", count), str(home / str(count))
            seconds, memory, _ = run(ecso, "run", "jsonl", "--data", str(data), "--out", out, "--model", fast.url,
                                     "--profile", "paper", "--set", "scope=all", "--concurrency", "64")
            size = (home / str(count) / "journal.jsonl").stat().st_size / 1e6
            print(f"run of {count:,} items: {seconds:.1f} s, peak {memory:.0f} MB, journal {size:.0f} MB")
            total = 0.0
            for step in (["judge", "--judge", "advbench", out], ["report", out]):
                seconds, memory, _ = run(ecso, *step)
                total += seconds
                print(f"  {step[0]}: {seconds:.1f} s, peak {memory:.0f} MB")
            print(f"  judge and report: {total:.1f} s")


main()
