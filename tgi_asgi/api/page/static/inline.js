// Parses the text of one block into inline nodes: plain data, no elements.
//
//   parseInline("a *b* [c](https://d)")  →  ["a ", { type: "em", children: ["b"] }, " ",
//                                            { type: "link", href: "https://d", children: ["c"] }]
//
// One pass from left to right. Openers wait on a stack; closers look at the top of the stack of their own kind.
// The time is therefore linear in the text's length.

const MAX_OPEN = 40;
const MAX_HREF = 2000;
const KINDS = { "*1": "em", "*2": "strong", _1: "em", _2: "strong", "~2": "del" };
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}]/u;
const BARE_URL = /https?:\/\/[^\s<>"`*|\]\\]+/y;
const POINTED_URL = /<(https?:\/\/[^\s<>]+|mailto:[^\s<>]+)>/y;
const BREAK = /<br[ \t]*\/?>/iy;

/** Return the nodes of a text: strings, and { type, children | text | href }. */
export function parseInline(text) {
  return new Reader(text).read();
}

class Reader {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.nodes = [];
    this.open = []; // { kind, index }: waiting delimiters and brackets, with their indices in `nodes`
    this.tops = {}; // by kind: the indices into `open`
    this.unclosed = new Set(); // closers not found up to the end of the text
  }

  read() {
    const { text } = this;
    while (this.at < text.length) {
      const special = SPECIAL[text[this.at]];
      if (special && this[special]()) continue;
      this.say(text[this.at]);
      this.at += 1;
    }
    return this.nodes.map((node) => (node.waits ? node.waits : node)).reduce(join, []);
  }

  say(text) {
    if (typeof this.nodes.at(-1) === "string") this.nodes[this.nodes.length - 1] += text;
    else this.nodes.push(text);
  }

  /** Return the text up to `close` and move past it; null if there is none. */
  until(close, from) {
    if (this.unclosed.has(close)) return null;
    const end = this.text.indexOf(close, from);
    if (end < 0) {
      this.unclosed.add(close);
      return null;
    }
    this.at = end + close.length;
    return this.text.slice(from, end);
  }

  escape() {
    const next = this.text[this.at + 1];
    if (next === "(" || next === "[") {
      const found = this.until(next === "(" ? "\\)" : "\\]", this.at + 2);
      if (found !== null) return this.nodes.push({ type: "math", text: found.trim() });
    }
    if (next === undefined || !PUNCTUATION.test(next)) return false;
    this.say(next);
    this.at += 2;
    return true;
  }

  code() {
    const size = this.run("`");
    const mark = "`".repeat(size);
    if (this.unclosed.has(mark)) return this.literal(mark);
    for (let end = this.at + size; ;) {
      end = this.text.indexOf(mark, end);
      if (end < 0) break;
      let after = end + size;
      while (this.text[after] === "`") after += 1;
      if (after === end + size) {
        let inner = this.text.slice(this.at + size, end).replaceAll("\n", " ");
        if (inner.startsWith(" ") && inner.endsWith(" ") && inner.trim()) inner = inner.slice(1, -1);
        this.nodes.push({ type: "code", text: inner });
        this.at = after;
        return true;
      }
      end = after;
    }
    this.unclosed.add(mark);
    return this.literal(mark);
  }

  math() {
    if (this.text[this.at + 1] !== "$") return false;
    const found = this.until("$$", this.at + 2);
    return found !== null && this.nodes.push({ type: "math", text: found.trim() });
  }

  newline() {
    this.nodes.push({ type: "break" });
    this.at += 1;
    return true;
  }

  pointed() {
    const found = this.match(POINTED_URL);
    if (found) return this.nodes.push({ type: "link", href: found[1], children: [found[1]] });
    return this.match(BREAK) && this.nodes.push({ type: "break" });
  }

  bare() {
    if (WORD.test(this.text[this.at - 1] ?? "")) return false;
    const start = this.at;
    const found = this.match(BARE_URL);
    if (!found) return false;
    let [url] = found;
    const isOpen = () => url.split(")").length > url.split("(").length;
    while (".,;:!?'_~".includes(url.at(-1)) || (url.at(-1) === ")" && url.length < MAX_HREF && isOpen())) {
      url = url.slice(0, -1);
    }
    this.at = start + url.length;
    return this.nodes.push({ type: "link", href: url, children: [url] });
  }

  /** Parse a run of `*`, `_` or `~`, which first closes and then opens as much as possible. */
  emphasis() {
    const { text } = this;
    const mark = text[this.at];
    const size = this.run(mark);
    const before = text[this.at - 1] ?? " ";
    const after = text[this.at + size] ?? " ";
    const isInWord = mark === "_" && WORD.test(before) && WORD.test(after);
    const canOpen = !/\s/.test(after) && !isInWord && (mark !== "_" || !WORD.test(before));
    const canClose = !/\s/.test(before) && !isInWord && (mark !== "_" || !WORD.test(after));
    this.at += size;
    let left = size;
    while (canClose && left > 0) {
      const two = left > 1 ? (this.tops[`${mark}2`]?.at(-1) ?? -1) : -1;
      const one = this.tops[`${mark}1`]?.at(-1) ?? -1;
      if (Math.max(one, two) < 0) break;
      const width = two > one ? 2 : 1;
      this.close(mark + width, KINDS[mark + width]);
      left -= width;
    }
    for (let width; canOpen && left > 0; left -= width) {
      width = left > 1 ? 2 : 1;
      if (!KINDS[mark + width] || !this.wait(mark + width, mark.repeat(width))) break;
    }
    if (left > 0) this.say(mark.repeat(left));
    return true;
  }

  bracket() {
    const isImage = this.text[this.at] === "!";
    if (isImage && this.text[this.at + 1] !== "[") return false;
    const text = isImage ? "![" : "[";
    if (!this.wait("[", text)) return false;
    this.at += text.length;
    return true;
  }

  endBracket() {
    const place = this.tops["["]?.at(-1);
    if (place === undefined) return false;
    const target = this.text[this.at + 1] === "(" ? this.target(this.at + 2) : null;
    if (target === null) {
      this.drop(place);
      return false;
    }
    const isImage = this.nodes[this.open[place].index].waits === "![";
    const link = this.close("[", "link");
    link.href = target.href;
    link.isImage = isImage;
    link.children = link.children.flatMap((child) => (child.type === "link" ? child.children : [child]));
    this.at = target.end;
    return true;
  }

  /** Parse `https://a "title")`; return the address and its end, or null. */
  target(from) {
    const end = Math.min(this.text.length, from + MAX_HREF);
    let depth = 0;
    let quoted = false;
    for (let at = from; at < end; at += 1) {
      const character = this.text[at];
      if (character === "\n") return null;
      if (character === '"') quoted = !quoted;
      if (quoted) continue;
      if (character === "(") depth += 1;
      if (character === ")" && depth-- === 0) {
        const [href, ...title] = this.text.slice(from, at).trim().split(/\s+/);
        const isRight = title.length === 0 || title[0].startsWith('"');
        return isRight ? { href: href.replace(/^<|>$/g, ""), end: at + 1 } : null;
      }
    }
    return null;
  }

  /** Add an opener to the stack; return false if there are too many. */
  wait(kind, text) {
    if (this.open.length >= MAX_OPEN) return false;
    (this.tops[kind] ??= []).push(this.open.length);
    this.open.push({ kind, index: this.nodes.length });
    this.nodes.push({ waits: text });
    return true;
  }

  /** Combine the nodes since the last opener of a kind into one; openers in between become text. */
  close(kind, type) {
    const place = this.tops[kind].at(-1);
    const { index } = this.open[place];
    while (this.open.length > place) this.tops[this.open.pop().kind].pop();
    const inner = this.nodes.splice(index).slice(1);
    const node = { type, children: inner.map((each) => (each.waits ? each.waits : each)).reduce(join, []) };
    this.nodes.push(node);
    return node;
  }

  /** Turn a bracket into text; openers inside it may still close. */
  drop(place) {
    const [{ index }] = this.open.splice(place, 1);
    this.nodes[index] = this.nodes[index].waits;
    for (const kind of Object.keys(this.tops)) this.tops[kind] = [];
    this.open.forEach((each, i) => this.tops[each.kind].push(i));
  }

  literal(text) {
    this.say(text);
    this.at += text.length;
    return true;
  }

  run(mark) {
    let size = 1;
    while (this.text[this.at + size] === mark) size += 1;
    return size;
  }

  match(expression) {
    expression.lastIndex = this.at;
    const found = expression.exec(this.text);
    if (found) this.at = expression.lastIndex;
    return found;
  }
}

const SPECIAL = {
  "\\": "escape",
  "`": "code",
  $: "math",
  "\n": "newline",
  "<": "pointed",
  h: "bare",
  "*": "emphasis",
  _: "emphasis",
  "~": "emphasis",
  "[": "bracket",
  "!": "bracket",
  "]": "endBracket",
};

/** Join neighbouring strings. */
function join(nodes, node) {
  if (typeof node === "string" && typeof nodes.at(-1) === "string") nodes[nodes.length - 1] += node;
  else nodes.push(node);
  return nodes;
}
