// The calls of the page: the same API that every other client uses.
import { keepForTab, ofTab } from "./store.js";

let key = ofTab("key");

export const hasKey = () => key !== "";
export function setKey(value) {
  key = value;
  keepForTab("key", value);
}

// What went wrong, in words for the reader; `needsKey`: another API key could help.
export class Failure extends Error {
  constructor(message, needsKey = false) {
    super(message);
    this.needsKey = needsKey;
  }
}

async function call(path, options) {
  const headers = { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached.");
  }
  if (response.ok) return response;
  if (response.status === 401)
    throw new Failure(key ? "The server does not accept this API key." : "This server needs an API key.", true);
  const body = await response.json().catch(() => null);
  throw new Failure(body?.error?.message ?? `The server answered ${response.status} ${response.statusText}`.trim());
}

export async function status() {
  return (await call("ui/status", { signal: AbortSignal.timeout(10_000) })).json();
}

// Yields the chunks of an answer.
export async function* chat(body, signal) {
  const response = await call("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  try {
    for await (const data of eventsOf(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Failure(chunk.error.message);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Failure) throw error;
    throw new Failure("The connection was lost before the answer was complete.");
  }
  throw new Failure("The answer ended before it was complete.");
}

// Yields the data of each server-sent event.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (pending + value).split(/\r?\n/);
    pending = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice("data:".length).trim();
  }
}
