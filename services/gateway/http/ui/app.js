// The chat: one conversation on the screen, at most one answer on its way.
import { chat, hasKey, setKey } from "./api.js";
import { watch } from "./gauges.js";
import { showMarkdown } from "./markdown.js";
import * as store from "./store.js";

const byId = (id) => document.getElementById(id);
const cloneOf = (id) => byId(id).content.cloneNode(true).firstElementChild;
const parameters = byId("parameters");
const log = byId("messages"), box = byId("text");
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const NEAR_END_PX = 60;
const isTouched = matchMedia("(pointer: coarse)");
const TITLE_LENGTH = 60;

let current = store.conversation(store.ofTab("current")) ?? store.newConversation();
let running = null; // { conversation, controller } while an answer comes
let editing = null; // the question that what is sent replaces
let removed = []; // the conversations that Undo brings back
let follows = true; // whether the end of the answer is kept in sight
let lastTop = 0;
let models = [];

// ---- What is shown

function focusBox() {
  if (!isTouched.matches) box.focus(); // a keyboard on the screen would cover what is read
}

function toEnd() {
  follows = true;
  log.scrollTop = log.scrollHeight;
}

// Sees whether the reader went back. Asked before following as well: the event may come after more of the answer.
function noteScrolling() {
  const left = log.scrollHeight - log.scrollTop - log.clientHeight;
  if (log.scrollTop < lastTop) follows = left < 1; // however little
  else if (left < NEAR_END_PX) follows = true;
  lastTop = log.scrollTop;
  byId("latest").hidden = follows || left < NEAR_END_PX;
}

const articleOf = (message) => [...log.children].find((each) => each.message === message);

function metaOf(message) {
  const ends = { length: "Cut at max tokens", stopped: "Stopped", error: message.content && "Incomplete" };
  const rate = message.rate ? `${message.rate.toFixed(1)} tokens/s` : "";
  return [ends[message.finish], message.tokens && `${message.tokens} tokens`, rate, message.model].filter(Boolean).join(" · ");
}

// Brings an article up to date with its message.
function refresh(message) {
  const article = articleOf(message);
  if (!article) return; // another conversation is on the screen
  const part = (name) => article.querySelector(name);
  const isComing = running?.message === message;
  article.className = message.role;
  article.classList.toggle("coming", isComing && !message.content && !message.reasoning);
  const text = part(".text");
  if (message.role === "user") text.textContent = message.content;
  else showMarkdown(text, message.content);
  const reasoning = part(".reasoning");
  if (message.reasoning) {
    if (reasoning.hidden) reasoning.open = isComing;
    if (message.content && !reasoning.done) {
      reasoning.done = true;
      reasoning.open = false;
    }
    reasoning.hidden = false;
    part("summary").textContent = isComing && !message.content ? "Thinking…" : "Thoughts";
    showMarkdown(part(".reasoning .markdown"), message.reasoning);
  }
  part(".failure").hidden = !message.error;
  part(".failure span").textContent = message.error ?? "";
  part(".meta").textContent = isComing ? "" : metaOf(message);
  part(".continue").hidden = isComing || !message.content || !["length", "stopped", "error"].includes(message.finish);
  part("footer").hidden = isComing;
  part(".copy").hidden = !message.content;
  part(".edit").hidden = message.role !== "user";
  part(".regenerate").hidden = message.role !== "assistant" || Boolean(message.error);
  article.classList.toggle("empty", !message.content);
  noteScrolling();
  if (follows) toEnd();
}

function append(message) {
  const article = cloneOf("message");
  article.message = message;
  article.setAttribute("aria-label", message.role === "user" ? "You" : "Answer");
  log.append(article);
  refresh(message);
}

function showCurrent() {
  store.keepForTab("current", current.id);
  log.replaceChildren();
  current.messages.forEach(append);
  showState();
  toEnd();
  byId("latest").hidden = true;
}

// Shows what depends on the conversation as a whole.
function showState() {
  const isEmpty = !current.messages.length;
  log.hidden = isEmpty;
  byId("welcome").hidden = !isEmpty;
  byId("export").disabled = isEmpty;
  byId("send").hidden = Boolean(running);
  byId("stop").hidden = !running;
  log.setAttribute("aria-busy", String(Boolean(running)));
  byId("editing").hidden = !editing;
  document.title = current.title ? `${current.title} – Octavo` : "Octavo";
  showHistory();
}

