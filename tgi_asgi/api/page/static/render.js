// Converts Markdown blocks to elements; only the elements and attributes named here are created.
import { copyButton, h } from "./dom.js";
import { highlight } from "./highlight.js";
import { parseInline } from "./inline.js";
import { parse } from "./markdown.js";

const PROTOCOLS = new Set(["http:", "https:", "mailto:"]);

/** An element that shows a growing Markdown text; unchanged blocks are not touched. */
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.sources = [];
  }

  /** Show the current text. */
  show(text) {
    const blocks = parse(text);
    blocks.forEach((block, i) => {
      if (this.sources[i] === block.source) return;
      const made = elementOf(block);
      const old = this.element.children[i];
      if (old) old.replaceWith(made);
      else this.element.append(made);
    });
    while (this.element.children.length > blocks.length) this.element.lastElementChild.remove();
    this.sources = blocks.map((block) => block.source);
  }
}

function elementOf(block) {
  switch (block.type) {
    case "heading":
      return h(`h${Math.min(block.level + 2, 6)}`, { class: `level-${block.level}` }, inline(block.text));
    case "code":
      return codeBlock(block);
    case "math":
      return h("pre", { class: "math", tabindex: 0 }, block.text);
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", {}, block.blocks.map(elementOf));
    case "list":
      return listOf(block);
    case "table":
      return tableOf(block);
    default:
      return h("p", {}, inline(block.text));
  }
}

function codeBlock({ language, text }) {
  return h(
    "figure",
    { class: "code" },
    h(
      "figcaption",
      {},
      h("span", {}, language || "text"),
      copyButton(() => text, "Copy the code"),
    ),
    h(
      "pre",
      { tabindex: 0, "aria-label": language ? `Code: ${language}` : "Code" },
      h("code", {}, highlight(text, language)),
    ),
  );
}

function listOf({ isOrdered, start, isLoose, items }) {
  const rows = items.map(({ isDone, blocks }) => {
    // A list with one line per item needs no paragraphs.
    const inner = blocks.flatMap((block) =>
      block.type === "paragraph" && !isLoose ? inline(block.text) : [elementOf(block)],
    );
    const box =
      isDone === null
        ? null
        : h("input", {
            type: "checkbox",
            disabled: true,
            checked: isDone,
            "aria-label": isDone ? "Done" : "Not done",
          });
    return h("li", { class: box && "task" }, box, inner);
  });
  return h(isOrdered ? "ol" : "ul", { start: isOrdered && start !== 1 ? start : null }, rows);
}

function tableOf({ align, head, rows }) {
  const sides = { l: "left", r: "right", lr: "center" };
  const cell = (tag, text, i) =>
    h(tag, { class: sides[align[i]], scope: tag === "th" ? "col" : null }, inline(text ?? ""));
  return h(
    "div",
    { class: "table", tabindex: 0, role: "region", "aria-label": "Table" },
    h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          head.map((text, i) => cell("th", text, i)),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map((row) =>
          h(
            "tr",
            {},
            head.map((_, i) => cell("td", row[i], i)),
          ),
        ),
      ),
    ),
  );
}

function inline(text) {
  return parseInline(text).map(nodeOf);
}

function nodeOf(node) {
  if (typeof node === "string") return node;
  const { type, text, children } = node;
  if (type === "break") return h("br");
  if (type === "code") return h("code", {}, text);
  if (type === "math") return h("code", { class: "math" }, text);
  if (type === "link") return link(node);
  return h(type, {}, children.map(nodeOf)); // em, strong, del
}

/** Show a link if it is a web or mail address, otherwise its text; images are never fetched. */
function link({ href, children, isImage }) {
  const text = [isImage ? "Image: " : null, ...children.map(nodeOf)];
  if (!isSafe(href)) return h("span", { title: href }, text);
  return h("a", { href, target: "_blank", rel: "noopener noreferrer nofollow", title: href }, text);
}

function isSafe(href) {
  try {
    return PROTOCOLS.has(new URL(href).protocol);
  } catch {
    return false;
  }
}
