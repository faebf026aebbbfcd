// A conversation as a tree: editing a message or regenerating an answer adds a sibling branch, so nothing is lost.
import { newId } from "./dom.js";

const TITLE_LENGTH = 60;

/** Return a new, empty conversation. `leaf` is the last displayed message. */
export function newConversation() {
  return { id: newId(), title: "", updated: Date.now(), nodes: {}, leaf: null };
}

/** Append a message to another (null: as the first), make it the last displayed one, and return it. */
export function append(conversation, parent, fields) {
  const node = { id: newId(), parent, content: "", ...fields };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  conversation.updated = Date.now();
  if (!conversation.title && node.role === "user") conversation.title = titleOf(node.content);
  return node;
}

/** Return the messages from the first to the last displayed one, or to another. */
export function pathTo(conversation, id = conversation.leaf) {
  const path = [];
  for (let node = conversation.nodes[id]; node; node = conversation.nodes[node.parent]) path.push(node);
  return path.reverse();
}

/** Return the messages with the same parent, oldest first: the branches here, including this one. */
export function branches(conversation, node) {
  return Object.values(conversation.nodes).filter((other) => other.parent === node.parent);
}

/** Show another branch up to its newest leaf. */
export function select(conversation, node) {
  let last = node;
  for (
    let next = node;
    next;
    next = Object.values(conversation.nodes).findLast((each) => each.parent === last.id)
  ) {
    last = next;
  }
  conversation.leaf = last.id;
}

function titleOf(text) {
  const line = text.trim().split("\n", 1)[0];
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1)}…` : line || "Images";
}
