// The calls that guides show for OpenAI's Node SDK, against the server at BASE_URL; prints what came back.
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

const refusal = await client.chat.completions
  .create({ model: "tgi", messages: [] })
  .then(() => null, (error) => ({ name: error.constructor.name, status: error.status, type: error.type }));

console.log(JSON.stringify({ whole: completion.choices[0].message.content, text, chunks, refusal }));
