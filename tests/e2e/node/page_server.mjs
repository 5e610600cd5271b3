// A server that serves the chat page and answers as a check tells it to, piece by piece.
import { createServer } from "node:http";
import { readFileSync } from "node:fs";
import { join } from "node:path";

const TYPES = { html: "text/html", js: "text/javascript", css: "text/css", svg: "image/svg+xml" };
const IDLE = {
  scheduler_id: "s", running: 0, waiting: 0, workers_ready: 1, kv_blocks_free: 60, kv_blocks_total: 100,
  looked_up_tokens: 10, cached_tokens: 5, estimated_queue_ms: 0, tokens_per_s: 0,
};

// One call of the page: what it asked, and the answer that the check writes.
class Call {
  constructor(request, response, body) {
    this.body = body;
    this.key = request.headers.authorization;
    this.response = response;
    this.ended = new Promise((resolve) => response.on("close", resolve));
  }
  #data(data) {
    if (!this.response.headersSent) this.response.writeHead(200, { "content-type": "text/event-stream" });
    this.response.write(`data: ${JSON.stringify(data)}\n\n`);
  }
  say(content, field = "content") {
    this.#data({ model: "tiny", choices: [{ delta: { [field]: content } }] });
  }
  end(finish_reason = "stop") {
    this.#data({ model: "tiny", choices: [{ delta: {}, finish_reason }] });
    this.#data({ model: "tiny", choices: [], usage: { completion_tokens: 7 } });
    this.response.end("data: [DONE]\n\n");
  }
  refuse(status, message) {
    this.response.writeHead(status, { "content-type": "application/json" });
    this.response.end(JSON.stringify({ error: { message } }));
  }
  cut() {
    this.response.destroy();
  }
}

export async function startServer(folder, headers) {
  const server = {
    key: null, // what the page must send, where the server has keys
    load: IDLE,
    calls: [],
    waiting: [],
    // Returns the next call for an answer.
    next: () =>
      server.calls.length ? Promise.resolve(server.calls.shift()) : new Promise((resolve) => server.waiting.push(resolve)),
  };
  const http = createServer(async (request, response) => {
    const path = request.url.slice(1);
    const isPublic = path === "ui" || /^ui\/[a-z]+\.[a-z]+$/.test(path);
    if (isPublic) {
      const name = path === "ui" ? "index.html" : path.slice("ui/".length);
      response.writeHead(200, { ...headers, "content-type": TYPES[name.split(".").at(-1)] });
      response.end(readFileSync(join(folder, name)));
      return;
    }
    const parts = [];
    for await (const part of request) parts.push(part);
    const call = new Call(request, response, parts.length ? JSON.parse(Buffer.concat(parts)) : null);
    if (server.key && call.key !== `Bearer ${server.key}`) call.refuse(401, "send the header authorization");
    else if (path === "ui/status") {
      response.writeHead(200, { "content-type": "application/json" });
      response.end(JSON.stringify({ ready: true, models: ["tiny", "other"], schedulers: [server.load] }));
    } else if (path === "v1/chat/completions") {
      const waiting = server.waiting.shift();
      if (waiting) waiting(call);
      else server.calls.push(call);
    } else call.refuse(404, path);
  });
  await new Promise((resolve) => http.listen(0, "127.0.0.1", resolve));
  server.url = `http://127.0.0.1:${http.address().port}`;
  server.close = () => {
    http.closeAllConnections();
    http.close();
  };
  return server;
}
