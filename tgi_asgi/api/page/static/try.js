// A form that sends a route's request and shows the answer as it arrives, with the equivalent curl command.
import { seconds } from "./answer.js";
import { copyButton, h } from "./dom.js";
import { addressOf } from "./server.js";

const MAX_SHOWN = 200_000; // characters of an answer

/** Return the form of a route. */
export function tryForm({ method, path, parameters = [], requestBody, security }, schemas, server) {
  const inputs = new Map(
    parameters.map(({ name }) => [name, h("input", { required: true, spellcheck: "false" })]),
  );
  const area = requestBody && h("textarea", { class: "code", spellcheck: "false", "aria-label": "Body" });
  if (area) {
    area.value = JSON.stringify(schemas.example(requestBody.content["application/json"].schema), null, 2);
    area.rows = Math.min(18, area.value.split("\n").length);
  }
  const send = h("button", { class: "strong" }, "Send");
  const stop = h("button", { type: "button", hidden: true }, "Stop");
  const answer = h("div", { class: "answer", "aria-live": "polite" });
  const address = () =>
    addressOf(path.replace(/\{(\w+)\}/g, (_, name) => encodeURIComponent(inputs.get(name).value)));

  async function run(event) {
    event.preventDefault();
    const stopper = new AbortController();
    stop.onclick = () => stopper.abort();
    [send.hidden, stop.hidden] = [true, false];
    const began = performance.now();
    const line = h("p", { class: "type" }, "Sent");
    const text = h("pre", { tabindex: 0, "aria-label": "Answer", "aria-live": "off" });
    answer.replaceChildren(line, text);
    try {
      const target = address();
      const response = await server.send(target.href.slice(addressOf("").href.length), {
        method: method.toUpperCase(),
        body: area?.value,
        signal: stopper.signal,
      });
      const kind = response.headers.get("content-type") ?? "no body";
      const told = () => [response.status, seconds(performance.now() - began), kind].join(" · ");
      line.textContent = told();
      await read(response, text);
      line.textContent = told();
    } catch (error) {
      line.textContent = stopper.signal.aborted ? "Stopped" : error.message;
    }
    [send.hidden, stop.hidden] = [false, true];
  }

  const curl = () => {
    const parts = [`curl ${method === "get" ? "" : `-X ${method.toUpperCase()} `}'${address()}'`];
    if (security) parts.push('-H "Authorization: Bearer $KEY"');
    if (area)
      parts.push("-H 'Content-Type: application/json'", `-d '${area.value.replaceAll("'", "'\\''")}'`);
    return parts.join(" \\\n  ");
  };
  const labels = Array.from(inputs, ([name, input]) => h("label", {}, name, input));
  return h(
    "form",
    { class: "try", onsubmit: run },
    labels,
    area,
    h("div", { class: "row" }, send, stop, copyButton(curl, "Copy as a curl command")),
    answer,
  );
}

async function read(response, place) {
  const isJson = response.headers.get("content-type")?.includes("application/json");
  const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let part; reader && !(part = await reader.read()).done && text.length < MAX_SHOWN;) {
    text += part.value;
    if (!isJson) place.append(part.value);
  }
  if (text.length >= MAX_SHOWN) reader.cancel();
  if (isJson) place.textContent = pretty(text);
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
