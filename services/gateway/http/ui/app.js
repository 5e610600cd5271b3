// A chat over the API that this server has anyway, and its state. No other page or library is loaded.

const byId = (id) => document.getElementById(id);
const parameters = byId("parameters").elements;
const POLL_MS = 1000;

let conversation = [];
let running = null; // an AbortController while an answer comes

function headers() {
  const key = parameters.key.value;
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function failureOf(response) {
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message ?? `the server answered ${response.status}`);
}

function show(role, text) {
  const item = document.createElement("li");
  item.className = role;
  item.textContent = text;
  byId("messages").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

function request() {
  const system = parameters.system.value.trim();
  const body = {
    model: byId("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"])
    if (parameters[name].value !== "") body[name] = Number(parameters[name].value);
  return body;
}

// Yields the data of each server-sent event.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    pending += value;
    const events = pending.split("\n\n");
    pending = events.pop();
    for (const event of events) if (event.startsWith("data: ")) yield event.slice("data: ".length);
  }
}

async function answer() {
  const item = show("assistant", "");
  const reasoning = document.createElement("span");
  reasoning.className = "reasoning";
  const text = document.createElement("span");
  text.className = "text";
  item.append(reasoning, text);
  let firstAt = 0, shown = "";
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(request()), signal: running.signal,
    });
    if (!response.ok) throw await failureOf(response);
    for await (const data of eventsOf(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const delta = chunk.choices[0]?.delta ?? {};
      reasoning.textContent += delta.reasoning_content ?? "";
      shown += delta.content ?? "";
      text.textContent = shown;
      if (!firstAt && (delta.content || delta.reasoning_content)) firstAt = performance.now();
      if (chunk.usage) showSpeed(chunk.usage.completion_tokens, performance.now() - firstAt);
      item.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  }
  if (shown) conversation.push({ role: "assistant", content: shown });
}

function showSpeed(tokens, ms) {
  const rate = tokens > 1 && ms > 0 ? ((tokens - 1) / ms) * 1000 : 0; // the first token is where the clock starts
  byId("speed").textContent = `${tokens} tokens` + (rate ? `, ${rate.toFixed(1)} tokens/s` : "");
}

function setBusy(busy) {
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
}

byId("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = byId("text").value.trim();
  if (!text || running) return;
  byId("text").value = "";
  byId("speed").textContent = "";
  conversation.push({ role: "user", content: text });
  show("user", text);
  running = new AbortController();
  setBusy(true);
  await answer();
  running = null;
  setBusy(false);
  byId("text").focus();
});
byId("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", () => {
  running?.abort();
  conversation = [];
  byId("messages").replaceChildren();
});

function showStatus(status) {
  const sum = (name) => status.schedulers.reduce((total, each) => total + each[name], 0);
  const total = sum("kv_blocks_total"), used = total - sum("kv_blocks_free"), lookedUp = sum("looked_up_tokens");
  const values = {
    running: sum("running"),
    waiting: sum("waiting"),
    workers_ready: sum("workers_ready"),
    tokens_per_s: sum("tokens_per_s").toFixed(0),
    kv_used: `${used} of ${total} blocks`,
    cache_hits: lookedUp ? `${((100 * sum("cached_tokens")) / lookedUp).toFixed(0)} %` : "–",
    queue: `${Math.max(0, ...status.schedulers.map((each) => each.estimated_queue_ms))} ms`,
  };
  for (const cell of document.querySelectorAll("[data-value]")) cell.textContent = values[cell.dataset.value];
  byId("kv").value = total ? used / total : 0;
  byId("state").textContent = status.ready ? "ready" : "not ready";
  const names = status.models.join(), select = byId("model");
  if (select.dataset.names !== names) {
    select.dataset.names = names;
    select.replaceChildren(...status.models.map((name) => new Option(name, name)));
  }
}

async function watch() {
  try {
    const response = await fetch("ui/status", { headers: headers() });
    if (!response.ok) throw await failureOf(response);
    showStatus(await response.json());
  } catch (error) {
    byId("state").textContent = error.message;
  }
  setTimeout(watch, POLL_MS);
}
watch();
