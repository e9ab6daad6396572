"""Portkey's gateway with the guard as its webhook: portkey.py ECSO START_SERVER IMAGE FOLDER

Real gateway, real guard; the model behind both is one of our own (scripts/gateways.py), so that verdicts are known.
"""
import json
import os
import re
import subprocess
import sys

from gateways import KIND, RUDE, SAFE, Model, base64_source, data_url, free_port, guard, medians, message, model, question, ready, send, told


def main(ecso, server, image, folder):
    picture = open(image, "rb").read()
    upstream = model(picture)
    process, url = guard(ecso, upstream, folder, 'image_hosts = ["127.0.0.1"]')
    port, log = free_port(), f"{folder}/log"
    environment = {**os.environ, "TRUSTED_CUSTOM_HOSTS": "127.0.0.1,localhost"}
    gateway = subprocess.Popen(["node", server, f"--port={port}", "--headless"], env=environment, stdout=open(log, "w"), stderr=subprocess.STDOUT)
    try:
        base = f"http://127.0.0.1:{port}"
        ready(base, "/", gateway, log)
        checked = Gateway(base, picture, upstream, url)
        for name in [name for name in dir(checked) if name.startswith("check_")]:
            getattr(checked, name)()
            print("passed:", name.removeprefix("check_").replace("_", " "), flush=True)
        checked.measure()
    except BaseException:
        print(open(log).read()[-6000:], file=sys.stderr)
        raise
    finally:
        for started in (gateway, process):
            started.terminate()
            started.wait()


class Gateway:
    """What clients of the gateway get."""

    def __init__(self, url, picture, upstream, guard_url):
        self.url, self.upstream, self.guard = url, upstream, guard_url
        self.picture, self.source = data_url(picture), base64_source(picture)

    def config(self, hooks=("before", "after"), url=None, upstream=None, timeout=120000):
        """The configuration of docs/hooks.md."""
        told = re.search(r"```json\n(.*?)```", open("docs/hooks.md").read(), re.S).group(1)
        config = json.loads(told.replace("http://localhost:8000", upstream or self.upstream).replace("120000", str(timeout)).replace("http://localhost:8080", url or self.guard))
        return {name: value for name, value in config.items() if not name.endswith("_hooks") or name.split("_")[0] in hooks}

    def send(self, body, path="/v1/chat/completions", leaks=False, **config):
        config = self.config(**config)
        if path == "/v1/messages":
            config["provider"] = "anthropic"
        status, said = send(self.url, path, body, {"x-portkey-config": json.dumps(config), "authorization": "Bearer none"})
        assert ("Rude" in said) == leaks, (leaks, status, said)
        return status, said

    def check_plain(self):
        for text, says in {"What is it?": SAFE, "Please be rude.": KIND}.items():
            status, said = self.send(question(text, self.picture))
            assert (status, json.loads(said)["choices"][0]["message"]["content"]) == (200, says), said
        status, said = self.send(question("Please be rude.", self.picture), hooks=(), leaks=True)
        assert RUDE in said, (status, said)

    def check_two_answers(self):
        status, said = self.send(question("What is it?", self.picture, n=2))
        assert (status, [choice["message"]["content"] for choice in json.loads(said)["choices"]]) == (200, [SAFE, KIND]), said

    def check_an_image_without_text(self):
        status, said = self.send(question("", self.picture))
        assert (status, json.loads(said)["choices"][0]["message"]["content"]) == (200, SAFE), said

    def check_text_without_an_image(self):
        for stream in (False, True):
            status, said = self.send({"model": "m", "stream": stream, "messages": [{"role": "user", "content": "What is bread?"}]})
            assert status == 200 and SAFE.split()[-1] in said, said

    def check_a_broken_image(self):
        status, said = self.send(question("What is it?", self.picture[:-40]))
        assert status == 446 and "its end is missing" in said, said

    def check_an_image_by_its_url(self):
        Model.seen.clear()
        status, said = self.send(question("What is it?", f"{self.upstream}/list.png"))
        assert status == 200 and SAFE in said, said
        # The model was shown the bytes that were judged.
        assert self.picture[:200] in Model.seen[0], Model.seen[0][:300]
        # Without the hook before, nobody knows what the model saw.
        status, said = self.send(question("What is it?", f"{self.upstream}/list.png"), hooks=("after",))
        assert status == 446 and "image_url_refused" in said, said

    def check_streams(self):
        Model.seen.clear()
        status, said = self.send(question("Please be rude.", self.picture, stream=True))
        assert status == 446 and "stream_not_guarded" in said and not Model.seen, said
        # With the guard between, streams are as for every client.
        status, said = self.send(question("Please be rude.", self.picture, stream=True), hooks=(), upstream=self.guard)
        assert status == 200 and "kind" in said and RUDE.split()[0] not in said, said

    def check_what_portkey_does_not_show(self):
        """What docs/hooks.md says no hook is asked about."""
        content = [{"type": "input_image", "image_url": self.picture, "detail": "auto"}, {"type": "input_text", "text": "Please be rude."}]
        self.send({"model": "m", "input": [{"role": "user", "content": content}]}, "/v1/responses", leaks=True)
        # A request in which something could hide is refused.
        asked = question("Please be rude.", self.picture)["messages"]
        for more in ({"extra_body": {"messages": asked}}, {"documents": [self.picture], "mm": self.picture}):
            status, said = self.send({"model": "m", "messages": [{"role": "user", "content": "Please be rude."}], **more})
            assert status == 446 and "unknown_field" in said, said

    def check_tools(self):
        tool = {"type": "function", "function": {"name": "bake", "parameters": {"type": "object", "properties": {}}}}
        status, said = self.send(question("What is it?", self.picture, tools=[tool]))
        assert status == 200 and json.loads(said)["choices"][0]["message"]["tool_calls"], said
        status, said = self.send(question("Please be rude.", self.picture, tools=[tool]))
        assert (status, json.loads(said)["choices"][0]["message"]) == (200, {"role": "assistant", "content": KIND}), said

    def check_messages(self):
        for text, says in {"What is it?": SAFE, "Please be rude.": KIND}.items():
            status, said = self.send(message(text, self.source), "/v1/messages")
            assert status == 200 and json.loads(said)["content"][0]["text"] == says, said
        url = message("What is it?", {"type": "url", "url": f"{self.upstream}/list.png"})
        status, said = self.send(url, "/v1/messages")
        assert status == 446 and "image_url_refused" in said, said

    def check_our_failures(self):
        status, said = self.send(question("You are a broken judge.", self.picture))
        assert status == 446 and "guard_failed" in said and SAFE not in said, said
        status, said = self.send(question("You are a slow judge.", self.picture), timeout=1000)
        assert status == 446 and "timed out" in said and SAFE not in said, said
        # Nobody there: `failOnError` holds.
        status, said = self.send(question("What is it?", self.picture), url=f"http://127.0.0.1:{free_port()}")
        assert status == 446 and SAFE not in said, said

    def measure(self):
        body = question("What is it?", self.picture)
        told("Portkey", medians({
            "the model alone": lambda: send(self.upstream, "/v1/chat/completions", body),
            "ecso before it": lambda: send(self.guard, "/v1/chat/completions", body),
            "Portkey alone": lambda: self.send(body, hooks=()),
            "Portkey with both hooks": lambda: self.send(body),
            "Portkey with the hook behind": lambda: self.send(body, hooks=("after",)),
        }))


main(*sys.argv[1:])
