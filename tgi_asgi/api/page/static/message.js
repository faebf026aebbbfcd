// One message on the page: its content and its buttons.
import { describeSpeed, seconds } from "./answer.js";
import { copyButton, h, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./render.js";

const ENDS = {
  stopped: "Stopped.",
  cut: "The answer reached its limit of tokens.",
};

/**
 * Shows a message and updates it as it grows.
 *
 * `actions` are the handlers of its buttons: edit(node, text), regenerate(node), proceed(node),
 * answerCalls(node, results), select(node).
 */
export class MessageView {
  constructor(node, siblings, actions, isLast) {
    this.node = node;
    this.actions = actions;
    this.siblings = siblings;
    this.isLast = isLast;
    this.isWaiting = false; // whether the indicator of a pending answer is shown
    const isUser = node.role === "user";
    const name = { user: "You", tool: "Tool result", assistant: "Answer" }[node.role];
    this.body = h("div", { class: "body" });
    this.tail = h("div", { class: "tail" });
    this.element = h(
      "article",
      { class: node.role, "aria-label": name, tabindex: -1 },
      h("h2", { class: "unseen" }, name),
    );
    if (isUser) this.showImages();
    if (node.role === "assistant") this.makeParts();
    else this.body.textContent = node.content;
    if (node.content || !isUser) this.element.append(this.body);
    if (node.role === "assistant") this.element.append(this.calls);
    this.element.append(this.tail);
    this.refresh();
  }

  showImages() {
    const { images = [] } = this.node;
    if (!images.length) return;
    const row = images.map((url, i) =>
      h("img", { src: url, alt: `Attached image ${i + 1}`, loading: "lazy" }),
    );
    this.element.append(h("div", { class: "images" }, row));
  }

  makeParts() {
    this.thought = h("p", {});
    this.summary = h("summary", {}, "Thinking");
    this.reasoning = h("details", { class: "reasoning", hidden: true }, this.summary, this.thought);
    this.element.append(this.reasoning);
    this.text = new MarkdownView(this.body);
    this.calls = h("div", { class: "calls" });
  }

  /** Show the message's current state; `isRunning`: it is still growing. */
  refresh(isRunning = false) {
    const { node } = this;
    this.element.classList.toggle("running", isRunning);
    this.element.setAttribute("aria-busy", isRunning);
    if (node.role === "assistant") {
      this.showReasoning(isRunning);
      this.text.show(node.content);
      this.showCalls(isRunning);
    }
    if (!isRunning || !this.isWaiting) this.showTail(isRunning);
    this.isWaiting = isRunning;
  }

  showReasoning(isRunning) {
    const { reasoning, reasoningMs, content, calls } = this.node;
    if (!reasoning) return;
    this.reasoning.hidden = false;
    this.thought.textContent = reasoning.trim();
    const isThinking = isRunning && !content && !calls;
    this.reasoning.classList.toggle("thinking", isThinking);
    this.summary.textContent = isThinking
      ? "Thinking"
      : reasoningMs
        ? `Thought for ${seconds(reasoningMs)}`
        : "Thoughts";
  }

  showCalls(isRunning) {
    const { calls = [] } = this.node;
    if (!calls.length) return;
    const cards = calls.map((call) =>
      h(
        "div",
        { class: "call" },
        h("p", {}, icon("tool"), "Calls ", h("code", {}, call.name)),
        h(
          "pre",
          { tabindex: 0, "aria-label": `Arguments of ${call.name}` },
          isRunning ? call.arguments : pretty(call.arguments),
        ),
      ),
    );
    if (!isRunning && this.isLast && this.node.state === "done") cards.push(this.resultForm(calls));
    this.calls.replaceChildren(...cards);
  }

  /** Return a form for the results of called functions, because this page runs none itself. */
  resultForm(calls) {
    const fields = calls.map((call) =>
      h("label", {}, `Result of ${call.name}`, h("textarea", { rows: 2, spellcheck: "false" })),
    );
    return h(
      "form",
      {
        class: "results",
        onsubmit: (event) => {
          event.preventDefault();
          this.actions.answerCalls(
            this.node,
            fields.map((field) => field.querySelector("textarea").value),
          );
        },
      },
      fields,
      h("button", {}, "Send the results"),
    );
  }

  showTail(isRunning) {
    const { node } = this;
    const parts = [];
    if (!isRunning) {
      if (node.state === "failed") parts.push(this.failure());
      else if (ENDS[node.state])
        parts.push(h("p", { class: "end" }, ENDS[node.state], this.canProceed() && this.proceedButton()));
      const speed = node.speed && h("span", { class: "speed" }, describeSpeed(node.speed));
      parts.push(h("div", { class: "tools" }, this.branchButtons(), this.buttons(), speed));
    } else {
      parts.push(h("span", { class: "waiting", role: "img", "aria-label": "Answering" }));
    }
    this.tail.replaceChildren(...parts);
  }

  failure() {
    const again = h(
      "button",
      { type: "button", onclick: () => this.actions.regenerate(this.node) },
      icon("redo"),
      "Try again",
    );
    return h(
      "div",
      { class: "failure" },
      h("p", {}, this.node.error || "The answer failed."),
      h("div", { class: "row" }, again, this.canProceed() && this.proceedButton()),
    );
  }

  canProceed() {
    return this.isLast && this.node.content && !this.node.calls;
  }

  proceedButton() {
    return h(
      "button",
      { type: "button", onclick: () => this.actions.proceed(this.node) },
      icon("forward"),
      "Continue",
    );
  }

  branchButtons() {
    const { siblings, node } = this;
    if (siblings.length < 2) return [];
    const at = siblings.indexOf(node);
    const go = (name, label, to) =>
      iconButton(name, label, () => this.actions.select(siblings[to]), { disabled: !siblings[to] });
    return h(
      "span",
      { class: "branches", role: "group", "aria-label": "Branches" },
      go("left", "Earlier branch", at - 1),
      h("span", {}, `${at + 1} / ${siblings.length}`),
      go("right", "Later branch", at + 1),
    );
  }

  buttons() {
    const { node, actions } = this;
    const copying = node.content && copyButton(() => node.content, "Copy the message");
    if (node.role === "user") return [copying, iconButton("edit", "Edit the message", () => this.edit())];
    if (node.role === "assistant")
      return [copying, iconButton("redo", "Answer again", () => actions.regenerate(node))];
    return [copying];
  }

  /** Replace the text with an input field; submitting it begins a branch. */
  edit() {
    const field = h("textarea", {
      "aria-label": "Edit the message",
      rows: Math.min(12, this.node.content.split("\n").length + 1),
    });
    field.value = this.node.content;
    const close = () => {
      form.replaceWith(this.body);
      this.tail.hidden = false;
      this.element.querySelector("[aria-label='Edit the message']")?.focus();
    };
    const submit = (event) => {
      event.preventDefault();
      if (field.value.trim() || this.node.images?.length) this.actions.edit(this.node, field.value);
    };
    const form = h(
      "form",
      { class: "edit", onsubmit: submit },
      field,
      h(
        "div",
        { class: "row end" },
        h("button", { type: "button", class: "quiet", onclick: close }, "Cancel"),
        h("button", { class: "strong" }, "Send"),
      ),
    );
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
    });
    if (!this.body.isConnected) this.tail.before(this.body);
    this.body.replaceWith(form);
    this.tail.hidden = true;
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}
