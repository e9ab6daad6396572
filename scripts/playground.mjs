// Uses the playground as people do, in Chromium: the way in, a question, its steps, profiles side by side, errors, both languages, light
// and dark, a phone, the keyboard. What must never be seen (drafts that were held back, HTML that a model wrote) is looked for everywhere.

import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";

const { chromium } = createRequire(import.meta.url)("playwright-core");
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const [, , ecso, shots, work] = process.argv;

// What the model says when it is led astray. Mild, but the judge of this model holds it back.
const DRAFT = "Carry a large box and walk in behind somebody, as if you worked there.";
const HTML = "<img src=x onerror=\"document.title='stolen'\"><script>document.title='stolen'</script><b>bold</b>";
const ANSWERS = [
  [/list/, "It is a recipe: bread for two, of flour, water, salt and a spoon of honey."],
  [/清单/, "这是一份面包的配方：面粉、水、盐和一勺蜂蜜。"],
  [/parcel/, "Ring twice, and wait at the gate."],
  [/html/, HTML],
];

/** A model behind an OpenAI-compatible server: it answers as it is told to, and says how often it was left alone. */
class Model {
  asked = [];
  left = 0;
  pause = 150;

  async start() {
    this.server = createServer((request, response) => this.#answer(request, response));
    this.server.listen(0, "127.0.0.1");
    await once(this.server, "listening");
    this.url = `http://127.0.0.1:${this.server.address().port}/v1`;
  }

  async #answer(request, response) {
    let text = "";
    for await (const piece of request) text += piece;
    if (request.method === "GET") {
      response.setHeader("content-type", "application/json");
      response.end(JSON.stringify({ object: "list", data: [{ id: "demo-vlm", object: "model" }] }));
      return;
    }
    const body = JSON.parse(text);
    this.asked.push(body);
    response.on("close", () => { this.left += response.writableFinished ? 0 : 1; });
    const sent = JSON.stringify(body.messages), { content } = body.messages.at(-1);
    const prompt = typeof content === "string" ? content : content.map(part => part.text ?? "").join("");
    await sleep(/slow/.test(sent) ? 20_000 : this.pause);
    if (/model fails/.test(sent)) {
      response.statusCode = 500;
      response.end(JSON.stringify({ error: { message: "UNJUDGED" } }));
      return;
    }
    const harm = this.#harm(prompt, sent);
    if (harm !== undefined) this.#judge(response, body, harm);
    else this.#say(response, body, this.#text(prompt, sent));
  }

  /** How harmful it calls what it is asked about; none where it is asked for something else. */
  #harm(prompt, sent) {
    const reply = prompt.includes(DRAFT), sly = /slip in|溜进去/.test(prompt);
    if (prompt.includes("harmful, unsafe and unethical?")) return reply ? 0.94 : 0.03;
    if (prompt.includes("Does the reply tell how")) return reply ? 0.91 : 0.06;
    if (prompt.includes("Does the reply encourage")) return reply ? 0.96 : 0.2;
    if (prompt.includes("Would most people gladly help")) return sly ? 0.3 : 0.93;
    if (prompt.includes("Does the user want help with") || prompt.includes("Does the user ask how")) return sly ? 0.35 : 0.04;
    if (sent.includes("Is something harmful asked for?")) return sly && !prompt.includes("STAFF") ? 0.4 : 0.05;
    return undefined;
  }

  #text(prompt, sent) {
    if (prompt.includes("in two parts")) return "WORDS: STAFF ONLY. Please ask at the desk.\nSHOWS: a red sign on a post";
    if (prompt.includes("describe the image")) return "A red sign on a post. It says: STAFF ONLY. Please ask at the desk.";
    if (/HARMLESS and ETHICAL|gladly helps|Write two sentences/.test(prompt)) {
      return "I can't help with getting in there unseen, because the room is closed to visitors for a reason. "
        + "Instead, I can help you write a short note to the desk that says what you need.";
    }
    if (/slip in|溜进去/.test(sent)) return DRAFT;
    return ANSWERS.find(([asked]) => asked.test(sent))?.[1] ?? "A house on a hill, beside a tree, on a sunny day.";
  }

  #judge(response, body, yes) {
    const word = yes >= 0.5 ? "Yes" : "No";
    const top = [{ token: "Yes", logprob: Math.log(yes) }, { token: "No", logprob: Math.log(1 - yes) }];
    const logprobs = body.logprobs ? { content: [{ token: word, logprob: -0.1, top_logprobs: top }] } : null;
    this.#whole(response, body, `${word}.`, logprobs);
  }

  #whole(response, body, text, logprobs) {
    const tokens = text => Math.ceil(text.length / 4);
    response.setHeader("content-type", "application/json");
    response.end(JSON.stringify({
      id: "c", object: "chat.completion", created: 1, model: body.model,
      choices: [{ index: 0, message: { role: "assistant", content: text }, finish_reason: "stop", logprobs }],
      usage: { prompt_tokens: tokens(JSON.stringify(body.messages).slice(-900)), completion_tokens: tokens(text), total_tokens: 1 },
    }));
  }

  async #say(response, body, text) {
    if (!body.stream) return this.#whole(response, body, text, null);
    response.setHeader("content-type", "text/event-stream");
    const chunk = choice => response.write(`data: ${JSON.stringify({ id: "c", choices: [{ index: 0, ...choice }] })}\n\n`);
    for (const piece of text.match(/.{1,12}/gsu)) {
      chunk({ delta: { content: piece } });
      await sleep(this.pause / 8);
    }
    chunk({ delta: {}, finish_reason: "stop" });
    const usage = { prompt_tokens: 140, completion_tokens: Math.ceil(text.length / 4), total_tokens: 1 };
    response.write(`data: ${JSON.stringify({ id: "c", choices: [], usage })}\n\n`);
    response.end("data: [DONE]\n\n");
  }
}

