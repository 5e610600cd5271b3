// What OpenAI's Node client gets from a running server: node checks.mjs BASE_URL MODEL.
// Prints one line of JSON for each check: its name, and what went wrong or null.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const capital = [{ role: "user", content: "What is the capital of France?" }];
const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Weather of a city",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];
const called = {
  id: "c1",
  type: "function",
  function: { name: "get_weather", arguments: '{"city": "Rome"}' },
};
// A small model repeats a pattern: after a call in its past it makes another one.
const weather = [
  { role: "user", content: "What is the weather in Rome?" },
  { role: "assistant", content: null, tool_calls: [called] },
  { role: "tool", tool_call_id: "c1", content: "sunny" },
  { role: "assistant", content: "It is sunny in Rome." },
  { role: "user", content: "What is the weather in Paris?" },
];
const chat = (options) =>
  client.chat.completions.create({ model, messages: capital, temperature: 0, max_tokens: 24, ...options });
const respond = (options) =>
  client.responses.create({ model, input: capital[0].content, temperature: 0, max_output_tokens: 24, ...options });

async function collect(stream) {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}

async function fails(kind, call, param) {
  await assert.rejects(call, (error) => {
    assert.ok(error instanceof kind, `${error.constructor.name}: ${error.message}`);
    if (param !== undefined) assert.equal(error.param, param);
    assert.ok(error.requestID ?? error.headers?.get("x-request-id"));
    return true;
  });
}

