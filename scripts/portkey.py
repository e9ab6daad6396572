"""Tests Portkey's gateway with the guard as its webhook: portkey.py ECSO START_SERVER IMAGE FOLDER

Gateway and guard are real; the model behind both is a mock (scripts/gateways.py), so that the verdicts are known.
"""
import json
import os
import re
import subprocess
import sys

from gateways import KIND, RUDE, SAFE, Model, base64_source, data_url, free_port, start_guard, median_times, messages_request, start_model, chat_request, wait_until_ready, send, print_times


def main(ecso, server, image, folder):
    picture = open(image, "rb").read()
    upstream = start_model(picture)
    process, url = start_guard(ecso, upstream, folder, 'image_hosts = ["127.0.0.1"]')
    port, log = free_port(), f"{folder}/log"
    environment = {**os.environ, "TRUSTED_CUSTOM_HOSTS": "127.0.0.1,localhost"}
    gateway = subprocess.Popen(["node", server, f"--port={port}", "--headless"], env=environment, stdout=open(log, "w"), stderr=subprocess.STDOUT)
    try:
        base = f"http://127.0.0.1:{port}"
        wait_until_ready(base, "/", gateway, log)
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
    """Checks what clients of the gateway receive."""

    def __init__(self, url, picture, upstream, guard_url):
        self.url, self.upstream, self.guard = url, upstream, guard_url
        self.picture, self.source = data_url(picture), base64_source(picture)

    def config(self, hooks=("before", "after"), url=None, upstream=None, timeout=120000):
        """The configuration of docs/hooks.md."""
        text = re.search(r"```json\n(.*?)```", open("docs/hooks.md").read(), re.S).group(1)
        config = json.loads(text.replace("http://localhost:8000", upstream or self.upstream).replace("120000", str(timeout)).replace("http://localhost:8080", url or self.guard))
        return {name: value for name, value in config.items() if not name.endswith("_hooks") or name.split("_")[0] in hooks}

    def send(self, body, path="/v1/chat/completions", leaks=False, **config):
        config = self.config(**config)
        if path == "/v1/messages":
            config["provider"] = "anthropic"
        status, reply = send(self.url, path, body, {"x-portkey-config": json.dumps(config), "authorization": "Bearer none"})
        assert ("Rude" in reply) == leaks, (leaks, status, reply)
        return status, reply

    def check_plain(self):
        for text, says in {"What is it?": SAFE, "Please be rude.": KIND}.items():
            status, reply = self.send(chat_request(text, self.picture))
            assert (status, json.loads(reply)["choices"][0]["message"]["content"]) == (200, says), reply
        status, reply = self.send(chat_request("Please be rude.", self.picture), hooks=(), leaks=True)
        assert RUDE in reply, (status, reply)

    def check_two_answers(self):
        status, reply = self.send(chat_request("What is it?", self.picture, n=2))
        assert (status, [choice["message"]["content"] for choice in json.loads(reply)["choices"]]) == (200, [SAFE, KIND]), reply

    def check_an_image_without_text(self):
        status, reply = self.send(chat_request("", self.picture))
        assert (status, json.loads(reply)["choices"][0]["message"]["content"]) == (200, SAFE), reply

    def check_text_without_an_image(self):
        for stream in (False, True):
            status, reply = self.send({"model": "m", "stream": stream, "messages": [{"role": "user", "content": "What is bread?"}]})
            assert status == 200 and SAFE.split()[-1] in reply, reply

    def check_a_broken_image(self):
        status, reply = self.send(chat_request("What is it?", self.picture[:-40]))
        assert status == 446 and "its end is missing" in reply, reply

    def check_an_image_by_its_url(self):
        Model.seen.clear()
        status, reply = self.send(chat_request("What is it?", f"{self.upstream}/list.png"))
        assert status == 200 and SAFE in reply, reply
        # The model received the bytes that were judged.
        assert self.picture[:200] in Model.seen[0], Model.seen[0][:300]
        # Without the first hook it is unknown what the model saw.
        status, reply = self.send(chat_request("What is it?", f"{self.upstream}/list.png"), hooks=("after",))
        assert status == 446 and "image_url_refused" in reply, reply

    def check_streams(self):
        Model.seen.clear()
        status, reply = self.send(chat_request("Please be rude.", self.picture, stream=True))
        assert status == 446 and "stream_not_guarded" in reply and not Model.seen, reply
        # With the guard between gateway and model, streams are guarded as for every client.
        status, reply = self.send(chat_request("Please be rude.", self.picture, stream=True), hooks=(), upstream=self.guard)
        assert status == 200 and "kind" in reply and RUDE.split()[0] not in reply, reply

    def check_what_portkey_does_not_show(self):
        """Confirms what, by docs/hooks.md, no hook is asked about."""
        content = [{"type": "input_image", "image_url": self.picture, "detail": "auto"}, {"type": "input_text", "text": "Please be rude."}]
        self.send({"model": "m", "input": [{"role": "user", "content": content}]}, "/v1/responses", leaks=True)
        # Requests that could hide something are refused.
        asked = chat_request("Please be rude.", self.picture)["messages"]
        for more in ({"extra_body": {"messages": asked}}, {"documents": [self.picture], "mm": self.picture}):
            status, reply = self.send({"model": "m", "messages": [{"role": "user", "content": "Please be rude."}], **more})
            assert status == 446 and "unknown_field" in reply, reply

    def check_tools(self):
        tool = {"type": "function", "function": {"name": "bake", "parameters": {"type": "object", "properties": {}}}}
        status, reply = self.send(chat_request("What is it?", self.picture, tools=[tool]))
        assert status == 200 and json.loads(reply)["choices"][0]["message"]["tool_calls"], reply
        status, reply = self.send(chat_request("Please be rude.", self.picture, tools=[tool]))
        assert (status, json.loads(reply)["choices"][0]["message"]) == (200, {"role": "assistant", "content": KIND}), reply

    def check_messages(self):
        for text, says in {"What is it?": SAFE, "Please be rude.": KIND}.items():
            status, reply = self.send(messages_request(text, self.source), "/v1/messages")
            assert status == 200 and json.loads(reply)["content"][0]["text"] == says, reply
        url = messages_request("What is it?", {"type": "url", "url": f"{self.upstream}/list.png"})
        status, reply = self.send(url, "/v1/messages")
        assert status == 446 and "image_url_refused" in reply, reply

    def check_our_failures(self):
        status, reply = self.send(chat_request("You are a broken judge.", self.picture))
        assert status == 446 and "guard_failed" in reply and SAFE not in reply, reply
        status, reply = self.send(chat_request("You are a slow judge.", self.picture), timeout=1000)
        assert status == 446 and "timed out" in reply and SAFE not in reply, reply
        # The guard is unreachable: `failOnError` blocks the answer.
        status, reply = self.send(chat_request("What is it?", self.picture), url=f"http://127.0.0.1:{free_port()}")
        assert status == 446 and SAFE not in reply, reply

    def measure(self):
        body = chat_request("What is it?", self.picture)
        print_times("Portkey", median_times({
            "the model alone": lambda: send(self.upstream, "/v1/chat/completions", body),
            "ecso before it": lambda: send(self.guard, "/v1/chat/completions", body),
            "Portkey alone": lambda: self.send(body, hooks=()),
            "Portkey with both hooks": lambda: self.send(body),
            "Portkey with the hook behind": lambda: self.send(body, hooks=("after",)),
        }))


main(*sys.argv[1:])
