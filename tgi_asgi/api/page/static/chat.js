// The current conversation: sends messages, streams answers, and maintains the branches.
import { Answer } from "./answer.js";
import { requestOf } from "./request.js";
import { append, pathTo, select } from "./tree.js";

const KEEP_EVERY_MS = 2000; // closing the page during an answer loses at most this much

export class Chat {
  /** `options()` returns the settings; `onChange(conversation)` and `onFailure(error)` are callbacks. */
  constructor({ server, transcript, options, onChange, onFailure }) {
    Object.assign(this, { server, transcript, options, onChange, onFailure });
    this.conversation = null;
    this.model = undefined;
    this.running = null;
  }

  get isRunning() {
    return this.running !== null;
  }

  /** Show another conversation; an answer in progress stops. */
  open(conversation) {
    this.stop();
    this.conversation = conversation;
    for (const node of Object.values(conversation.nodes)) {
      if (node.state === "running") node.state = "stopped"; // the page was closed during the answer
    }
    this.transcript.show(conversation);
    this.onChange(conversation);
  }

  /** Append a message to the conversation; return whether it was accepted. */
  say(text, images = []) {
    if (this.isRunning) return false;
    this.ask(this.conversation.leaf, { role: "user", content: text, ...(images.length ? { images } : {}) });
    return true;
  }

  /** Replace a message with another text. */
  edit(node, text) {
    this.stop();
    this.ask(node.parent, { ...pick(node, ["role", "images"]), content: text.trim() });
  }

  /** Supply the results of the functions that a message calls. */
  answerCalls(node, results) {
    if (this.isRunning) return;
    let parent = node.id;
    node.calls.forEach((call, i) => {
      parent = append(this.conversation, parent, { role: "tool", content: results[i], callId: call.id }).id;
    });
    this.answer(parent);
  }

  /** Let the model generate another answer to the same message. */
  regenerate(node) {
    this.stop();
    this.answer(node.parent);
  }

  /** Show another branch. */
  select(node) {
    this.stop();
    select(this.conversation, node);
    this.transcript.show(this.conversation);
    this.transcript.views.get(node.id).element.focus();
    this.onChange(this.conversation);
  }

  /** Let the model continue an answer that was stopped or cut off. */
  proceed(node) {
    if (!this.isRunning) this.stream(node, true);
  }

  /** Stop the answer in progress; keep the text received so far. */
  stop() {
    this.running?.abort();
    this.running = null;
  }

  ask(parent, fields) {
    this.answer(append(this.conversation, parent, fields).id);
  }

  answer(parent) {
    this.stream(append(this.conversation, parent, { role: "assistant" }), false);
  }

  /** Fill a message from the server's stream. */
  async stream(node, isContinued) {
    const { conversation, transcript } = this;
    const stopper = new AbortController();
    this.running = stopper;
    delete node.error;
    node.state = "running";
    transcript.show(conversation);
    transcript.begin(node);
    this.onChange(conversation);

    const path = pathTo(conversation, isContinued ? node.id : node.parent);
    const answer = new Answer(node);
    let keptAt = performance.now();
    let failure = null;
    try {
      const body = requestOf(path, this.options(), this.model, { isContinued });
      for await (const chunk of this.server.chat(body, stopper.signal)) {
        if (stopper.signal.aborted) break;
        answer.take(chunk);
        transcript.grow(node);
        if (performance.now() - keptAt > KEEP_EVERY_MS) {
          keptAt = performance.now();
          this.onChange(conversation);
        }
      }
    } catch (error) {
      failure = error;
    }
    const wasStopped = stopper.signal.aborted;
    answer.end(wasStopped ? null : failure, wasStopped);
    if (this.running === stopper) this.running = null;
    transcript.end(node);
    this.onChange(conversation);
    if (failure && !wasStopped) this.onFailure(failure);
  }
}

function pick(object, names) {
  return Object.fromEntries(
    names.filter((name) => object[name] !== undefined).map((name) => [name, object[name]]),
  );
}