const checks = {
  async "models are listed"() {
    const models = await client.models.list();
    assert.ok(models.data.some((each) => each.id === model));
  },
  async "a model is described"() {
    assert.equal((await client.models.retrieve(model)).id, model);
  },
  async "a chat is answered"() {
    const answer = await chat();
    assert.match(answer.choices[0].message.content, /Paris/);
    assert.ok(["stop", "length"].includes(answer.choices[0].finish_reason));
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  },
  async "the request's id comes back"() {
    const { request_id: id } = await chat({ max_tokens: 1 }).withResponse();
    assert.ok(id);
    const given = await client.chat.completions
      .create({ model, messages: capital, max_tokens: 1 }, { headers: { "x-request-id": "node-1" } })
      .withResponse();
    assert.equal(given.request_id, "node-1");
  },
  async "a streamed chat is the whole one"() {
    const whole = await chat();
    const chunks = await collect(await chat({ stream: true }));
    const text = chunks.map((chunk) => chunk.choices[0]?.delta?.content ?? "").join("");
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(chunks.at(-1).choices[0].finish_reason, whole.choices[0].finish_reason);
  },
  async "usage ends a stream if asked for"() {
    const chunks = await collect(await chat({ stream: true, stream_options: { include_usage: true } }));
    assert.ok(chunks.at(-1).usage.completion_tokens > 0);
    assert.equal(chunks.at(-1).choices.length, 0);
  },
  async "the stream helper puts a chat together"() {
    const runner = client.chat.completions.stream({ model, messages: capital, temperature: 0, max_tokens: 8 });
    const message = await runner.finalMessage();
    assert.ok(message.content.length > 0);
  },
  async "several choices"() {
    const answer = await chat({ n: 3, temperature: 1, seed: 5, max_tokens: 6 });
    assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1, 2]);
  },
  async "log probabilities"() {
    const answer = await chat({ logprobs: true, top_logprobs: 2, max_tokens: 3 });
    const content = answer.choices[0].logprobs.content;
    assert.equal(content.length, 3);
    assert.ok(content.every((entry) => entry.top_logprobs.length === 2 && entry.logprob <= 0));
  },
  async "a stop string ends a chat"() {
    const answer = await chat({ stop: "Paris" });
    assert.equal(answer.choices[0].finish_reason, "stop");
    assert.ok(!answer.choices[0].message.content.includes("Paris"));
  },
  async "a tool is called"() {
    const answer = await chat({ messages: weather, tools, max_tokens: 60 });
    const [call] = answer.choices[0].message.tool_calls;
    assert.equal(answer.choices[0].finish_reason, "tool_calls");
    assert.equal(call.function.name, "get_weather");
    assert.equal(JSON.parse(call.function.arguments).city, "Paris");
  },
  async "a tool is called in a stream"() {
    const runner = client.chat.completions.stream({
      model, messages: weather, tools, temperature: 0, max_tokens: 60,
    });
    const completion = await runner.finalChatCompletion();
    const [call] = completion.choices[0].message.tool_calls;
    assert.equal(JSON.parse(call.function.arguments).city, "Paris");
    assert.equal(completion.choices[0].finish_reason, "tool_calls");
  },
  async "without a choice no tool is called"() {
    const answer = await chat({ messages: weather, tools, tool_choice: "none", max_tokens: 8 });
    assert.equal(answer.choices[0].message.tool_calls, undefined);
  },
  async "a text is continued"() {
    const answer = await client.completions.create({
      model, prompt: "The capital of France is", temperature: 0, max_tokens: 4,
    });
    assert.match(answer.choices[0].text, /Paris/);
  },
  async "a streamed text is the whole one"() {
    const body = { model, prompt: "Once upon a time", temperature: 1, seed: 7, max_tokens: 12 };
    const whole = await client.completions.create(body);
    const chunks = await collect(await client.completions.create({ ...body, stream: true }));
    assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), whole.choices[0].text);
  },
  async "several prompts"() {
    const answer = await client.completions.create({ model, prompt: ["One,", "Two,"], max_tokens: 2 });
    assert.equal(answer.choices.length, 2);
  },
  async "a response has its text"() {
    const response = await respond();
    assert.match(response.output_text, /Paris/);
    assert.ok(response.usage.output_tokens > 0);
  },
  async "a response is streamed"() {
    const events = await collect(await respond({ stream: true }));
    const text = events.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta);
    assert.equal(events[0].type, "response.created");
    assert.ok(["response.completed", "response.incomplete"].includes(events.at(-1).type));
    assert.match(text.join(""), /Paris/);
  },
  async "the stream helper puts a response together"() {
    const stream = client.responses.stream({ model, input: capital[0].content, temperature: 0 });
    const response = await stream.finalResponse();
    assert.match(response.output_text, /Paris/);
  },
  async "a response calls a tool"() {
    const call = { type: "function_call", call_id: "c1", name: "get_weather", arguments: '{"city": "Rome"}' };
    const response = await respond({
      input: [
        weather[0], call, { type: "function_call_output", call_id: "c1", output: "sunny" }, weather[3], weather[4],
      ],
      tools: [{ type: "function", ...tools[0].function }],
      max_output_tokens: 60,
    });
    const made = response.output.find((item) => item.type === "function_call");
    assert.equal(JSON.parse(made.arguments).city, "Paris");
  },
  async "a wrong model is not found"() {
    await fails(OpenAI.NotFoundError, chat({ model: "nothing" }), "model");
  },
  async "a wrong parameter is named"() {
    await fails(OpenAI.BadRequestError, chat({ temperature: -1 }), "temperature");
  },
  async "a misspelt parameter is refused"() {
    await fails(OpenAI.BadRequestError, chat({ temprature: 1 }), "temprature");
  },
  async "a stored response is refused"() {
    await fails(OpenAI.BadRequestError, respond({ previous_response_id: "resp_1" }), "previous_response_id");
  },
  async "a stream can be left"() {
    const stream = await chat({ stream: true, max_tokens: 2000, ignore_eos: true });
    for await (const chunk of stream) if (chunk.choices[0].delta.content) break;
    assert.ok(stream.controller.signal.aborted);
  },
  async "a call can be aborted"() {
    const controller = new AbortController();
    const call = client.chat.completions.create(
      { model, messages: capital, max_tokens: 2000, ignore_eos: true }, { signal: controller.signal },
    );
    setTimeout(() => controller.abort(), 50);
    await assert.rejects(call, OpenAI.APIUserAbortError);
  },
};

for (const [name, check] of Object.entries(checks)) {
  let error = null;
  try {
    await check();
  } catch (caught) {
    error = String(caught.stack ?? caught);
  }
  console.log(JSON.stringify({ name, error }));
}
