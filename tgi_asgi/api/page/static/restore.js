// Reads conversations from a file, which may contain anything: only data that this page would write is accepted.

const ID = /^[0-9a-f]{24}$/;
const ROLES = ["user", "assistant", "tool"];
const STATES = ["done", "stopped", "cut", "failed"];

const isText = (value) => typeof value === "string";
const isNumber = (value) => Number.isFinite(value);
const isCall = (value) => isText(value?.name) && isText(value.arguments) && isText(value.id);
const isImage = (value) => isText(value) && value.startsWith("data:image/");
const areAll = (test) => (value) => Array.isArray(value) && value.every(test);

// Fields that a message may have in addition to id, parent, role and content.
const FIELDS = {
  images: areAll(isImage),
  reasoning: isText,
  reasoningMs: isNumber,
  calls: areAll(isCall),
  callId: isText,
  model: isText,
  state: (value) => STATES.includes(value),
  error: isText,
  speed: (value) =>
    isNumber(value?.firstMs) &&
    isNumber(value.numTokens) &&
    (value.perSecond === null || isNumber(value.perSecond)),
};

/** Return the conversation in a value; throws if there is none. */
export function restored(value) {
  const { id, title, updated, nodes, leaf } = value ?? {};
  if (!ID.test(id) || !isText(title) || !isNumber(updated) || typeof nodes !== "object" || !nodes)
    throw new Error("It is no conversation.");
  const whole = { id, title, updated, nodes: {}, leaf };
  // Each message comes after its parent, as this page writes them, so there are no cycles.
  for (const node of Object.values(nodes)) {
    const isKnown = node?.parent === null || Object.hasOwn(whole.nodes, node?.parent);
    if (!isKnown || !ID.test(node.id) || !ROLES.includes(node.role) || !isText(node.content))
      throw new Error("A message in it is none.");
    whole.nodes[node.id] = restoredNode(node);
  }
  if (!Object.hasOwn(whole.nodes, leaf)) throw new Error("Its last message is missing.");
  return whole;
}

function restoredNode(node) {
  const { id, parent, role, content } = node;
  const result = { id, parent, role, content };
  for (const [name, test] of Object.entries(FIELDS)) {
    if (node[name] === undefined) continue;
    if (!test(node[name])) throw new Error(`In a message, ${name} is not right.`);
    result[name] = node[name];
  }
  return result;
}
