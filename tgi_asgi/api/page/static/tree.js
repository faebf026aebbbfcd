// A conversation as a tree: to edit a message or ask again begins a branch beside it, and nothing is lost.
import { newId } from "./dom.js";

const TITLE_LENGTH = 60;

/** Return a new, empty conversation. `leaf` is the message that is shown last. */
export function newConversation() {
  return { id: newId(), title: "", updated: Date.now(), nodes: {}, leaf: null };
}

/** Put a message behind another (null: first), show it last, and return it. */
export function append(conversation, parent, fields) {
  const node = { id: newId(), parent, content: "", ...fields };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  conversation.updated = Date.now();
  if (!conversation.title && node.role === "user") conversation.title = titleOf(node.content);
  return node;
}

/** Return the messages from the first to the one shown last, or to another. */
export function pathTo(conversation, id = conversation.leaf) {
  const path = [];
  for (let node = conversation.nodes[id]; node; node = conversation.nodes[node.parent]) path.push(node);
  return path.reverse();
}

/** Return the messages with the same parent, oldest first: the branches at this place, this one included. */
export function branches(conversation, node) {
  return Object.values(conversation.nodes).filter((other) => other.parent === node.parent);
}

/** Show the newest end of another branch. */
export function select(conversation, node) {
  let last = node;
  for (let next = node; next; next = Object.values(conversation.nodes).findLast((each) => each.parent === last.id)) {
    last = next;
  }
  conversation.leaf = last.id;
}

/** Return whether a value, from a file, can be shown as a conversation. */
export function isConversation(value) {
  const nodes = value?.nodes;
  if (typeof value?.id !== "string" || typeof value.title !== "string" || typeof nodes !== "object" || !nodes) return false;
  if (value.leaf !== null && !Object.hasOwn(nodes, value.leaf)) return false;
  // Each message stands behind its parent, as this page writes them: so there are no circles.
  const known = new Set([null]);
  return Object.entries(nodes).every(([id, node]) => {
    const isRight =
      node?.id === id &&
      known.has(node.parent) &&
      ["user", "assistant", "tool"].includes(node.role) &&
      typeof node.content === "string" &&
      (node.images ?? []).every?.((image) => typeof image === "string" && image.startsWith("data:image/")) &&
      (node.calls ?? []).every?.((call) => typeof call?.name === "string" && typeof call.arguments === "string") &&
      typeof (node.reasoning ?? "") === "string";
    known.add(id);
    return isRight;
  });
}

function titleOf(text) {
  const line = text.trim().split("\n", 1)[0];
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1)}…` : line || "Images";
}