function showHistory() {
  const all = store.conversations();
  byId("delete-all").hidden = !all.length;
  byId("conversations").replaceChildren(...all.map((each) => {
    const entry = cloneOf("entry");
    entry.conversation = each.id;
    entry.querySelector(".open").textContent = each.title;
    entry.querySelector(".open").setAttribute("aria-current", String(each.id === current.id));
    entry.querySelector(".delete").setAttribute("aria-label", `Delete ${each.title}`);
    return entry;
  }));
}

function toast(text, undo = null) {
  byId("toast").hidden = false;
  byId("toast").firstElementChild.textContent = text;
  byId("toast").querySelector("button").hidden = !undo;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => (byId("toast").hidden = true), undo ? 10_000 : 3000);
}

// ---- Questions and answers

function save(conversation) {
  if (conversation.isDeleted || !conversation.messages.length) return;
  if (!store.keep(conversation)) toast("This browser keeps no more: this conversation is lost when the page is closed.");
}

// Returns what is sent for a conversation: all but questions without an answer, the last one aside.
function messagesOf(conversation) {
  const system = parameters.elements.system.value.trim();
  const sent = system ? [{ role: "system", content: system }] : [];
  for (const { role, content } of conversation.messages) {
    if (role === "user" && sent.at(-1)?.role === "user") sent.pop();
    if (content) sent.push({ role, content });
  }
  return sent;
}

// Asks for the answer to the last question, or for what goes on with `message`, and shows it as it comes.
async function answer(conversation, message = null) {
  stop();
  const goesOn = Boolean(message);
  const body = {
    model: byId("model").value || undefined, messages: messagesOf(conversation),
    stream: true, stream_options: { include_usage: true },
    ...(goesOn ? { continue_final_message: true } : {}),
  };
  for (const name of NUMBERS) {
    const { value } = parameters.elements[name];
    if (value !== "") body[name] = Number(value);
  }
  if (!goesOn) conversation.messages.push((message = { role: "assistant", content: "" }));
  for (const name of ["error", "finish", "tokens", "rate"]) delete message[name];
  const mine = { conversation, message, controller: new AbortController() };
  running = mine;
  follows = true;
  if (goesOn) refresh(message);
  else append(message);
  showState();
  let firstAt = 0, frame = 0;
  try {
    for await (const chunk of chat(body, mine.controller.signal)) {
      mine.controller.signal.throwIfAborted(); // what was read before belongs to nobody now
      const { delta = {}, finish_reason: finish } = chunk.choices[0] ?? {};
      if (delta.reasoning_content) message.reasoning = (message.reasoning ?? "") + delta.reasoning_content;
      message.content += delta.content ?? "";
      message.finish = finish ?? message.finish;
      message.model = chunk.model;
      if (!firstAt && (delta.content || delta.reasoning_content)) firstAt = performance.now();
      if (chunk.usage) {
        const tokens = chunk.usage.completion_tokens, ms = performance.now() - firstAt;
        message.tokens = tokens;
        if (tokens > 1 && firstAt && ms > 0) message.rate = ((tokens - 1) / ms) * 1000; // the first starts the clock
      }
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        refresh(message);
      });
    }
  } catch (failure) {
    if (failure.name !== "AbortError") {
      message.error = failure.message;
      message.finish = "error";
      if (failure.needsKey && !conversation.isDeleted) askForKey(failure.message, { conversation, message });
    }
  }
  cancelAnimationFrame(frame);
  if (mine.controller.signal.aborted && !message.finish) message.finish = "stopped";
  if (running === mine) running = null;
  refresh(message);
  save(conversation);
  showState();
}

// Ends the answer that comes. What there is of it stays in its own conversation.
function stop() {
  const stopped = running;
  if (!stopped) return;
  running = null;
  stopped.controller.abort();
  stopped.message.finish ??= "stopped";
  refresh(stopped.message);
  save(stopped.conversation);
  showState();
}

// Drops the message and what follows it.
function cutFrom(message) {
  stop();
  for (const dropped of current.messages.splice(current.messages.indexOf(message))) articleOf(dropped)?.remove();
}

