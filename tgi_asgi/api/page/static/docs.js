// The API's description from the server's OpenAPI document: each route with its fields and a form to try it.
import { byId, h, icon, prepare, save, setUpTheme } from "./dom.js";
import { askKey } from "./key.js";
import { Schemas } from "./schema.js";
import { Server } from "./server.js";
import { tryForm } from "./try.js";

const METHODS = ["get", "post", "put", "patch", "delete"];

prepare();
setUpTheme(byId("theme"));
const server = new Server(askKey);
const administrator = new Server(askKey, "tgi-asgi.admin-key");
byId("document").addEventListener("click", download);
start();

async function start() {
  let description;
  let model;
  try {
    description = await (await server.request("api-doc/openapi.json")).json();
  } catch (error) {
    const again = h(
      "button",
      { type: "button", onclick: () => location.reload() },
      icon("redo"),
      "Try again",
    );
    byId("state").replaceChildren(`${error.message}. `, again);
    return;
  }
  try {
    model = (await server.models())[0].id;
  } catch {
    model = "tgi"; // while the model loads: a name that is always accepted
  }
  show(description, model);
}

function show({ info, paths, components }, model) {
  document.title = byId("title").textContent = `${info.title} ${info.version}`;
  byId("about").textContent = info.description;
  const schemas = new Schemas(components.schemas, model);
  const groups = new Map();
  for (const [path, own] of Object.entries(paths)) {
    for (const method of METHODS.filter((name) => own[name])) {
      const operation = { ...own[method], method, path };
      const tag = operation.tags?.[0] ?? "Other";
      groups.set(tag, [...(groups.get(tag) ?? []), operation]);
    }
  }
  const server = groups.get("Server"); // probes and similar routes come last
  if (groups.delete("Server")) groups.set("Server", server);
  byId("tags").append(
    ...Array.from(groups.keys(), (tag) => h("a", { class: "quiet", href: `#tag-${tag}` }, tag)),
  );
  byId("routes").replaceChildren(
    ...Array.from(groups, ([tag, operations]) =>
      h(
        "section",
        { id: `tag-${tag}`, "aria-labelledby": `name-${tag}` },
        h("h2", { id: `name-${tag}` }, tag),
        operations.map((operation) => route(operation, schemas)),
      ),
    ),
  );
  showTarget();
  addEventListener("hashchange", showTarget);
}

/** Return a folded route; its contents are created when it is opened. */
function route(operation, schemas) {
  const { method, path, summary, operationId, security } = operation;
  const lock = security && h("span", { class: "lock", title: "Needs a key" }, "key");
  const inner = h("div", { class: "inner" });
  const fold = h(
    "details",
    { class: "route", id: operationId },
    h(
      "summary",
      {},
      h("span", { class: `method ${method}` }, method.toUpperCase()),
      h("code", {}, path),
      h("span", { class: "about" }, summary),
      lock,
    ),
    inner,
  );
  fold.addEventListener("toggle", () => {
    if (fold.open && !inner.childElementCount) inner.append(...parts(operation, schemas));
  });
  return fold;
}

function parts(operation, schemas) {
  const body = operation.requestBody?.content["application/json"].schema;
  const answers = Object.entries(operation.responses["200"].content ?? {});
  return [
    h(
      "section",
      {},
      h("h3", {}, "Try it"),
      tryForm(operation, schemas, operation.tags?.[0] === "Admin" ? administrator : server),
    ),
    body && h("section", {}, h("h3", {}, "Request"), schemas.view(body)),
    answers.length > 0 &&
      h(
        "section",
        {},
        h("h3", {}, "Answer"),
        answers.map(([type, { schema }]) => [h("p", { class: "type" }, type), schemas.view(schema)]),
      ),
  ].filter(Boolean);
}

/** Open the route in the page's URL. */
function showTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target?.tagName === "DETAILS") target.open = true;
  target?.scrollIntoView();
}

/** Fetch the document with the key: a plain link works only if the server has no keys. */
async function download(event) {
  if (!server.key) return;
  event.preventDefault();
  const text = await (await server.request("api-doc/openapi.json")).text();
  save("openapi.json", text, "application/json");
}
