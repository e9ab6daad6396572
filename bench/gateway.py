#!/usr/bin/env python3
"""Measures what a gateway costs: ecso and others, on one machine, in one run.

    cargo build --release -p ecso-cli -p ecso-bench && apt-get install wrk nginx-light
    python3 bench/gateway.py TARGET_DIR [--rounds 7] [--seconds 3] [--peers nginx,smg,litellm,portkey]

The gateway runs on core 0, the mock upstream and the load generator on core 1, with one worker each. The rounds of all gateways are
interleaved; the figures are medians. CPU is that of the gateway's processes. A round counts only if every answer has status 200.
`smg` and `litellm` must be on PATH (PyPI: smg, litellm[proxy]), `portkey` is @portkey-ai/gateway's start-server.js in PORTKEY.
"""
import argparse
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import tempfile
import time
import urllib.request

from mocks import data_url, image_and_text, png

MOCK, FIRST = 9100, 9101
TICKS = os.sysconf("SC_CLK_TCK")


def request_body(kind):
    content = "What is on the list? " + "x" * 900
    if kind != "1 KB":
        side = {"100 KB image": 158, "1 MB image": 500}[kind]
        content = image_and_text(data_url(png(side, os.urandom(3 * side * side))), "What is on the list?")
    return {"model": "mock", "messages": [{"role": "user", "content": content}]}


def wrk_script(folder, kind, body, headers):
    path = folder / f"{kind.replace(' ', '-')}.lua"
    data = folder / f"{kind.replace(' ', '-')}.json"
    data.write_text(json.dumps(body))
    extra = "".join(f'wrk.headers["{name}"] = "{value}"\n' for name, value in headers.items())
    path.write_text(
        f'wrk.method = "POST"\nlocal file = io.open("{data}", "rb")\nwrk.body = file:read("*a")\n'
        f'wrk.headers["Content-Type"] = "application/json"\nwrk.headers["Authorization"] = "Bearer none"\n{extra}'
    )
    return path


def process_tree(pid):
    """The process and all its descendants."""
    pids, parents = [pid], [pid]
    while parents:
        children = []
        for parent in parents:
            for task in pathlib.Path(f"/proc/{parent}/task").glob("*/children"):
                children += [int(child) for child in task.read_text().split()]
        pids += children
        parents = children
    return pids


def cpu_seconds(pid):
    total = 0
    for process in process_tree(pid):
        try:
            fields = pathlib.Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
        except FileNotFoundError:
            pass
    return total / TICKS


def memory_mb(pid):
    total = 0
    for process in process_tree(pid):
        try:
            line = re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{process}/status").read_text())
            total += int(line.group(1)) if line else 0
        except FileNotFoundError:
            pass
    return total / 1024


def start_pinned(core, command, **more):
    return subprocess.Popen(["taskset", "-c", str(core), *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **more)


def wrk(port, connections, seconds, script):
    """Puts load on a gateway. Returns requests, requests per second and the median in ms; None if an answer failed."""
    out = subprocess.run(
        ["taskset", "-c", "1", "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(script),
         f"http://127.0.0.1:{port}/v1/chat/completions"], capture_output=True, text=True, check=True).stdout  # fmt: skip
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)|Socket errors", out)
    requests = int(re.search(r"(\d+) requests in", out).group(1))
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", out).group(1))
    number, unit = re.search(r"50%\s+([\d.]+)(us|ms|s)", out).groups()
    p50 = float(number) * {"us": 0.001, "ms": 1, "s": 1000}[unit]
    return None if bad else (requests, rate, p50)