function ask(text) {
  stop();
  if (editing) cutFrom(editing);
  editing = null;
  const question = { role: "user", content: text };
  current.messages.push(question);
  if (current.messages.length === 1) current.title = text.replace(/\s+/g, " ").slice(0, TITLE_LENGTH);
  current.updated = Date.now();
  append(question);
  save(current);
  return answer(current);
}

function regenerate(message) {
  cutFrom(message);
  focusBox();
  answer(current);
}

function retry(message) {
  if (message.content) answer(current, message);
  else regenerate(message);
}

function open(conversation) {
  stop();
  cancelEdit();
  current = conversation;
  showCurrent();
  if (isNarrow.matches) setDrawer(null);
  focusBox();
}

function remove(ids) {
  removed = ids.map((id) => (id === current.id ? current : store.conversation(id))).filter(Boolean);
  for (const each of removed) each.isDeleted = true;
  if (ids.includes(running?.conversation.id)) stop();
  ids.forEach(store.drop);
  if (ids.includes(current.id)) open(store.newConversation());
  showHistory();
  toast(ids.length === 1 ? "Conversation deleted." : `${ids.length} conversations deleted.`, true);
}

function setText(text) {
  box.value = text;
  fitBox();
  store.keepForTab("draft", text);
}

function fitBox() {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

function cancelEdit() {
  if (!editing) return;
  editing = null;
  setText("");
  showState();
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not over plain HTTP from another host
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  toast("Copied.");
}

function exportCurrent() {
  const names = { user: "You", assistant: "Answer" };
  const text = current.messages.map((each) => `## ${names[each.role]}\n\n${each.content}\n`).join("\n");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([`# ${current.title}\n\n${text}`], { type: "text/markdown" }));
  link.download = `${current.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "conversation"}.md`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = box.value.trim();
  if (!text || running) return;
  setText("");
  ask(text);
  focusBox();
});
box.addEventListener("input", () => setText(box.value));
box.addEventListener("keydown", (event) => {
  const breaksLine = event.shiftKey || event.isComposing || isTouched.matches;
  if (event.key !== "Enter" || breaksLine) return;
  event.preventDefault();
  byId("ask").requestSubmit();
});
byId("stop").addEventListener("click", () => {
  stop();
  focusBox();
});
byId("cancel-edit").addEventListener("click", cancelEdit);
byId("examples").addEventListener("click", (event) => {
  if (event.target.tagName !== "BUTTON") return;
  setText(event.target.textContent);
  focusBox();
});
log.addEventListener("click", (event) => {
  const button = event.target.closest("button"), message = event.target.closest("article")?.message;
  if (!button || !message) return;
  if (button.matches(".copy")) copy(message.content, button);
  else if (button.matches(".copy-code")) copy(button.closest(".code").querySelector("code").textContent, button);
  else if (button.matches(".regenerate")) regenerate(message);
  else if (button.matches(".retry")) retry(message);
  else if (button.matches(".continue")) answer(current, message);
  else if (button.matches(".edit")) {
    editing = message;
    setText(message.content);
    showState();
    focusBox();
  }
});
log.addEventListener("scroll", noteScrolling);
new ResizeObserver(() => follows && toEnd()).observe(log);
byId("latest").addEventListener("click", () => {
  toEnd();
  focusBox();
});
byId("conversations").addEventListener("click", (event) => {
  const id = event.target.closest("li")?.conversation;
  if (event.target.closest(".delete")) remove([id]);
  else if (event.target.closest(".open") && id !== current.id) open(store.conversation(id) ?? store.newConversation());
  else if (isNarrow.matches && id) setDrawer(null);
});
byId("new").addEventListener("click", () => open(store.newConversation()));
byId("delete-all").addEventListener("click", () => remove(store.conversations().map((each) => each.id)));
byId("toast").querySelector("button").addEventListener("click", () => {
  for (const each of removed) {
    delete each.isDeleted;
    save(each);
  }
  if (removed.length === 1) open(removed[0]);
  removed = [];
  byId("toast").hidden = true;
  showHistory();
});
byId("export").addEventListener("click", exportCurrent);
// Before the browser cuts the connection, which would look like a failure; not every browser tells the first.
for (const leaves of ["beforeunload", "pagehide"]) addEventListener(leaves, stop);
store.watchOtherTabs((id) => {
  const theirs = id === current.id && !running && store.conversation(id);
  if (theirs) {
    current = theirs;
    editing = null;
    showCurrent();
  } else showHistory();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || byId("key-dialog").open) return;
  if (isNarrow.matches && document.querySelector(".open-drawer")) setDrawer(null);
  else if (running) {
    stop();
    focusBox();
  } else cancelEdit();
});

