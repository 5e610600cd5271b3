// How busy the server is, asked for once a second while somebody looks.
import { status } from "./api.js";

const POLL_MS = 1000;
const SLOW_POLL_MS = 3000; // while it cannot be reached
const NUM_POINTS = 60;
const byId = (id) => document.getElementById(id);
const rates = [];

function show(now) {
  const sum = (name) => now.schedulers.reduce((total, each) => total + each[name], 0);
  const total = sum("kv_blocks_total"), used = total - sum("kv_blocks_free"), lookedUp = sum("looked_up_tokens");
  const rate = sum("tokens_per_s");
  const values = {
    running: sum("running"),
    waiting: sum("waiting"),
    workers_ready: sum("workers_ready"),
    tokens_per_s: rate.toFixed(0),
    kv_used: `${used} of ${total} blocks`,
    cache_hits: lookedUp ? `${((100 * sum("cached_tokens")) / lookedUp).toFixed(0)} %` : "–",
    queue: `${Math.max(0, ...now.schedulers.map((each) => each.estimated_queue_ms))} ms`,
  };
  for (const cell of document.querySelectorAll("[data-value]")) cell.textContent = values[cell.dataset.value];
  byId("kv").value = total ? used / total : 0;
  rates.push(rate);
  if (rates.length > NUM_POINTS) rates.shift();
  const top = Math.max(...rates, 1), first = NUM_POINTS - rates.length;
  byId("rates").setAttribute("points", rates.map((each, at) => `${first + at},${(22 - (20 * each) / top).toFixed(1)}`).join(" "));
}

// Tells what the server says, or the failure, as often as it is asked. Returns what asks again at once.
export function watch(told, failed) {
  let timer = 0, round = 0;
  async function ask() {
    const mine = ++round;
    clearTimeout(timer);
    let pause = POLL_MS;
    if (!document.hidden) {
      try {
        const now = await status();
        if (mine !== round) return;
        show(now);
        told(now);
      } catch (failure) {
        if (mine !== round) return;
        failed(failure);
        pause = SLOW_POLL_MS;
      }
    }
    timer = setTimeout(ask, pause);
  }
  document.addEventListener("visibilitychange", () => document.hidden || ask());
  ask();
  return ask;
}
