// Streams one answer. node client.js ADDRESS PROMPT
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [address, prompt] = process.argv.slice(2);
const options = { keepCase: true, longs: Number, enums: String, defaults: true, includeDirs: [process.env.PROTOS] };
const octavo = grpc.loadPackageDefinition(loader.loadSync("octavo/inference/v1/generation.proto", options)).octavo;
const client = new octavo.inference.v1.GenerationService(address, grpc.credentials.createInsecure());

const messages = [{ role: "user", parts: [{ text: prompt }] }];
const generation = { model: "smollm2-135m-instruct", chat: { messages }, sampling: { temperature: 0 } };
const call = client.GenerateStream({ generation }, { deadline: Date.now() + 120_000 });
let completed = null;
call.on("data", ({ event }) => {
  if (event.delta) process.stdout.write(event.delta.text);
  if (event.completed) completed = event.completed;
});
call.on("error", (error) => {
  console.error(`${error.code}: ${error.details}`); // the details in error.metadata say what to change
  process.exitCode = 1;
});
call.on("end", () => {
  if (completed) console.log(`\n${completed.usage.output_tokens} tokens`);
});
