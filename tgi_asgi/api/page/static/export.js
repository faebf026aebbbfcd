// Conversations as files: JSON for importing again, Markdown for reading.
import { save } from "./dom.js";
import { restored } from "./restore.js";
import { pathTo } from "./tree.js";

const FORMAT = "tgi-asgi conversations 1";
const NAMES = { user: "You", assistant: "Model", tool: "Tool" };

/** Save conversations with all their branches. */
export function saveJson(conversations, name) {
  save(
    `${fileName(name)}.json`,
    JSON.stringify({ format: FORMAT, conversations }, null, 1),
    "application/json",
  );
}

/** Save the displayed branch. */
export function saveMarkdown(conversation) {
  const parts = pathTo(conversation).map(({ role, content, calls = [], images = [] }) => {
    const notes = [
      ...images.map(() => "*(an image)*"),
      ...calls.map((call) => `\`${call.name}(${call.arguments})\``),
    ];
    return [`## ${NAMES[role]}`, content, ...notes].filter(Boolean).join("\n\n");
  });
  save(
    `${fileName(conversation.title)}.md`,
    [`# ${conversation.title}`, ...parts, ""].join("\n\n"),
    "text/markdown",
  );
}

/** Return the conversations in a file's text; throws if the file was not written by this page. */
export function readJson(text) {
  const { format, conversations } = JSON.parse(text);
  if (format !== FORMAT || !Array.isArray(conversations)) throw new Error("It is not a file of conversations.");
  return conversations.map(restored);
}

function fileName(title) {
  return (
    title
      .replace(/[^\p{L}\p{N}]+/gu, "-")
      .replace(/^-|-$/g, "")
      .slice(0, 50)
      .toLowerCase() || "conversation"
  );
}
