// What the pages ask the server, which is where they came from: its routes lie beside the folder of this file.
import { eventsOf } from "./events.js";

const ROOT = new URL("..", import.meta.url);
const KEY = "tgi-asgi.key";

/** What a server answered instead of what it was asked for; status 0: it was not reached, or broke off. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** One server and the key for it. `askKey(wasWrong)` is called when it wants one, and resolves to it or to null. */
export class Server {
  constructor(askKey, keyName = KEY) {
    this.askKey = askKey;
    this.keyName = keyName; // what the browser keeps it under
    this.onKey = () => {}; // called when the user has given a key
    this.key = readKey(keyName);
    this.asking = null;
  }

  /** Return how the server does: { state, progress }, where `progress` is there while the model loads. */
  async health() {
    try {
      const response = await fetch(new URL("health", ROOT), {
        cache: "no-store",
        signal: AbortSignal.timeout(8000),
      });
      if (response.ok) return { state: "ready" };
      const { state, progress } = await response.json();
      return { state: state ?? "unreachable", progress };
    } catch {
      return { state: "unreachable" };
    }
  }

  async models() {
    return (await (await this.request("v1/models")).json()).data;
  }

  async info() {
    return (await this.request("info")).json();
  }

  /** Yield the chunks of a chat's answer. Throws a ServerError where it fails or breaks off. */
  async *chat(body, signal) {
    const response = await this.request("v1/chat/completions", { body: JSON.stringify(body), signal });
    try {
      for await (const data of eventsOf(response.body)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ServerError(messageOf(chunk), response.status);
        yield chunk;
      }
    } catch (error) {
      throw signal.aborted || error instanceof ServerError
        ? error
        : new ServerError("The connection was lost", 0);
    }
    throw new ServerError("The connection was lost", 0);
  }

  /** Send a request and return its response; throws a ServerError if it is refused. */
  async request(path, options) {
    const response = await this.send(path, options);
    if (response.ok) return response;
    throw await refusal(response);
  }

  /** Send a request with the key, which is asked for if the server wants one; return whatever is answered. */
  async send(path, { method, body, signal } = {}) {
    for (;;) {
      const key = this.key;
      let response;
      try {
        response = await fetch(addressOf(path), {
          method: method ?? (body === undefined ? "GET" : "POST"),
          headers: {
            ...(body === undefined ? {} : { "content-type": "application/json" }),
            ...(key ? { authorization: `Bearer ${key}` } : {}),
          },
          body,
          signal,
        });
      } catch (error) {
        throw signal?.aborted ? error : new ServerError("The server cannot be reached", 0);
      }
      if (response.status === 401 && (await this.newKey(key))) continue;
      return response;
    }
  }

  /** Ask for a key, once for all requests that want one; return whether there is another than `used` now. */
  async newKey(used) {
    if (this.key !== used) return true;
    this.asking ??= this.askKey(Boolean(used)).finally(() => {
      this.asking = null;
    });
    const key = await this.asking;
    if (key === null) return false;
    this.keep(key);
    this.onKey();
    return true;
  }

  /** Use a key from now on and keep it in the browser; null forgets it. */
  keep(key) {
    this.key = key;
    try {
      if (key === null) localStorage.removeItem(this.keyName);
      else localStorage.setItem(this.keyName, key);
    } catch {
      /* a browser that keeps nothing: for this visit */
    }
  }
}

/** Return the whole address of one of the server's routes. */
export function addressOf(path) {
  return new URL(path.replace(/^\//, ""), ROOT);
}

function readKey(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

async function refusal(response) {
  const text = await response.text();
  let message = text.slice(0, 500) || response.statusText;
  try {
    message = messageOf(JSON.parse(text));
  } catch {
    /* a proxy's page, or nothing */
  }
  return new ServerError(message, response.status);
}

/** Return the message of OpenAI's envelope or of TGI's. */
function messageOf(body) {
  return body.error?.message ?? String(body.error ?? "The server failed");
}
