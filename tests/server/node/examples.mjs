// The guides' calls with OpenAI's Node SDK, against the server at BASE_URL; prints the results.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "-" });
const messages = [
  { role: "system", content: "You are a helpful assistant." },
  { role: "user", content: "What is deep learning?" },
];

const completion = await client.chat.completions.create({
  model: "tgi",
  messages,
  max_tokens: 20,
  temperature: 0,
});

const stream = await client.chat.completions.create({
  model: "tgi",
  messages,
  max_tokens: 20,
  temperature: 0,
  stream: true,
});
let text = "";
let chunks = 0;
for await (const chunk of stream) {
  text += chunk.choices[0].delta.content ?? "";
  chunks += 1;
}

// The helper that accumulates a stream and checks it.
const helper = client.chat.completions.stream({
  model: "tgi",
  messages,
  max_tokens: 20,
  temperature: 0,
  stream_options: { include_usage: true },
});
let deltas = "";
helper.on("content", (delta) => (deltas += delta));
const final = await helper.finalChatCompletion();
const accumulated = {
  text: final.choices[0].message.content,
  deltas,
  role: final.choices[0].message.role,
  finish: final.choices[0].finish_reason,
  tokens: final.usage.completion_tokens,
};

const parts = await client.completions.create({
  model: "tgi",
  prompt: "The sky is",
  max_tokens: 4,
  temperature: 0,
  stream: true,
});
let continued = "";
for await (const part of parts) continued += part.choices[0].text;

const names = [];
for await (const model of client.models.list()) names.push(model.id);
const named = (await client.models.retrieve(names[0])).id;

const refusal = await client.chat.completions
  .create({ model: "tgi", messages: [] })
  .then(() => null, (error) => ({ name: error.constructor.name, status: error.status, type: error.type }));

const whole = completion.choices[0].message.content;
const usage = completion.usage.completion_tokens;
console.log(JSON.stringify({ whole, usage, text, chunks, accumulated, continued, names, named, refusal }));
