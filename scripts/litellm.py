"""Tests LiteLLM's proxy with the guard as its guardrail: litellm.py ECSO LITELLM IMAGE FOLDER

Proxy and guard are real; the model behind both is a mock (scripts/gateways.py), so that the verdicts are known.
"""
import json
import os
import re
import subprocess
import sys
import threading

from gateways import KIND, RUDE, SAFE, Model, base64_source, data_url, free_port, start_guard, median_times, messages_request, start_model, chat_request, wait_until_ready, send, print_times

KEY = "sk-" + "k" * 40


def config(upstream, guards):
    """The configuration of docs/litellm.md with more guardrails."""
    page = open("docs/litellm.md").read()
    yaml = re.search(r"```yaml\n(.*?)```", page, re.S).group(1)
    yaml = yaml.replace("http://localhost:8000", upstream).replace("http://localhost:8080", guards["guard"]).replace("default_on: true", "default_on: false")
    more = "".join(
        f"  - guardrail_name: {name}\n    litellm_params: {{guardrail: generic_guardrail_api, mode: [pre_call, post_call], "
        f"api_base: \"{url}\", api_key: os.environ/ECSO_KEY{'' if name == 'pieces' else ', streaming_transform_mode: incremental_diff, streaming_end_of_stream_only: true'}{', timeout: 1' if name == 'hurried' else ''}}}\n"
        for name, url in guards.items() if name != "guard")
    between = f"  - model_name: between\n    litellm_params: {{model: openai/m, api_base: \"{guards['guard']}/v1\", api_key: none}}\n"
    return yaml.replace("guardrails:\n", between + "guardrails:\n" + more)


def main(ecso, litellm, image, folder):
    picture = open(image, "rb").read()
    upstream = start_model(picture)
    process, url = start_guard(ecso, upstream, folder, 'image_hosts = ["127.0.0.1"]')
    judging, judging_url = start_guard(ecso, upstream, folder, 'unseen = "judge"')
    port = free_port()
    path = f"{folder}/config.yaml"
    dead = f"http://127.0.0.1:{free_port()}"
    with open(path, "w") as file:
        file.write(config(upstream, {"guard": url, "pieces": url, "hurried": url, "judging": judging_url, "dead": dead}))
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": KEY, "ECSO_KEY": "none", "MODEL_KEY": "none"}
    log = f"{folder}/log"
    proxy = subprocess.Popen([litellm, "--config", path, "--host", "127.0.0.1", "--port", str(port)], env=environment,
                             stdout=open(log, "w"), stderr=subprocess.STDOUT)
    try:
        base = f"http://127.0.0.1:{port}"
        wait_until_ready(base, "/health/liveliness", proxy, log)
        checked = Proxy(base, picture, upstream)
        for name in [name for name in dir(checked) if name.startswith("check_")]:
            getattr(checked, name)()
            print("passed:", name.removeprefix("check_").replace("_", " "), flush=True)
        checked.measure(url)
    except BaseException:
        print(open(log).read()[-6000:], file=sys.stderr)
        raise
    finally:
        for started in (proxy, process, judging):
            started.terminate()
            started.wait()


