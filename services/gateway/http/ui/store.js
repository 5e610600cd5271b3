// What the browser keeps: conversations and parameters for good, the API key and the draft until its tab is closed.
// A conversation is an entry of its own, so that two tabs do not overwrite each other's.

const PREFIX = "octavo/conversation/";

// A browser may refuse to keep anything (private windows, a full disk): the page works without.
function tried(action, otherwise = null) {
  try {
    return action();
  } catch {
    return otherwise;
  }
}

const parsed = (text) => tried(() => JSON.parse(text));

function readConversation(key) {
  const value = parsed(localStorage.getItem(key));
  const isMessage = (each) => ["user", "assistant"].includes(each?.role) && typeof each.content === "string";
  const isOne = typeof value?.title === "string" && Array.isArray(value.messages) && value.messages.every(isMessage);
  return isOne ? { ...value, id: key.slice(PREFIX.length) } : null;
}

const conversationKeys = () => tried(() => Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)), []);

export const newConversation = () => ({
  id: Date.now().toString(36) + Math.random().toString(36).slice(2, 8), title: "", updated: 0, messages: [],
});

export function conversations() {
  const all = tried(() => conversationKeys().map(readConversation).filter(Boolean), []);
  return all.sort((left, right) => right.updated - left.updated);
}

export const conversation = (id) => tried(() => readConversation(PREFIX + id));

// Keeps a conversation; the oldest ones make room where the browser has no more. Returns whether it is kept.
export function keep(kept) {
  for (let others = null; ; ) {
    try {
      localStorage.setItem(PREFIX + kept.id, JSON.stringify(kept));
      return true;
    } catch {
      others ??= conversations().filter((each) => each.id !== kept.id);
      if (!others.length) return false;
      drop(others.pop().id);
    }
  }
}

export const drop = (id) => tried(() => localStorage.removeItem(PREFIX + id));
export const settings = () => parsed(tried(() => localStorage.getItem("octavo/settings"))) ?? {};
export const keepSettings = (values) => tried(() => localStorage.setItem("octavo/settings", JSON.stringify(values)));
export const ofTab = (name) => tried(() => sessionStorage.getItem(`octavo/${name}`)) ?? "";
export const keepForTab = (name, value) => tried(() => sessionStorage.setItem(`octavo/${name}`, value));

// Calls back when another tab changed something.
export function watchOtherTabs(changed) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) changed(event.key?.slice(PREFIX.length));
  });
}
