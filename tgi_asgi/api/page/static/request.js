// Builds the body of a chat request from a conversation and the settings.

/** Return the body that asks for the message following these. */
export function requestOf(path, options, model, { isContinued = false } = {}) {
  const messages = path.map(messageOf);
  if (options.system) messages.unshift({ role: "system", content: options.system });
  const body = { model, messages, stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"]) {
    if (options[name] !== undefined) body[name] = options[name];
  }
  if (options.stop?.length) body.stop = options.stop;
  if (options.reasoning_effort) body.reasoning_effort = options.reasoning_effort;
  if (options.tools?.length) body.tools = options.tools;
  if (isContinued) body.continue_final_message = true;
  return body;
}

function messageOf({ id, role, content, images, reasoning, calls, callId }) {
  if (role === "tool") return { role, content, tool_call_id: callId ?? id };
  if (images?.length) {
    const pictures = images.map((url) => ({ type: "image_url", image_url: { url } }));
    return { role, content: content ? [...pictures, { type: "text", text: content }] : pictures };
  }
  const message = { role, content };
  if (reasoning) message.reasoning_content = reasoning;
  if (calls?.length) {
    message.tool_calls = calls.map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments },
    }));
  }
  return message;
}
