// Requests to the server, and its answers.

/** An error with a code that `words.js` may have a text for, and the field that it is about. */
export class Failure extends Error {
  constructor(code, message, key) {
    super(message);
    Object.assign(this, { code, key });
  }
}

async function failure(response) {
  const error = await response.json().then(body => body.error, () => null);
  return new Failure(error?.code ?? "connection", error?.message ?? `HTTP ${response.status}`, error?.param);
}

async function send(path, body, signal) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(`playground/${path}`, { ...options, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("connection", error.message);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

/** Requests a JSON object. */
export async function object(path, body, signal) {
  return (await send(path, body, signal)).json();
}

/** Requests a stream of events: `[name, data]`. */
export async function* events(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", ended = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const fields = Object.fromEntries(block.split("\n").filter(line => !line.startsWith(":")).map(line => {
          const colon = line.indexOf(": ");
          return [line.slice(0, colon), line.slice(colon + 2)];
        }));
        if (!fields.event) continue;
        const data = JSON.parse(fields.data);
        if (fields.event === "error") throw new Failure(data.error.code, data.error.message, data.error.param);
        ended ||= fields.event === "done";
        yield [fields.event, data];
      }
    }
  } catch (error) {
    if (error instanceof Failure || error.name === "AbortError") throw error;
    throw new Failure("connection", error.message);
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!ended) throw new Failure("connection", "the stream ended early");
}
