// The OpenAI client for Node, as its users use it; see scripts/clients.
import assert from "node:assert";
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const image = "data:image/png;base64," + readFileSync(process.argv[2]).toString("base64");
const client = new OpenAI({ maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const content = (url) => [
  { type: "image_url", image_url: { url } },
  { type: "text", text: "What is on the list?" },
];
const ask = { model, messages: [{ role: "user", content: content(image) }], max_tokens: 12 };

const { data, response } = await client.chat.completions.create(ask).withResponse();
assert(["safe", "unsafe"].includes(response.headers.get("x-ecso-verdict")));
assert(data.choices[0].message.content && data.usage.total_tokens > 0);

let text = "";
let last;
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
  last = chunk;
}
assert(text && ["safe", "unsafe"].includes(last.ecso.verdict));

const found = await client.moderations.create({ input: content(image) });
assert.strictEqual(found.results[0].flagged, found.results[0].categories.harm);

await assert.rejects(
  client.chat.completions.create({ model, messages: [{ role: "user", content: content("data:image/png;base64,AAAA") }] }),
  (error) => error instanceof OpenAI.BadRequestError && error.code === "invalid_image",
);
console.log(`openai for Node: model ${model}, plain, streamed, moderations, errors: all as they should be`);
