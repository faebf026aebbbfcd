// Structured outputs, tools and responses with OpenAI's Node SDK, against the server at BASE_URL.
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "-", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the weather in Paris?" }];
const parameters = {
  type: "object",
  properties: { city: { type: "string", minLength: 1, maxLength: 20 }, days: { type: "integer", minimum: 1, maximum: 9 } },
  required: ["city", "days"],
  additionalProperties: false,
};
const common = { model: "tgi", messages, temperature: 0, max_tokens: 120 };

const called = [];
const runner = client.chat.completions.runTools(
  {
    ...common,
    parallel_tool_calls: false,
    tool_choice: "required",
    tools: [
      {
        type: "function",
        function: {
          name: "weather",
          parameters,
          parse: JSON.parse,
          function: (args) => {
            called.push(args);
            return "20 C";
          },
        },
      },
    ],
  },
  { maxChatCompletions: 2 },
);
await runner.done();

const tools = [{ type: "function", function: { name: "weather", parameters, strict: true } }];
const stream = client.chat.completions.stream({ ...common, tools, tool_choice: "required", parallel_tool_calls: false });
const streamed = await stream.finalChatCompletion();

const parsed = await client.chat.completions.parse({
  ...common,
  response_format: { type: "json_schema", json_schema: { name: "weather", strict: true, schema: parameters } },
});

// The same with zod: schemas are generated from types, and answers are parsed into them.
const Weather = z.object({ city: z.string().min(1).max(20), days: z.number().int().min(1).max(9) });
const typed = await client.chat.completions.parse({ ...common, response_format: zodResponseFormat(Weather, "weather") });
const typedCalls = [];
const typedRunner = client.chat.completions.runTools(
  {
    ...common,
    stream: true,
    parallel_tool_calls: false,
    tool_choice: "required",
    tools: [zodFunction({ name: "weather", parameters: Weather, function: (args) => (typedCalls.push(args), "20 C") })],
  },
  { maxChatCompletions: 2 },
);
await typedRunner.done();
const written = await client.responses.parse({
  model: "tgi",
  input: "What is the weather in Paris?",
  temperature: 0,
  max_output_tokens: 120,
  text: { format: zodTextFormat(Weather, "weather") },
});

const types = [];
const responses = client.responses.stream({
  model: "tgi",
  input: "What is the weather in Paris?",
  temperature: 0,
  max_output_tokens: 120,
  tools: [{ type: "function", name: "weather", parameters, strict: true }],
  tool_choice: "required",
  parallel_tool_calls: false,
});
for await (const event of responses) types.push(event.type);
const response = await responses.finalResponse();

console.log(
  JSON.stringify({
    called,
    streamed: streamed.choices[0].message.tool_calls.map((call) => JSON.parse(call.function.arguments)),
    reason: streamed.choices[0].finish_reason,
    parsed: JSON.parse(parsed.choices[0].message.content),
    typed: typed.choices[0].message.parsed,
    typedCalls,
    written: written.output_parsed,
    first: types[0],
    last: types.at(-1),
    response: response.output.map((item) => [item.type, JSON.parse(item.arguments)]),
  }),
);