// ---- The two columns at the sides: drawers over the chat where there is no room beside it

const isNarrow = matchMedia("(max-width: 62rem)");
const drawers = { history: byId("history"), panel: byId("panel") };
const settings = store.settings();

// Shows one drawer over the chat, or none.
function setDrawer(name) {
  for (const [each, column] of Object.entries(drawers)) {
    const isOpen = isNarrow.matches ? each === name : settings[each] !== false;
    column.hidden = !isOpen;
    column.classList.toggle("open-drawer", isNarrow.matches && isOpen);
    byId(`show-${each}`).setAttribute("aria-expanded", String(isOpen));
  }
  const isOver = isNarrow.matches && name !== null;
  byId("shade").hidden = !isOver;
  document.querySelector("main").inert = isOver;
}

for (const name of Object.keys(drawers))
  byId(`show-${name}`).addEventListener("click", () => {
    if (!isNarrow.matches) {
      settings[name] = drawers[name].hidden;
      store.keepSettings(settings);
    }
    setDrawer(isNarrow.matches && drawers[name].hidden ? name : null);
  });
byId("shade").addEventListener("click", () => setDrawer(null));
isNarrow.addEventListener("change", () => setDrawer(null));

// ---- Parameters and the API key

function keepParameters() {
  settings.parameters = Object.fromEntries(["system", ...NUMBERS].map((name) => [name, parameters.elements[name].value]));
  store.keepSettings(settings);
}

for (const [name, value] of Object.entries(settings.parameters ?? {}))
  if (parameters.elements[name]) parameters.elements[name].value = value;
parameters.addEventListener("input", keepParameters);
parameters.addEventListener("reset", () => setTimeout(keepParameters)); // it tells before it resets
parameters.addEventListener("submit", (event) => event.preventDefault());
byId("model").addEventListener("change", () => {
  settings.model = byId("model").value;
  store.keepSettings(settings);
  byId("welcome-model").textContent = settings.model;
});

const dialog = byId("key-dialog");
let awaitsKey = null; // the answer that is asked for again with the new key
let wasAskedForKey = false;

function askForKey(reason, awaiting = null) {
  wasAskedForKey = true;
  awaitsKey = awaiting ?? awaitsKey;
  byId("key-reason").textContent = reason;
  if (!dialog.open) dialog.showModal();
  byId("key").focus();
}

dialog.querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value.trim());
  wasAskedForKey = false; // a wrong one is told
  dialog.close();
  askAgain();
  const { conversation, message } = awaitsKey ?? {};
  awaitsKey = null;
  if (conversation && conversation === current && current.messages.at(-1) === message) retry(message);
});
dialog.querySelector("[value=cancel]").addEventListener("click", () => dialog.close());
dialog.addEventListener("close", () => {
  byId("key").value = "";
  focusBox();
});
byId("ask-key").addEventListener("click", () => askForKey("This server needs an API key."));
byId("change-key").addEventListener("click", () =>
  askForKey(hasKey() ? "A key is in use. Another one, or none, replaces it." : "Needed only where the server has keys."));

// ---- Start

const askAgain = watch(
  (status) => {
    byId("state").textContent = status.ready ? "ready" : "not ready";
    byId("state").className = status.ready ? "good" : "bad";
    byId("ask-key").hidden = true;
    if (status.models.join() === models.join()) return;
    models = status.models;
    byId("model").replaceChildren(...models.map((name) => new Option(name, name)));
    byId("model").value = models.includes(settings.model) ? settings.model : models[0];
    byId("welcome-model").textContent = byId("model").value;
  },
  (failure) => {
    byId("state").textContent = failure.needsKey ? "needs a key" : failure.message.replace(/^The server /, "").replace(/\.$/, "");
    byId("state").className = "bad";
    byId("ask-key").hidden = !failure.needsKey;
    if (failure.needsKey && !wasAskedForKey) askForKey(failure.message);
  },
);
setText(store.ofTab("draft"));
setDrawer(null);
showCurrent();
focusBox();