def gateways(arguments, folder):
    """Name, port and start function of every gateway; the mock has been started already."""
    target = pathlib.Path(arguments.target)
    ecso, upstream = str(target / "ecso"), f"http://127.0.0.1:{MOCK}/v1"
    port = iter(range(FIRST, FIRST + 20))
    plain = {k: v for k, v in os.environ.items() if not k.startswith("ECSO__")} | {"TOKIO_WORKER_THREADS": "1"}

    def ecso_serve(name, **settings):
        at = next(port)
        command = [ecso, "serve", "--upstream", upstream, "--listen", f"127.0.0.1:{at}"]
        return name, at, lambda: start_pinned(0, command, env=plain | settings)

    yield "mock alone", MOCK, None
    yield ecso_serve("ecso")
    yield ecso_serve("ecso, mode off", ECSO__GATEWAY__MODE="off")
    peers = arguments.peers.split(",")
    if "nginx" in peers and shutil.which("nginx"):
        at, conf = next(port), folder / "nginx.conf"
        conf.write_text(f"""daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log /dev/null;
events {{ worker_connections 1024; }}
http {{ access_log off; client_max_body_size 32m; client_body_buffer_size 2m; keepalive_requests 10000000;
client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
upstream mock {{ server 127.0.0.1:{MOCK}; keepalive 64; keepalive_requests 10000000; }}
server {{ listen 127.0.0.1:{at}; location / {{ proxy_pass http://mock; proxy_http_version 1.1; proxy_set_header Connection ""; }} }} }}""")
        yield "nginx", at, lambda: start_pinned(0, ["nginx", "-c", str(conf), "-p", str(folder)])
    if "smg" in peers and shutil.which("smg"):
        at = next(port)
        command = ["smg", "launch", "--host", "127.0.0.1", "--port", str(at), "--backend", "openai", "--worker-urls",
                   f"http://127.0.0.1:{MOCK}", "--prometheus-port", str(next(port)), "--log-level", "error"]  # fmt: skip
        yield "smg", at, lambda: start_pinned(0, command, env=plain)
    if "litellm" in peers and shutil.which("litellm"):
        lite, conf2 = next(port), folder / "litellm.yaml"
        conf2.write_text(f"model_list: [{{model_name: mock, litellm_params: {{model: openai/mock, api_base: '{upstream}', api_key: none}}}}]\n")
        yield "LiteLLM", lite, lambda: start_pinned(0, ["litellm", "--config", str(conf2), "--port", str(lite), "--num_workers", "1"],
                                             env=plain | {"LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"})
    if "portkey" in peers and os.environ.get("PORTKEY"):
        key = next(port)
        yield "Portkey", key, lambda: start_pinned(0, ["node", os.environ["PORTKEY"], "--headless", f"--port={key}"])


def wait_until_ready(port, headers):
    data = json.dumps(request_body("1 KB")).encode()
    for _ in range(600):
        try:
            headers = {"Content-Type": "application/json", "Authorization": "Bearer none"} | headers
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", data, headers)
            with urllib.request.urlopen(request, timeout=5):
                return True
        except OSError:
            time.sleep(0.1)
    return False


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--peers", default="nginx,smg,litellm,portkey")
    arguments = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp())
    mock = start_pinned(1, [str(pathlib.Path(arguments.target) / "upstream"), str(MOCK)])
    running = []
    headers = {"x-portkey-provider": "openai", "x-portkey-custom-host": f"http://127.0.0.1:{MOCK}/v1"}
    try:
        for name, port, start in gateways(arguments, folder):
            process = start() if start else mock
            if not wait_until_ready(port, headers):
                print(f"left out: {name} does not answer")
                process.kill()
                continue
            running.append((name, port, process))
        rows = [("1 KB", 16), ("1 KB", 1), ("1 MB image", 4), ("100 KB image", 4)]
        figures = {}
        for _ in range(arguments.rounds):
            for kind, connections in rows:
                script = wrk_script(folder, kind, request_body(kind), headers)
                for name, port, process in running:
                    before = cpu_seconds(process.pid)
                    load = wrk(port, connections, arguments.seconds, script)
                    cpu = cpu_seconds(process.pid) - before
                    if load is None:
                        figures.setdefault((kind, connections, name), [])
                        continue
                    requests, rate, p50 = load
                    figures.setdefault((kind, connections, name), []).append((rate, p50, 1e6 * cpu / requests, memory_mb(process.pid)))
        for kind, connections in rows:
            print(f"\n{kind}, {connections} at once: requests/s, p50 ms, CPU us per request, memory MB")
            for name, *_ in running:
                rounds = figures[kind, connections, name]
                if not rounds:
                    print(f"  {name:16} failed: answers without status 200")
                    continue
                rate, p50, cpu, memory = (statistics.median(column) for column in zip(*rounds))
                print(f"  {name:16} {rate:10.0f} {p50:8.3f} {cpu:8.0f} {memory:8.0f}")
    finally:
        for _, _, process in running:
            process.terminate()
        mock.terminate()
        shutil.rmtree(folder, ignore_errors=True)


main()
