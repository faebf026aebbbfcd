// Stores conversations in the browser's IndexedDB, or without it (private windows) only for this visit.
const NAME = "tgi-asgi";
const HEADS = "heads"; // id, title, updated: all that the list needs
const BODIES = "bodies";

let opened = null;
let visit = null; // maps used without IndexedDB

/** Return { id, title, updated } of each conversation, newest first. */
export async function list() {
  const heads = await all(HEADS);
  return heads.sort((one, other) => other.updated - one.updated);
}

/** Return a conversation, or undefined. */
export async function load(id) {
  const database = await open();
  if (!database) return structuredClone(visit[BODIES].get(id));
  return done(database.transaction(BODIES).objectStore(BODIES).get(id));
}

/** Return all conversations in full. */
export const loadAll = () => all(BODIES);

/** Store a conversation's current state. */
export async function keep(conversation) {
  const { id, title, updated } = conversation;
  const database = await open();
  if (!database) {
    visit[HEADS].set(id, { id, title, updated });
    visit[BODIES].set(id, structuredClone(conversation));
    return;
  }
  const both = database.transaction([HEADS, BODIES], "readwrite");
  both.objectStore(HEADS).put({ id, title, updated });
  await done(both.objectStore(BODIES).put(conversation));
}

/** Delete a conversation. */
export async function forget(id) {
  const database = await open();
  if (!database) {
    visit[HEADS].delete(id);
    visit[BODIES].delete(id);
    return;
  }
  const both = database.transaction([HEADS, BODIES], "readwrite");
  both.objectStore(HEADS).delete(id);
  await done(both.objectStore(BODIES).delete(id));
}

async function all(name) {
  const database = await open();
  if (!database) return structuredClone([...visit[name].values()]);
  return done(database.transaction(name).objectStore(name).getAll());
}

function open() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      for (const name of [HEADS, BODIES]) request.result.createObjectStore(name, { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  }).catch(() => {
    visit = { [HEADS]: new Map(), [BODIES]: new Map() };
    return null;
  });
  return opened;
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
