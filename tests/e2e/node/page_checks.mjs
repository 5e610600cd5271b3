// What the chat page promises: node page_checks.mjs CHROMIUM FOLDER HEADERS. Prints a line of JSON for each check;
// ONLY=WORDS in the environment leaves out those whose name does not have them.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";
import { startServer } from "./page_server.mjs";

const [executablePath, folder, headers] = process.argv.slice(2);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const LONG = Array.from({ length: 80 }, (_, at) => `Paragraph ${at} of a long answer.`).join("\n\n");

const last = (page) => page.locator("#messages article.assistant").last();
const sent = (call) => call.body.messages.map(({ role, content }) => [role, content]);

async function failureOf(page) {
  const shown = last(page).locator(".failure span");
  await shown.waitFor(); // until it is visible
  return shown.textContent();
}

// Asks and returns the call for the answer.
async function ask(page, server, text) {
  await page.fill("#text", text);
  await page.press("#text", "Enter");
  return server.next();
}

async function converse(page, server, question, text, finish = "stop") {
  const call = await ask(page, server, question);
  call.say(text);
  call.end(finish);
  await page.waitForSelector("#send:visible");
  return call;
}

async function isWithinWidth(page) {
  const isWithin = () =>
    ["html", "body", "main", "#messages", "#ask"].every((name) => {
      const { scrollWidth, clientWidth } = document.querySelector(name);
      return scrollWidth <= clientWidth;
    });
  return page.evaluate(isWithin);
}

async function assertAccessible(page) {
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => window.axe.run());
  assert.deepEqual(violations.map((each) => `${each.id}: ${each.nodes.map((node) => node.html).join()}`), []);
}

