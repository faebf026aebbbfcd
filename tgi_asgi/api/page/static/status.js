// The server's status: polled until it is ready, and shown above the message box.
import { byId, h } from "./dom.js";

const LOADING_MS = 700;
const AWAY_MS = 2000;
const WORDS = {
  draining: "The server is shutting down.",
  dead: "The model cannot be served: its engine has failed.",
  unreachable: "The server cannot be reached. Trying again …",
};

export class Status {
  /** `onChange(state)` is called when the state changes: ready, loading, draining, dead, unreachable. */
  constructor(server, onChange) {
    this.server = server;
    this.onChange = onChange;
    this.state = null;
    this.timer = null;
  }

  get isReady() {
    return this.state === "ready";
  }

  /** Check now, and repeatedly until the server is ready. */
  async check() {
    clearTimeout(this.timer);
    const { state, progress } = await this.server.health();
    const hasChanged = state !== this.state;
    this.state = state;
    this.show(progress);
    if (hasChanged) this.onChange(state);
    if (state !== "ready")
      this.timer = setTimeout(() => this.check(), state === "loading" ? LOADING_MS : AWAY_MS);
  }

  /** Show a notice for a while. */
  notice(text) {
    const line = h("p", { class: "notice" }, text);
    byId("status").append(line);
    setTimeout(() => line.remove(), 6000);
  }

  show(progress) {
    const place = byId("status");
    if (this.state === "ready") {
      place.querySelector(".state")?.remove();
      return;
    }
    let box = place.querySelector(".state");
    if (!box) {
      box = h(
        "div",
        { class: "state" },
        h("p", { id: "state-text" }),
        h("p", { class: "share", "aria-hidden": "true" }),
        h("progress", { "aria-labelledby": "state-text" }),
      );
      place.prepend(box);
    }
    const [text, share, bar] = box.children;
    const words =
      this.state === "loading"
        ? `The model is loading${progress ? `: ${progress.stage}` : ""}`
        : (WORDS[this.state] ?? this.state);
    if (text.textContent !== words) text.textContent = words; // read aloud by screen readers, so only when it changes
    share.textContent = progress?.total ? `${Math.floor((100 * progress.done) / progress.total)} %` : "";
    bar.hidden = this.state !== "loading";
    if (progress?.total) {
      bar.max = progress.total;
      bar.value = progress.done;
    } else {
      bar.removeAttribute("value");
    }
  }
}
