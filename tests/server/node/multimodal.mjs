// Images in chats, and embeddings, with OpenAI's Node SDK, against the server at BASE_URL; prints the results.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "-" });
const messages = [
  {
    role: "user",
    content: [
      { type: "text", text: "What is in" },
      { type: "image_url", image_url: { url: process.env.PICTURE, detail: "low" } },
    ],
  },
];

const options = { model: "tgi", max_tokens: 8, temperature: 0 };
const seen = await client.chat.completions.create({ ...options, messages });
const response = await client.responses.create({
  model: "tgi",
  max_output_tokens: 16,
  temperature: 0,
  input: [
    {
      role: "user",
      content: [
        { type: "input_text", text: "What is in" },
        { type: "input_image", image_url: process.env.PICTURE, detail: "auto" },
      ],
    },
  ],
});
const vectors = await client.embeddings.create({ model: "tgi", input: ["one text", "another"] });
const floats = await client.embeddings.create({ model: "tgi", input: "one text", encoding_format: "float" });
const refusal = await client.chat.completions
  .create({
    ...options,
    messages: [{ role: "user", content: [{ type: "image_url", image_url: { url: "data:image/png;base64,AAAA" } }] }],
  })
  .then(() => null, (error) => ({ status: error.status, param: error.param }));

console.log(
  JSON.stringify({
    chat: seen.choices[0].message.content,
    tokens: seen.usage.prompt_tokens,
    response: response.output_text,
    vectors: vectors.data.map((each) => each.embedding),
    float: floats.data[0].embedding,
    refusal,
  }),
);