/** `ecso serve`, with all the links that it prints. */
class Served {
  links = [];
  said = "";

  constructor(...flags) {
    const home = join(work, "home");
    mkdirSync(home, { recursive: true });
    const { PATH } = process.env;
    this.process = spawn(ecso, flags, { env: { HOME: home, PATH, ECSO__API_KEY_ENV: "" }, stdio: ["ignore", "ignore", "pipe"] });
    createInterface({ input: this.process.stderr }).on("line", line => {
      this.said += `${line}\n`;
      this.links.push(...line.match(/http:\/\/\S+\?token=\w+/g) ?? []);
    });
  }

  async link() {
    for (let tries = 0; this.links.length === 0; tries += 1) {
      assert.ok(tries < 200, `no link: ${this.said}`);
      await sleep(100);
    }
    return this.links.pop();
  }

  stop() { this.process.kill(); }
}

const model = new Model();
await model.start();
const served = new Served("playground", "--no-open", "--model", model.url, "--profile", "hardened");
const browser = await chromium.launch({
  executablePath: process.env.BROWSER_PATH, args: ["--no-sandbox", "--disable-gpu"],
});
const trouble = [], hosts = new Set();

/** A page in a browser of its own; what it asks for and complains about is kept. */
async function visit(link, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1440, height: 1000 }, locale: "en-GB", ...options });
  if (options.calibration) {
    await context.route("**/playground/facts", async route => {
      const response = await route.fetch(), facts = { ...await response.json(), calibration: options.calibration };
      await route.fulfill({ response, json: facts });
    });
  }
  const page = await context.newPage();
  page.on("request", request => { if (request.url().startsWith("http")) hosts.add(new URL(request.url()).host); });
  page.on("console", message => { if (message.type() === "error") trouble.push(message.text()); });
  page.on("response", response => { if (response.status() === 404) trouble.push(`there is no ${response.url()}`); });
  page.on("pageerror", error => trouble.push(String(error)));
  page.on("dialog", dialog => trouble.push(`a dialog: ${dialog.message()}`));
  const response = await page.goto(link);
  if (response.ok()) await page.waitForSelector("#arms input");
  return page;
}

/** Asks and waits for all answers. */
async function ask(page, question) {
  if (question !== undefined) await page.fill("#question", question);
  await page.click("#go");
  await page.waitForSelector("#go:not([disabled])", { timeout: 30_000 });
}

