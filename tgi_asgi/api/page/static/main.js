// The chat page: connects user actions, the server and storage.
import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { byId, h, prepare, setUpTheme } from "./dom.js";
import { readJson, saveJson, saveMarkdown } from "./export.js";
import { askKey } from "./key.js";
import { readOptions, setUpOptions } from "./options.js";
import { Server } from "./server.js";
import { Sidebar } from "./sidebar.js";
import { Status } from "./status.js";
import * as store from "./store.js";
import { Transcript } from "./transcript.js";
import { newConversation, pathTo } from "./tree.js";

const IDEAS = [
  "Explain how a transformer predicts the next word",
  "Write a Python function that merges two sorted lists",
  "Compare a hash table and a binary search tree, as a table",
  "Suggest a dinner from eggs, rice and spinach",
];

prepare();
setUpTheme(byId("theme"));

const server = new Server(askKey);
const status = new Status(server, onState);
const transcript = new Transcript({
  edit: (node, text) => chat.edit(node, text),
  regenerate: (node) => chat.regenerate(node),
  proceed: (node) => chat.proceed(node),
  answerCalls: (node, results) => chat.answerCalls(node, results),
  select: (node) => chat.select(node),
});
const chat = new Chat({ server, transcript, options: readOptions, onChange, onFailure });
const composer = new Composer({
  onSend: (text, images) => status.isReady && chat.say(text, images),
  onStop: () => chat.stop(),
  onEditLast,
  notice: (text) => status.notice(text),
});
const sidebar = new Sidebar({ onOpen: open, onDelete });

setUpOptions(() => composer.field.focus());
byId("new-chat").addEventListener("click", startNew);
byId("export").addEventListener("click", () => byId("export-dialog").showModal());
byId("as-json").addEventListener("click", () => exportAs((it) => saveJson([it], it.title)));
byId("as-markdown").addEventListener("click", () => exportAs(saveMarkdown));
byId("export-all").addEventListener("click", async () => saveJson(await store.loadAll(), "conversations"));
byId("import").addEventListener("click", () => byId("import-file").click());
byId("import-file").addEventListener("change", importFile);
byId("models").addEventListener("change", (event) => {
  chat.model = event.target.value;
});
byId("settings").addEventListener("click", () => {
  byId("forget-key").hidden = !server.key;
});
byId("forget-key").addEventListener("click", () => {
  server.keep(null);
  byId("forget-key").hidden = true;
  status.notice("The key is forgotten.");
});
byId("ideas").append(
  ...IDEAS.map((text) =>
    h(
      "li",
      {},
      h(
        "button",
        {
          type: "button",
          onclick: () => {
            composer.field.value = text;
            composer.fit();
            composer.field.focus();
          },
        },
        text,
      ),
    ),
  ),
);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && !document.querySelector("dialog[open]")) chat.stop();
});

let isLearning = false;
const deleted = new Set(); // an answer that finishes later must not restore its conversation
server.onKey = () => onState(status.state);
startNew();
status.check();

/** Read the server's capabilities when it becomes ready or the key changes. */
async function onState(state) {
  refresh();
  if (state !== "ready" || isLearning) return;
  isLearning = true;
  try {
    const [models, info] = [await server.models(), await server.info()];
    showModels(models.map((model) => model.id));
    const takesImages = info.model_pipeline_tag === "image-text-to-text";
    composer.allowImages(takesImages);
    if (!takesImages && info.model_pipeline_tag !== "text-generation") {
      status.notice("This model gives vectors and scores, no text: see /docs for what it can do.");
    }
  } catch (error) {
    onFailure(error);
  } finally {
    isLearning = false;
  }
}

function showModels(names) {
  chat.model = names.includes(chat.model) ? chat.model : names[0];
  byId("model").textContent = chat.model;
  document.title = `Chat with ${chat.model}`;
  const select = byId("models");
  select.replaceChildren(
    ...names.map((name) => h("option", { value: name, selected: name === chat.model }, name)),
  );
  select.hidden = names.length < 2;
  byId("model").classList.toggle("unseen", names.length > 1);
}

/** Store and list a changed conversation. */
async function onChange(conversation) {
  refresh();
  if (conversation.leaf === null || deleted.has(conversation.id)) return;
  try {
    await store.keep(conversation);
  } catch {
    status.notice("This browser has no room to keep the conversation.");
  }
  showList();
}

function onFailure(error) {
  if (error.status === 401) status.notice("The server wants a key: send a message to be asked for it.");
  else if (!error.status || error.status === 503) status.check();
}

function refresh() {
  composer.setState({ isRunning: chat.isRunning, isReady: status.isReady });
  byId("export").hidden = chat.conversation.leaf === null;
}

async function showList() {
  const heads = await store.list();
  sidebar.show(heads, chat.conversation.id);
  byId("export-all").disabled = heads.length === 0;
}

function startNew() {
  chat.open(newConversation());
  sidebar.leave();
  showList();
  composer.field.focus();
}

async function open(id) {
  const conversation = await store.load(id);
  if (!conversation) return;
  chat.open(conversation);
  sidebar.leave();
  showList();
  composer.field.focus();
}

async function onDelete(id) {
  const conversation = await store.load(id);
  if (!confirm(`Delete “${conversation?.title}”?`)) return;
  deleted.add(id);
  if (chat.conversation.id === id) chat.open(newConversation());
  await store.forget(id);
  await showList();
  byId("new-chat").focus();
}

function exportAs(write) {
  byId("export-dialog").close();
  write(chat.conversation);
}

async function importFile(event) {
  const [file] = event.target.files;
  event.target.value = "";
  try {
    const conversations = readJson(await file.text());
    for (const conversation of conversations) {
      deleted.delete(conversation.id);
      await store.keep(conversation);
      if (conversation.id === chat.conversation.id) chat.open(conversation);
    }
    status.notice(`${conversations.length} imported.`);
    showList();
  } catch (error) {
    status.notice(`${file.name} cannot be imported. ${error.message}`);
  }
}

/** Edit the user's last message; return whether there is one. */
function onEditLast() {
  const last = pathTo(chat.conversation).findLast((node) => node.role === "user");
  if (!last || chat.isRunning) return false;
  transcript.views.get(last.id).edit();
  return true;
}
