// Uses the chat page in a real browser: node page.mjs CHROMIUM URL. Prints what was seen as JSON.
import { chromium } from "playwright-core";

const [executablePath, url] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
try {
  const page = await browser.newPage();
  const problems = [];
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
  await page.goto(`${url}/ui`);
  await page.waitForFunction(() => document.querySelector("#state").textContent === "ready");
  await page.fill("[name=temperature]", "0");
  await page.fill("[name=max_tokens]", "24");
  await page.fill("#text", "What is the capital of France?");
  await page.press("#text", "Enter");
  await page.waitForFunction(() => document.querySelector("article.assistant .meta")?.textContent.includes("tokens/s"));
  const answer = await page.textContent("#messages .assistant .text");
  await page.fill("[name=max_tokens]", "2000");
  await page.fill("#text", "Tell me a very long story. <img src=x onerror=alert(1)>");
  await page.click("#send");
  await page.waitForFunction(() => document.querySelectorAll("#messages .assistant .text")[1]?.textContent);
  await page.click("#stop");
  await page.waitForSelector("#send:visible");
  await page.waitForFunction(() => document.querySelector("[data-value=running]").textContent === "0");
  await page.fill("[name=max_tokens]", "9999999");
  await page.fill("#text", "Too much");
  await page.click("#send");
  const error = await page.textContent("#messages .failure:visible span");
  const seen = {
    answer,
    error,
    model: await page.inputValue("#model"),
    kv: await page.textContent("[data-value=kv_used]"),
    images: await page.locator("#messages img").count(),
    problems: problems.filter((each) => !each.includes("400 (Bad Request)")), // the one that was asked for
  };
  console.log(JSON.stringify(seen));
} finally {
  await browser.close();
}