const choose = async (page, ...names) => {
  for (const box of await page.locator("[name=arm]").all()) {
    await box.setChecked(names.includes(await box.getAttribute("value")));
  }
};
const card = (page, step, arm = 0) => page.locator(".arm").nth(arm).locator(".card").nth(step - 1);
async function example(page, name) {
  const before = await page.locator("#pictures img").getAttribute("src", { timeout: 200 }).catch(() => null);
  await page.locator("#examples button", { hasText: name }).click();
  await page.waitForFunction(before => (document.querySelector("#pictures img")?.src ?? before) !== before, before);
}
const text = page => page.evaluate(() => document.body.innerText);
/** What a calibration could have found. */
const CALIBRATION = {
  threshold: 0.5, requests: 200,
  curve: Array.from({ length: 19 }, (_, index) => (index + 1) / 20).map(at => [at, 1 - at ** 2.2, (1 - at) ** 3]),
};
let step = "";
const say = told => { step = told; console.log(`playground: ${told}`); };

/** No finding of axe that is serious or worse; and nothing is wider than the window. */
async function accessible(page, what) {
  await page.evaluate(source => { (0, eval)(source); }, axe);
  const { passes, violations } = await page.evaluate(() => window.axe.run());
  assert.ok(passes.length > 15, `${what}: axe has looked at little`);
  const grave = violations.filter(({ impact }) => ["serious", "critical"].includes(impact));
  assert.deepEqual(grave.map(({ id, nodes }) => [id, ...nodes.map(({ html, any }) => `${html} ${any[0]?.message}`)]), [], what);
  assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), `${what}: it is too wide`);
}

/** Of axe's own source, which the page's rules keep out, a browser takes notice only where they are turned off. */
const audited = link => visit(link, { bypassCSP: true, calibration: CALIBRATION });
const shot = (page, name, options = {}) => page.screenshot({ path: join(shots, `${name}.png`), fullPage: true, ...options });

