// The pages' requests to the server that served them; its routes are siblings of this file's folder.
import { eventsOf } from "./events.js";

const ROOT = new URL("..", import.meta.url);
const KEY = "tgi-asgi.key";

/** An error answer of the server; status 0: it was not reached, or the connection broke. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** A server and its key. `askKey(wasWrong)` is called when a key is needed, and resolves to a key or null. */
export class Server {
  constructor(askKey, keyName = KEY) {
    this.askKey = askKey;
    this.keyName = keyName; // name under which the browser stores the key
    this.onKey = () => {}; // called when the user has entered a key
    this.key = readKey(keyName);
    this.asking = null;
  }

  /** Return the server's status: { state, progress }; `progress` exists while the model loads. */
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

  /** Yield the chunks of a chat's answer. Throws a ServerError if it fails or breaks off. */
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

  /** Send a request with the key, asking the user for one if needed; return any response. */
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

  /** Ask for a key once for all requests that need one; return whether it now differs from `used`. */
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

  /** Use a key from now on and store it in the browser; null removes it. */
  keep(key) {
    this.key = key;
    try {
      if (key === null) localStorage.removeItem(this.keyName);
      else localStorage.setItem(this.keyName, key);
    } catch {
      /* no storage: kept only for this visit */
    }
  }
}

/** Return the full URL of a route. */
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
    /* a proxy's page, or an empty body */
  }
  return new ServerError(message, response.status);
}

/** Return the message from OpenAI's error envelope or TGI's. */
function messageOf(body) {
  return body.error?.message ?? String(body.error ?? "The server failed");
}