class Proxy:
    """Checks what clients of the proxy receive."""

    def __init__(self, url, picture, upstream):
        self.url, self.upstream = url, upstream
        self.picture, self.source = data_url(picture), base64_source(picture)

    def send(self, body, path="/v1/chat/completions", guards=("guard",), leaks=False, **headers):
        """Returns status and body. Checks that rude words come through only if `leaks` is set."""
        body = {**body, "guardrails": list(guards)}
        status, reply = send(self.url, path, body, {"authorization": f"Bearer {KEY}", **headers})
        assert ("Rude" in reply) == leaks, (leaks, reply)
        return status, reply

    def chat(self, text, image=None, **more):
        how = {name: more.pop(name) for name in ("guards", "leaks") if name in more} | more.pop("headers", {})
        return self.send(chat_request(text, image or self.picture, **more), **how)

    @staticmethod
    def content(reply):
        return [choice["message"]["content"] for choice in json.loads(reply)["choices"]]

    @staticmethod
    def streamed(reply):
        chunks = [json.loads(line[6:]) for line in reply.splitlines() if line.startswith("data: {")]
        assert not any("error" in chunk for chunk in chunks), reply
        return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])

    def check_plain(self):
        status, reply = self.chat("What is it?")
        assert (status, self.content(reply)) == (200, [SAFE]), reply
        status, reply = self.chat("Please be rude.")
        assert (status, self.content(reply)) == (200, [KIND]), reply
        # Without the guard the rude words come through.
        assert RUDE in self.chat("Please be rude.", guards=(), leaks=True)[1]

    def check_two_answers(self):
        status, reply = self.chat("What is it?", n=2)
        assert (status, self.content(reply)) == (200, [SAFE, KIND]), reply

    def check_text_without_an_image(self):
        body = {"model": "m", "messages": [{"role": "user", "content": "What is bread?"}]}
        status, reply = self.send(body)
        assert (status, self.content(reply)) == (200, [SAFE]), reply

    def check_an_image_without_text(self):
        for path, body in {
            "/v1/chat/completions": chat_request("", self.picture),
            "/v1/responses": {"model": "m", "input": [{"role": "user", "content": [{"type": "input_image", "image_url": self.picture, "detail": "auto"}]}]},
            "/v1/messages": messages_request("", self.source),
        }.items():
            status, reply = self.send(body, path)
            assert status == 400 and "has not seen this request" in reply, (path, status, reply)
            status, reply = self.send(body, path, guards=("judging",))
            assert status == 200 and SAFE in reply, (path, status, reply)

    def check_a_broken_image(self):
        status, reply = self.chat("What is it?", image=self.picture[:-40])
        assert status == 400 and "its end is missing" in reply, reply

    def check_an_image_by_its_url(self):
        url = f"{self.upstream}/list.png"
        for path, body in {
            "/v1/chat/completions": chat_request("What is it?", url),
            "/v1/responses": {"model": "m", "input": [{"role": "user", "content": [
                {"type": "input_image", "image_url": url, "detail": "auto"}, {"type": "input_text", "text": "What is it?"}]}]},
            "/v1/messages": messages_request("What is it?", {"type": "url", "url": url}),
        }.items():
            Model.seen.clear()
            status, reply = self.send(body, path)
            assert status == 200 and SAFE in reply, (path, reply)
            # The model received the bytes that were judged.
            assert self.picture[:200] in Model.seen[0] and url not in Model.seen[0], (path, Model.seen[0][:300])
        status, reply = self.chat("What is it?", image="http://10.255.255.1/x.png")
        assert status == 400 and "not public" in reply, reply

    def check_responses_and_messages(self):
        for text, says in {"What is it?": SAFE, "Please be rude.": KIND}.items():
            content = [{"type": "input_image", "image_url": self.picture, "detail": "auto"}, {"type": "input_text", "text": text}]
            status, reply = self.send({"model": "m", "input": [{"role": "user", "content": content}]}, "/v1/responses")
            assert status == 200 and json.loads(reply)["output"][0]["content"][0]["text"] == says, reply
            status, reply = self.send(messages_request(text, self.source), "/v1/messages")
            assert status == 200 and json.loads(reply)["content"][0]["text"] == says, reply

    def check_streams(self):
        for text, says in {"What is it?": SAFE, "Please be rude.": KIND}.items():
            status, reply = self.chat(text, stream=True)
            assert status == 200 and self.streamed(reply).strip() == says, reply
        # It is blocked before the first word, so the status is right.
        status, reply = self.chat("", stream=True)
        assert status == 400 and "has not seen this request" in reply, (status, reply)

    def check_what_litellm_sends_before_the_guard_answers(self):
        """Confirms what, by docs/litellm.md, a guardrail can't hold back."""
        # Streams without the two settings are cut off, but too late.
        status, reply = self.chat("Please be rude.", stream=True, guards=("pieces",), leaks=True)
        assert "error" in reply and "arrives in parts" in reply, reply
        # Streams of other routes.
        content = [{"type": "input_image", "image_url": self.picture, "detail": "auto"}, {"type": "input_text", "text": "Please be rude."}]
        self.send({"model": "m", "stream": True, "input": [{"role": "user", "content": content}]}, "/v1/responses", leaks=True)
        self.send({**messages_request("Please be rude.", self.source), "stream": True}, "/v1/messages", leaks=True)
        # Tool calls in a stream.
        tool = {"type": "function", "function": {"name": "bake", "parameters": {"type": "object", "properties": {}}}}
        self.chat("Please be rude.", stream=True, tools=[tool], leaks=True)
        # Reasoning.
        self.chat("Please think rudely.", leaks=True)

    def check_what_litellm_does_not_show(self):
        """Confirms that some images reach the model unguarded: the guard receives only a text."""
        asked = chat_request("Please be rude.", self.picture)["messages"]
        text = {"model": "m", "messages": [{"role": "user", "content": "Please be rude."}]}
        self.send({**text, "extra_body": {"messages": asked}}, leaks=True)
        self.send({"model": "m", "messages": [{**text["messages"][0], "image": self.picture}]}, leaks=True)
        item = {"type": "image_generation_call", "id": "i", "status": "completed", "result": self.source["data"]}
        for more in ({"input": [*text["messages"], item]}, {"input": "Please be rude.", "previous_response_id": "resp_1"}):
            self.send({"model": "m", **more}, "/v1/responses", leaks=True)
        # Requests that visibly hide something are blocked.
        for part in ({"type": "input_file", "file_data": self.picture, "filename": "list.pdf"}, {"type": "input_image", "file_id": "file-1"}):
            content = [part, {"type": "input_text", "text": "Please be rude."}]
            status, reply = self.send({"model": "m", "input": [{"role": "user", "content": content}]}, "/v1/responses")
            assert status == 400, reply
        shot = {"type": "computer_call_output", "call_id": "c", "output": {"type": "computer_screenshot", "image_url": self.picture}}
        call = {"type": "computer_call", "call_id": "c", "id": "x", "status": "completed", "action": {"type": "screenshot"}, "pending_safety_checks": []}
        status, reply = self.send({"model": "m", "input": [*text["messages"], call, shot]}, "/v1/responses")
        assert status == 400 and "image in its text" in reply, reply

    def check_tools(self):
        tool = {"type": "function", "function": {"name": "bake", "parameters": {"type": "object", "properties": {}}}}
        status, reply = self.chat("What is it?", tools=[tool])
        assert status == 200 and json.loads(reply)["choices"][0]["message"]["tool_calls"], reply
        status, reply = self.chat("Please be rude.", tools=[tool])
        assert status == 400 and "harmful" in reply, reply

    def check_our_failures(self):
        status, reply = self.chat("You are a broken judge.")
        assert status == 500 and "Generic Guardrail API failed" in reply and SAFE not in reply, (status, reply)
        status, reply = self.chat("You are a slow judge.", guards=("hurried",))
        assert status == 500 and SAFE not in reply, (status, reply)
        status, reply = self.chat("What is it?", guards=("dead",))
        assert status == 500 and SAFE not in reply, (status, reply)

    def check_an_id_that_the_client_chose(self):
        status, reply = self.chat("What is it?", headers={"x-litellm-call-id": "mine"})
        assert status == 400 and "x-litellm-call-id is not accepted" in reply, reply
        # A harmless request waits while another one, whose picture is not judged, takes over its id.
        reply = {}

        def ask(name, body):
            reply[name] = self.send(body, **{"x-litellm-call-id": "ours"})

        threads = [threading.Thread(target=ask, args=pair) for pair in {
            "slow": chat_request("take your time", self.picture), "unseen": chat_request("", self.picture)}.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {status for status, _ in reply.values()} == {400}, reply
        # In the body it does not count as an id.
        status, text = self.send({**chat_request("", self.picture), "litellm_call_id": "mine", "metadata": {"litellm_call_id": "mine"}})
        assert status == 400 and "has not seen this request" in text, text

    def check_the_guard_between(self):
        """The first setup of docs/litellm.md holds back what the second can't."""
        content = [{"type": "input_image", "image_url": self.picture, "detail": "auto"}, {"type": "input_text", "text": "Please be rude."}]
        tool = {"type": "function", "function": {"name": "bake", "parameters": {"type": "object", "properties": {}}}}
        asked = chat_request("Please be rude.", self.picture)
        for path, body in [
            ("/v1/chat/completions", {**asked, "tools": [tool]}),
            ("/v1/chat/completions", chat_request("Please think rudely.", self.picture)),
            ("/v1/responses", {"input": [{"role": "user", "content": content}]}),
            ("/v1/messages", messages_request("Please be rude.", self.source)),
        ]:
            for stream in (False, True):
                status, reply = self.send({**body, "model": "between", "stream": stream}, path, guards=())
                assert status == 200 and KIND.split()[-1] in reply, (path, stream, reply)
        status, reply = self.send({**chat_request("", self.picture), "model": "between"}, guards=())
        assert (status, self.content(reply)) == (200, [SAFE]), reply

    def check_many_at_once(self):
        reply = {}

        def ask(number):
            reply[number] = self.chat(f"{number}: Please be rude." if number % 2 else f"{number}: What is it?")

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, (status, text) in reply.items():
            assert (status, self.content(text)) == (200, [KIND if number % 2 else SAFE]), (number, text)

    def measure(self, guard_url):
        body = chat_request("What is it?", self.picture)
        print_times("LiteLLM", median_times({
            "the model alone": lambda: send(self.upstream, "/v1/chat/completions", body),
            "ecso before it": lambda: send(guard_url, "/v1/chat/completions", body),
            "LiteLLM alone": lambda: self.send(body, guards=()),
            "LiteLLM with the hook": lambda: self.send(body),
        }))


main(*sys.argv[1:])