const checks = {
  async "a new chat while an answer streams sends nothing of the old one"({ page, server }) {
    const old = await ask(page, server, "Tell me of ships");
    old.say("The story of ships");
    await page.waitForFunction(() => document.querySelector(".assistant .text")?.textContent);
    await page.click("#new");
    await old.ended;
    assert.equal(await page.locator("#messages article").count(), 0);
    const next = await converse(page, server, "Hi", "Hello");
    assert.deepEqual(sent(next), [["user", "Hi"]]);
    assert.equal(await page.locator("#messages article").count(), 2);
  },
  async "a conversation deleted while its answer streams does not come back"({ page, server }) {
    const call = await ask(page, server, "Tell me of ships");
    call.say("The story");
    await page.click("#conversations .delete");
    await call.ended;
    assert.equal(await page.locator("#conversations li").count(), 0);
    await page.reload();
    assert.equal(await page.locator("#conversations li").count(), 0);
  },
  async "a deleted conversation comes back with Undo"({ page, server }) {
    await converse(page, server, "Tell me of ships", "They float.");
    await page.click("#conversations .delete");
    await page.click("#toast button");
    assert.equal(await last(page).locator(".text").textContent(), "They float.");
    await page.reload();
    assert.equal(await page.locator("#conversations li").count(), 1);
  },
  async "a reload keeps the conversation, the parameters, the model and what was typed"({ page, server }) {
    await page.fill("[name=temperature]", "0.5");
    await page.fill("[name=system]", "Be brief.");
    await page.selectOption("#model", "other");
    await converse(page, server, "One", "First");
    await page.fill("#text", "half a quest");
    await page.reload();
    await page.waitForSelector("#state.good");
    assert.equal(await page.inputValue("#text"), "half a quest");
    assert.equal(await page.inputValue("#model"), "other");
    const call = await converse(page, server, "Two", "Second");
    assert.deepEqual(sent(call), [["system", "Be brief."], ["user", "One"], ["assistant", "First"], ["user", "Two"]]);
    assert.equal(call.body.temperature, 0.5);
  },
  async "a reload keeps what has come of an answer"({ page, server }) {
    (await ask(page, server, "Tell me of ships")).say("The story of ships");
    await page.waitForFunction(() => document.querySelector(".assistant .text")?.textContent);
    await page.reload();
    assert.equal(await last(page).locator(".text").textContent(), "The story of ships");
    assert.match(await last(page).locator(".meta").textContent(), /Stopped/);
    assert.equal(await page.locator(".failure:visible").count(), 0);
  },
  async "earlier conversations can be opened and deleted"({ page, server }) {
    await converse(page, server, "About ships", "Ships.");
    await page.click("#new");
    await converse(page, server, "About trees", "Trees.");
    await page.click("#conversations .open >> text=About ships");
    assert.equal(await last(page).locator(".text").textContent(), "Ships.");
    const call = await converse(page, server, "More", "More ships.");
    assert.deepEqual(sent(call)[0], ["user", "About ships"]);
    await page.click("#delete-all");
    assert.equal(await page.locator("#conversations li").count(), 0);
    assert.deepEqual(await page.evaluate(() => Object.keys(localStorage).filter((key) => key.includes("conversation"))), []);
  },
  async "a full or damaged store does not stop the page, and the oldest conversation makes room"({ page, server }) {
    await page.evaluate(() => {
      const entry = (name, value) => localStorage.setItem(`octavo/conversation/${name}`, value);
      entry("broken", "{");
      entry("foreign", '{"title":1,"messages":[{"role":"system"}]}');
      localStorage.setItem("octavo/settings", "{");
      for (const at of [1, 2]) {
        const messages = [{ role: "user", content: "x".repeat(2_000_000) }];
        entry(at, JSON.stringify({ title: `Old ${at}`, updated: at, messages }));
      }
    });
    await page.reload();
    await page.waitForSelector("#state.good");
    assert.equal(await page.locator("#conversations li").count(), 2);
    await converse(page, server, "Hi", "y".repeat(2_000_000));
    assert.deepEqual(await page.locator("#conversations .open").allTextContents(), ["Hi", "Old 2"]);
  },
  async "Esc stops the answer, keeps what came, and frees the server"({ page, server }) {
    const call = await ask(page, server, "Tell me of ships");
    call.say("The story");
    await page.waitForFunction(() => document.querySelector(".assistant .text")?.textContent);
    await page.keyboard.press("Escape");
    await call.ended;
    assert.equal(await last(page).locator(".text").textContent(), "The story");
    assert.match(await last(page).locator(".meta").textContent(), /Stopped/);
    assert.ok(await page.evaluate(() => document.activeElement.id === "text"));
  },
  async "a failed question is shown with Retry, and asked once"({ page, server }) {
    (await ask(page, server, "Hi")).refuse(503, "no worker is ready");
    assert.equal(await failureOf(page), "no worker is ready");
    await last(page).locator(".retry").click();
    const call = await server.next();
    assert.deepEqual(sent(call), [["user", "Hi"]]);
    call.say("Hello");
    call.end();
    await page.waitForSelector("#send:visible");
    assert.equal(await page.locator(".failure:visible").count(), 0);
  },
  async "a question without an answer is not sent with the next one"({ page, server }) {
    (await ask(page, server, "First")).refuse(503, "busy");
    await page.waitForSelector(".failure:visible");
    assert.deepEqual(sent(await ask(page, server, "Second")), [["user", "Second"]]);
  },
  async "a lost connection is told in words, and Retry goes on from there"({ page, server }) {
    const call = await ask(page, server, "Hi");
    call.say("Hel");
    await page.waitForFunction(() => document.querySelector(".assistant .text")?.textContent);
    call.cut();
    assert.match(await failureOf(page), /connection was lost/);
    await last(page).locator(".retry").click();
    const next = await server.next();
    assert.deepEqual(sent(next), [["user", "Hi"], ["assistant", "Hel"]]);
    assert.equal(next.body.continue_final_message, true);
    next.say("lo");
    next.end();
    await page.waitForSelector("#send:visible");
    assert.equal(await last(page).locator(".text").textContent(), "Hello");
  },
  async "a server that is gone is told in words"({ page }) {
    await page.route("**/v1/chat/completions", (route) => route.abort());
    await page.fill("#text", "Hi");
    await page.press("#text", "Enter");
    assert.match(await failureOf(page), /cannot be reached/);
  },
  async "an answer cut at its limit says so, and Continue goes on"({ page, server }) {
    await converse(page, server, "Tell", "Once upon", "length");
    assert.match(await last(page).locator(".meta").textContent(), /Cut at max tokens/);
    await last(page).locator(".continue").click();
    const call = await server.next();
    assert.deepEqual(sent(call).at(-1), ["assistant", "Once upon"]);
    assert.equal(call.body.continue_final_message, true);
    call.say(" a time");
    call.end();
    await page.waitForSelector("#send:visible");
    assert.equal(await last(page).locator(".text").textContent(), "Once upon a time");
    assert.equal(await last(page).locator(".continue:visible").count(), 0);
  },
  async "a key is asked for, focused, used at once, and kept for the tab alone"({ browser, server }) {
    server.key = "sesame";
    const context = await browser.newContext();
    const page = await context.newPage();
    await page.goto(`${server.url}/ui`);
    await page.waitForSelector("#key-dialog[open]");
    assert.ok(await page.evaluate(() => document.activeElement.id === "key"));
    await assertAccessible(page);
    await page.keyboard.press("Escape");
    await page.fill("#text", "Hi");
    await page.press("#text", "Enter");
    await page.waitForSelector("#key-dialog[open]");
    await page.keyboard.type("wrong");
    await page.keyboard.press("Enter");
    await page.waitForFunction(() => document.querySelector("#key-reason").textContent.includes("does not accept"));
    await page.fill("#key", "sesame");
    await page.keyboard.press("Enter");
    const call = await server.next();
    assert.deepEqual([sent(call), call.key], [[["user", "Hi"]], "Bearer sesame"]);
    call.say("Hello");
    call.end();
    await page.waitForSelector("#send:visible");
    await page.reload();
    await page.waitForSelector("#state.good");
    assert.equal(await page.locator("#key-dialog[open]").count(), 0);
    const kept = await page.evaluate(() => JSON.stringify({ ...localStorage }));
    assert.ok(!kept.includes("sesame"), kept);
    await context.close();
  },
  async "Markdown is shown, and cannot put anything into the page"({ page, server }) {
    const text = [
      "# Title", "Some **bold _and italic_** with `co<b>de` and snake_case_name, 2 * 3 * 4.", "- one\n  - inner\n- two",
      "3. third\n4. fourth", "| a | b |\n| --- | ---: |\n| 1 | 2 |", "> quoted", "```python\ndef f():\n    return \"<script>\"\n```",
      "<img src=x onerror=\"window.hacked=1\"><script>window.hacked=1</script><iframe src=//evil></iframe>",
      "[bad](javascript:window.hacked=1) ![pic](http://evil/x.png) [good](http://127.0.0.1/x_(y))",
      "[a](data:text/html,<script>window.hacked=1</script>) <style>body{display:none}</style>",
      "```<img/src=x/onerror=window.hacked=1>\n</code><img src=x onerror=window.hacked=1>\n```",
    ].join("\n\n");
    await converse(page, server, "<img src=x onerror=window.hacked=1>", text);
    const body = last(page).locator(".text");
    const count = (selector) => body.locator(selector).count();
    assert.equal(await body.locator("strong").textContent(), "bold and italic");
    assert.equal(await body.locator("p code").textContent(), "co<b>de");
    assert.equal(await body.locator("p").first().textContent(), "Some bold and italic with co<b>de and snake_case_name, 2 * 3 * 4.");
    assert.deepEqual([await count("ul ul li"), await count("ul > li"), await count("ol[start='3'] > li")], [1, 3, 2]);
    assert.deepEqual([await count("th"), await count("td.right"), await count("blockquote")], [2, 1, 1]);
    assert.equal(await body.locator(".code code").first().textContent(), 'def f():\n    return "<script>"');
    assert.equal(await body.locator(".code .language").first().textContent(), "python");
    assert.equal(await page.locator("#messages :is(img, script, iframe, style, [onerror], [style])").count(), 0);
    const hrefs = await page.locator("#messages a").evaluateAll((all) => all.map((each) => each.href));
    assert.deepEqual(hrefs, ["http://evil/x.png", "http://127.0.0.1/x_(y)"]);
    assert.equal(await page.evaluate(() => window.hacked), undefined);
  },
  async "no text makes the page slow or lets its nesting grow without end"({ page }) {
    const texts = ["*", "_", "**a ", "`", "``a`", "[", "[a](", "> ", "- ", "|", "~~", "<br", "\\", "http://", "\n", "#", "'\"", "/*", "1. "];
    const most = await page.evaluate(async (all) => {
      const { showMarkdown } = await import("./ui/markdown.js");
      const depthOf = (node) => 1 + Math.max(0, ...[...node.children].map(depthOf));
      let most = 0;
      for (const text of all) {
        for (const shown of [text.repeat(20_000), `a ${text.repeat(20_000)} b`, `${text.repeat(500)}\n`.repeat(40)]) {
          const into = document.createElement("div");
          showMarkdown(into, shown);
          most = Math.max(most, depthOf(into));
        }
      }
      return most;
    }, texts);
    assert.ok(most < 100, String(most));
  },
  async "while it streams, what is shown already stays as it is"({ page, server }) {
    const call = await ask(page, server, "Hi");
    call.say("First paragraph.\n\nSecond");
    await page.waitForFunction(() => document.querySelectorAll(".assistant p").length === 2);
    await page.evaluate(() => (document.querySelector(".assistant p").mine = true));
    call.say(" paragraph.\n\nThird");
    await page.waitForFunction(() => document.querySelectorAll(".assistant p").length === 3);
    assert.ok(await page.evaluate(() => document.querySelector(".assistant p").mine));
  },
  async "one can read back while it streams, and returns to the end"({ page, server }) {
    const call = await ask(page, server, "Hi");
    call.say(LONG);
    const top = () => page.evaluate(() => document.querySelector("#messages").scrollTop);
    await page.waitForFunction(() => document.querySelector("#messages").scrollTop > 500);
    await page.evaluate(() => (document.querySelector("#messages").scrollTop = 100));
    await page.waitForSelector("#latest:visible");
    call.say(`\n\nMore. ${LONG}\n\nThe end.`);
    await page.waitForFunction(() => document.querySelector(".assistant").textContent.includes("The end."));
    assert.equal(await top(), 100);
    await page.click("#latest");
    assert.ok((await top()) > 1000);
    call.say("\n\nYet more.");
    const isAtEnd = () => {
      const { scrollHeight, scrollTop, clientHeight } = document.querySelector("#messages");
      return document.querySelector(".assistant").textContent.includes("Yet more.") && scrollHeight - scrollTop - clientHeight < 2;
    };
    await page.waitForFunction(isAtEnd);
  },
  async "an answer can be had again, and a question edited"({ page, server }) {
    await converse(page, server, "One", "First");
    await converse(page, server, "Two", "Second");
    await last(page).locator(".regenerate").click();
    const again = await server.next();
    assert.deepEqual(sent(again), [["user", "One"], ["assistant", "First"], ["user", "Two"]]);
    again.say("Other");
    again.end();
    await page.waitForSelector("#send:visible");
    await page.locator("article.user").first().hover();
    await page.locator("article.user .edit").first().click();
    assert.equal(await page.inputValue("#text"), "One");
    const edited = await converse(page, server, "Uno", "Primo");
    assert.deepEqual(sent(edited), [["user", "Uno"]]);
    assert.equal(await page.locator("#messages article").count(), 2);
  },
  async "answers and code can be copied, and a conversation exported"({ page, server }) {
    await page.context().grantPermissions(["clipboard-read", "clipboard-write"]);
    const text = "Look:\n\n```js\nlet a = 1;\n```";
    await converse(page, server, "Code", text);
    const clipboard = () => page.evaluate(() => navigator.clipboard.readText());
    await last(page).locator(".copy").click();
    await page.waitForSelector("#toast:visible");
    assert.equal(await clipboard(), text);
    await last(page).locator(".copy-code").click();
    await page.waitForFunction(async () => (await navigator.clipboard.readText()) === "let a = 1;");
    const [download] = await Promise.all([page.waitForEvent("download"), page.click("#export")]);
    assert.equal(download.suggestedFilename(), "Code.md");
    assert.ok(readFileSync(await download.path(), "utf8").includes(text));
  },
  async "reasoning folds away when the answer begins, and is not sent back"({ page, server }) {
    const call = await ask(page, server, "Hi");
    call.say("Let me think.", "reasoning_content");
    await page.waitForSelector(".assistant .reasoning[open]");
    call.say("Hello");
    await page.waitForSelector(".assistant .reasoning:not([open])");
    call.end();
    await page.waitForSelector("#send:visible");
    assert.deepEqual(sent(await ask(page, server, "More"))[1], ["assistant", "Hello"]);
  },
  async "the box is in sight and as wide as the chat, with the focus on load"({ page, server }) {
    assert.ok(await page.evaluate(() => document.activeElement.id === "text"));
    await converse(page, server, "Hi", LONG);
    const box = await page.locator("#text").boundingBox(), answer = await last(page).boundingBox();
    assert.ok(box.y + box.height <= 720 && box.width > 0.85 * answer.width, JSON.stringify([box, answer]));
  },
  async "a narrow screen has no horizontal scroll, and the box below a long conversation"({ page, server }) {
    await page.setViewportSize({ width: 375, height: 667 });
    assert.ok(await isWithinWidth(page));
    const wide = `${"x".repeat(300)}\n\n| ${"wide cell | ".repeat(9)}\n|${" --- |".repeat(9)}\n\n\`\`\`\n${"y".repeat(300)}\n\`\`\`\n\n${LONG}`;
    await converse(page, server, "z".repeat(200), wide);
    assert.ok(await isWithinWidth(page));
    const clipped = await page.evaluate(() => [...document.querySelectorAll("#messages article")].some((each) => each.getBoundingClientRect().right > innerWidth));
    assert.equal(clipped, false);
    const box = await page.locator("#text").boundingBox();
    assert.ok(box.y + box.height <= 667 && box.width > 250, JSON.stringify(box));
    await page.click("#show-panel");
    await page.fill("[name=temperature]", "1");
    assert.ok(await isWithinWidth(page));
    await assertAccessible(page);
    await page.keyboard.press("Escape");
    await page.click("#show-history");
    await page.click("#new");
    assert.ok(await page.isVisible("#welcome"));
  },
  async "axe-core finds nothing, light and dark"({ page, server }) {
    await assertAccessible(page);
    await converse(page, server, "Hi", `# Title\n\n${LONG}\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n\`\`\`python\ndef f(): return 1  # one\n\`\`\`\n\n> quote [a](http://b)`, "length");
    (await ask(page, server, "Fail")).refuse(503, "busy");
    await page.waitForSelector(".failure:visible");
    for (const colorScheme of ["light", "dark"]) {
      await page.emulateMedia({ colorScheme });
      await assertAccessible(page);
    }
  },
  async "the gauges show what the server says"({ page, server }) {
    server.load = { ...server.load, running: 3, waiting: 2, tokens_per_s: 41.6 };
    await page.waitForFunction(() => document.querySelector("[data-value=running]").textContent === "3");
    const value = (name) => page.textContent(`[data-value=${name}]`);
    assert.deepEqual([await value("waiting"), await value("tokens_per_s"), await value("kv_used")], ["2", "42", "40 of 100 blocks"]);
  },
};

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
try {
  for (const [name, check] of Object.entries(checks)) {
    if (process.env.ONLY && !name.includes(process.env.ONLY)) continue;
    const server = await startServer(folder, JSON.parse(headers));
    const context = await browser.newContext({ viewport: { width: 1280, height: 720 } });
    const page = await context.newPage();
    page.setDefaultTimeout(15_000);
    const problems = [], foreign = [];
    page.on("pageerror", (error) => problems.push(String(error)));
    page.on("console", (message) => message.type() === "error" && !/Failed to load resource/.test(message.text()) && problems.push(message.text()));
    page.on("request", (request) => /^(blob|data):/.test(request.url()) || request.url().startsWith(server.url) || foreign.push(request.url()));
    let error = null;
    try {
      await page.goto(`${server.url}/ui`);
      await page.waitForSelector("#state.good");
      await check({ browser, page, server });
      assert.deepEqual([problems, foreign], [[], []]);
    } catch (failure) {
      error = failure.stack;
    }
    await context.close();
    server.close();
    console.log(JSON.stringify({ name, error }));
  }
} finally {
  await browser.close();
}