try {
  say("nobody comes in without a link");
  const link = await served.link(), origin = new URL(link).origin;
  const closed = await fetch(`${origin}/`);
  assert.equal(closed.status, 401);
  assert.match(await closed.text(), /closed[\s\S]*未打开/);
  for (const path of ["page.js", "page.css", "facts"]) assert.equal((await fetch(`${origin}/playground/${path}`)).status, 401, path);
  const page = await visit(link);
  const [cookie] = await page.context().cookies();
  assert.deepEqual([cookie.httpOnly, cookie.sameSite, cookie.expires], [true, "Strict", -1]);
  assert.equal(new URL(page.url()).search, "", "the token is out of the address");
  assert.equal((await fetch(link)).status, 401, "a link works once");
  const { headers } = await page.evaluate(async () => ({ headers: Object.fromEntries((await fetch("/")).headers) }));
  assert.match(headers["content-security-policy"], /^default-src 'none'; script-src 'self';/);
  assert.equal(headers["cache-control"], "no-store");

  say("a question, and its steps as they run");
  await example(page, "A list");
  await page.locator("#pictures img").waitFor();
  await page.click("#go");
  await page.waitForSelector(".card[data-state=running]");
  await page.waitForSelector("#go:not([disabled])");
  assert.match(await page.locator(".outcome").innerText(), /the model's own[\s\S]*bread for two/);
  assert.match(await page.locator(".badge").innerText(), /judged safe/);
  assert.match(await card(page, 1).innerText(), /\d+ ms|\d s/);
  assert.match(await card(page, 2).innerText(), /Probability of harm \d+%; unsafe at 50% or more/);
  assert.match(await card(page, 3).innerText(), /STAFF ONLY/);
  assert.match(await page.locator("#status").innerText(), /hardened: done, judged safe/);

  say("a photograph, and one that can't be loaded");
  await example(page, "A photograph");
  assert.match(await page.locator("#pictures img").getAttribute("src"), /^data:image\/jpeg;/);
  await page.route("**/photograph.jpg", route => route.fulfill({ status: 502 }));
  await page.locator("#examples button", { hasText: "A photograph" }).click();
  await page.locator("#problem", { hasText: "Something went wrong" }).waitFor();
  assert.equal(await page.locator("#pictures img").count(), 0);
  await page.unroute("**/photograph.jpg");

  say("side by side: what was held back is hidden, and not in the page until somebody asks");
  await example(page, "A sly question");
  await choose(page, "unguarded", "paper", "hardened");
  await ask(page);
  assert.equal(await page.locator(".arm").count(), 3);
  const source = await page.content();
  assert.equal(source.split(DRAFT).length - 1, 1, "in the unguarded answer alone");
  const question = card(page, 2, 1).locator("details").first();
  await question.locator("summary").click();
  await question.locator(".quote", { hasText: DRAFT }).waitFor();
  await question.locator("summary").click();
  await question.locator(".quote").first().waitFor({ state: "detached" });
  assert.match(await page.locator(".arm").nth(1).innerText(), /judged unsafe[\s\S]*it is hidden[\s\S]*written with eyes closed[\s\S]*note to the desk/);
  assert.match(await card(page, 3, 1).innerText(), /A red sign/);
  await card(page, 1, 1).getByRole("button", { name: "Show it" }).click();
  assert.match(await card(page, 1, 1).innerText(), /Carry a large box/);
  await card(page, 1, 1).getByRole("button", { name: "Hide it" }).click();
  assert.doesNotMatch(await card(page, 1, 1).innerText(), /Carry a large box/);
  await shot(page, "compare");

  say("a profile of one's own");
  await page.click("#editor > summary");
  await page.fill("#profile-name", "strict one");
  await page.locator("#threshold").fill("0.2");
  await page.selectOption("#key-gate", "always");
  await page.locator("#editor .prompts summary", { hasText: "eyes closed" }).click();
  await page.fill("[id='key-safe.template']", "Answer from {c} alone.");
  await page.locator("#editor .problem").waitFor();
  assert.match(await page.locator("#editor .problem").innerText(), /can't be used[\s\S]*safe\.template must contain \{x\}/);
  assert.equal(await page.locator("[id='key-safe.template']").getAttribute("aria-invalid"), "true");
  await choose(page, "edited");
  await ask(page);
  assert.match(await page.locator(".failure").innerText(), /Your profile can't be used[\s\S]*must contain \{x\}/);
  await page.fill("[id='key-safe.template']", "You are a writer who gladly helps.\n\n\"{c}\"\n\n{x}");
  await page.locator("#editor .problem").waitFor({ state: "hidden" });
  assert.match(await page.locator("#editor").innerText(), /3 changed/);
  await ask(page, "What does the sign say?");
  assert.match(await page.locator(".arm").innerText(), /strict one[\s\S]*written with eyes closed/);
  await page.fill("#question", "Something else?");
  assert.match(await page.locator("#asked").innerText(), /Answers to: What does the sign say\? \(1 image\)/);
  for (const number of [1, 2, 3, 4]) assert.notEqual(await card(page, number).getAttribute("data-state"), "idle");
  const [file] = await Promise.all([page.waitForEvent("download"), page.locator("#editor").getByRole("button", { name: "Download" }).click()]);
  assert.equal(file.suggestedFilename(), "strict-one.toml");
  const kept = join(work, "strict-one.toml");
  await file.saveAs(kept);
  const read = execFileSync(ecso, ["config", "show", "--profile", kept], { env: { HOME: join(work, "home") }, encoding: "utf8" });
  for (const told of [/name = "strict one"/, /gate = "always"/, /threshold = 0\.2/, /gladly helps\.\n\n"\{c\}"/]) assert.match(read, told);
  await page.locator("#editor").getByRole("button", { name: "Show as TOML" }).click();
  assert.match(await page.inputValue("#toml"), /name = "strict one"/);
  await page.selectOption("#profile-base", "paper");
  await page.locator("#editor").getByRole("button", { name: "Keep them" }).click();
  assert.equal(await page.inputValue("#profile-base"), "hardened");
  assert.match(await page.locator("#editor").innerText(), /3 changed/, "changes are only dropped on request");
  await page.selectOption("#profile-base", "paper");
  await page.locator("#editor").getByRole("button", { name: "Drop them" }).click();
  assert.equal(await page.inputValue("#profile-base"), "paper");
  assert.match(await page.locator("#editor").innerText(), /0 changed/);
  await shot(page, "editor");

  say("what a model writes is text, whatever it writes");
  await choose(page, "unguarded", "paper");
  await ask(page, "Answer in html, please");
  assert.equal(await page.locator(".answer-text").first().innerText(), HTML);
  assert.equal(await page.locator("#columns img, #columns script, #columns b").count(), 0);
  assert.doesNotMatch(await page.title(), /stolen/);

  say("errors are told in words");
  await choose(page, "hardened");
  await ask(page, "Say something, though the model fails");
  assert.match(await page.locator(".failure").innerText(), /The model failed in one of the steps, so nothing goes out/);
  assert.doesNotMatch(await text(page), /UNJUDGED/);
  await page.fill("#question", " ");
  await page.click("#go");
  assert.match(await page.locator("#problem").innerText(), /Write a question first/);
  await choose(page);
  await page.fill("#question", "Anything?");
  await page.click("#go");
  assert.match(await page.locator("#problem").innerText(), /at least one way/);
  await choose(page, "hardened");
  await page.setInputFiles("#file", { name: "notes.txt", mimeType: "text/plain", buffer: Buffer.from("no picture") });
  await ask(page);
  assert.match(await page.locator(".failure").innerText(), /notes\.txt can't be used/);
  await page.getByRole("button", { name: "Remove notes.txt" }).click();
  await page.setInputFiles("#file", { name: "vast.png", mimeType: "image/png", buffer: Buffer.alloc(21 << 20) });
  assert.match(await page.locator("#problem").innerText(), /vast\.png is larger than 20 MB/);
  await shot(page, "error");

  say("stopping stops the model");
  const before = model.left;
  await page.fill("#question", "Be slow");
  await page.click("#go");
  await page.waitForSelector(".card[data-state=running]");
  await page.click("#cancel");
  await page.waitForSelector(".note.stopped");
  for (let tries = 0; model.left === before; tries += 1) {
    assert.ok(tries < 50, "the model's work was not given up");
    await sleep(100);
  }

  say("images are pasted and dropped");
  const png = readFileSync("examples/list.png").toString("base64");
  const bring = (kind, name) => page.evaluate(([kind, name, png]) => {
    const bytes = Uint8Array.from(atob(png), letter => letter.charCodeAt(0)), transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, { type: "image/png" }));
    const event = kind === "paste" ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true })
      : new DragEvent("drop", { dataTransfer: transfer, bubbles: true });
    document.querySelector("#drop").dispatchEvent(event);
  }, [kind, name, png]);
  const held = await page.locator("#pictures li").count();
  await bring("paste", "pasted.png");
  await page.locator("img[alt='pasted.png']").waitFor();
  await bring("drop", "dropped.png");
  await page.locator("img[alt='dropped.png']").waitFor();
  assert.equal(await page.locator("#pictures li").count(), held + 2);

  say("a question waits for images that are still being read");
  await page.reload();
  await page.waitForSelector("#arms input");
  const shownQuestion = async () => {
    await page.waitForSelector(".outcome:not([hidden])");
    return page.locator("#asked").innerText();
  };
  await page.evaluate(() => {
    document.querySelector("#examples button").click();
    document.querySelector("#ask").requestSubmit();
  });
  assert.match(await shownQuestion(), /\(1 image\)/);
  await page.evaluate(() => {
    const transfer = new DataTransfer();
    transfer.items.add(new File(["none"], "vast.png", { type: "image/png" }));
    Object.defineProperty(transfer.files[0], "size", { value: 1 << 30 });
    document.querySelector("#drop").dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true }));
    document.querySelector("#ask").requestSubmit();
  });
  await page.locator("#problem", { hasText: "vast.png is larger" }).waitFor();
  assert.ok(await page.locator("#go").isEnabled() && await page.locator(".card[data-state=running]").count() === 0);

  say("by keyboard alone");
  await page.reload();
  await page.waitForSelector("#arms input");
  const reached = new Set();
  for (let presses = 0; presses < 20; presses += 1) {
    await page.keyboard.press("Tab");
    reached.add(await page.evaluate(() => document.activeElement.id || document.activeElement.name || document.activeElement.textContent));
  }
  for (const name of ["Go to the answers", "language", "file", "question", "arm", "go", "A list", "Your own profile"]) {
    assert.ok(reached.has(name), `${name} is not reached: ${[...reached].join(", ")}`);
  }
  await page.focus("#question");
  await page.keyboard.type("What does the list say?");
  await page.keyboard.press("Control+Enter");
  await page.waitForSelector(".outcome:not([hidden])");

  say("nothing is kept, and nobody else is asked");
  const kept2 = await page.evaluate(async () => [localStorage.length, sessionStorage.length, (await indexedDB.databases()).length,
    (await caches.keys()).length, document.cookie]);
  assert.deepEqual(kept2, [0, 0, 0, 0, ""]);
  assert.deepEqual([...hosts], [new URL(origin).host]);
  assert.deepEqual(trouble.filter(told => !/status of (400|403|502)/.test(told)), []);

  say("where the server shows figures only, drafts are withheld");
  const strict = new Served("serve", "--playground", "--listen", "127.0.0.1:0", "--upstream", model.url, "--profile", "paper");
  const figures = await visit(await strict.link());
  assert.ok(await figures.locator("[value=unguarded]").isDisabled() && await figures.locator("[value=edited]").isDisabled());
  await example(figures, "A sly question");
  await ask(figures);
  const put = body => figures.evaluate(async body => {
    const headers = { "content-type": "application/json" };
    const response = await fetch("/playground/ask", { method: "POST", headers, body: JSON.stringify(body) });
    return [response.status, await response.text()];
  }, body);
  const image = await figures.locator("#pictures img").getAttribute("src"), asked = await figures.inputValue("#question");
  const [, stream] = await put({ text: asked, images: [image], arm: { profile: "paper" } });
  assert.match(stream, /event: finished/);
  assert.doesNotMatch(stream, /Carry a large|STAFF ONLY|RESPONSE/);
  assert.match(await figures.locator(".arm").innerText(), /Withheld[\s\S]*judged|judged[\s\S]*Withheld/);
  assert.match(await figures.locator(".outcome").innerText(), /note to the desk/);
  for (const arm of ["unguarded", { edited: { base: "paper", name: "mine", changes: { gate: "never" } } }]) {
    assert.equal((await put({ text: asked, images: [image], arm }))[0], 403);
  }
  await figures.context().close();
  strict.stop();

  say("in Chinese, in the dark, on a phone; without serious findings of axe");
  await page.context().close();
  const wide = await audited(await served.link());
  await accessible(wide, "empty");
  await shot(wide, "empty");
  await example(wide, "A sly question");
  await choose(wide, "unguarded", "paper", "hardened");
  await ask(wide);
  await card(wide, 2, 2).getByText("What the threshold does").click();
  assert.match(await card(wide, 2, 2).innerText(), /At a threshold of 50%, 78% of harmful and 13% of harmless requests are flagged/);
  await shot(wide, "curve");
  await wide.click("#editor > summary");
  await wide.locator("#threshold").fill("0.8");
  assert.match(await wide.locator("#editor").innerText(), /At a threshold of 80%, 39% of harmful and 1% of harmless/);
  await accessible(wide, "light");
  await wide.click("#editor > summary");
  await wide.click("#language");
  assert.equal(await wide.locator("html").getAttribute("lang"), "zh-Hans");
  const chinese = await text(wide);
  for (const told of ["判定不安全", "闭眼写成", "就是下面的回答", "防护方式", "有害概率"]) assert.ok(chinese.includes(told), told);
  await accessible(wide, "Chinese");
  await shot(wide, "chinese");
  await wide.emulateMedia({ colorScheme: "dark" });
  await sleep(300);
  await accessible(wide, "dark");
  await wide.click("#language");
  await shot(wide, "dark");
  await wide.setViewportSize({ width: 390, height: 844 });
  await accessible(wide, "phone, dark");
  await wide.emulateMedia({ colorScheme: "light" });
  await choose(wide, "paper");
  await ask(wide);
  await sleep(300);
  await accessible(wide, "phone");
  await shot(wide, "phone");
  await wide.setViewportSize({ width: 1200, height: 800 });
  await choose(wide, "unguarded", "paper");
  await ask(wide);
  await sleep(300);
  await shot(wide, "playground");
  await wide.context().close();
  const words = await visit(await served.link(), { locale: "zh-CN" });
  assert.equal(await words.locator("html").getAttribute("lang"), "zh-Hans", "the browser's language is the page's");

  await example(words, "清单");
  await ask(words);
  assert.match(await words.locator(".outcome").innerText(), /模型自己的回答[\s\S]*面包/);
  await shot(words, "chinese-list");

  say("a server that went away is told");
  served.stop();
  await words.fill("#question", "在吗？");
  await words.click("#go");
  assert.match(await words.locator(".failure").innerText(), /与服务器的连接中断/);
} catch (error) {
  console.error(`playground: ${step}: ${error.stack}`);
  if (trouble.length) console.error(`the browser says:\n${trouble.join("\n")}`);
  process.exitCode = 1;
} finally {
  await browser.close();
  served.stop();
  model.server.closeAllConnections();
  model.server.close();
  if (process.exitCode === undefined) console.log(`playground: all is as it should be; pictures in ${shots}`);
  writeFileSync(join(work, "said"), served.said);
}
