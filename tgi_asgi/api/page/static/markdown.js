// Parses Markdown into blocks: plain data, no elements. inline.js parses a block's text further.
//
//   parse("# Hi\n\n- a\n- b")  →  [{ type: "heading", level: 1, text: "Hi", source },
//                                  { type: "list", items: [{ blocks }, { blocks }], source }]
//
// Supports the subset that models write: GFM without HTML, indented code and link definitions. The time is linear in
// the text's length for any text, because models can be asked for the worst case.

const MAX_DEPTH = 12; // of nested lists and quotes; deeper ones are paragraphs
const FENCE = /^[ \t]*(`{3,}|~{3,})([^`]*)$/;
const MARKER = /^([ \t]*)([-*+]|\d{1,9}[.)])(?=[ \t]|$)/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const QUOTE = /^ {0,3}> ?/;
const CELL_RULE = /^:?-+:?$/;
const TASK = /^\[([ xX])\][ \t]+/;

/** Return the blocks of a text; each has its `source`, by which a view detects changes. */
export function parse(text) {
  return blocksOf(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

function blocksOf(lines, depth) {
  const readers = depth < MAX_DEPTH ? [fence, math, heading, rule, quote, list, table] : [fence, math];
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    let found = null;
    for (const read of readers) if ((found = read(lines, at, depth))) break;
    found ??= paragraph(lines, at, depth);
    found.block.source = lines.slice(at, found.end).join("\n");
    blocks.push(found.block);
    at = found.end;
  }
  return blocks;
}

function fence(lines, at) {
  const opening = FENCE.exec(lines[at]);
  if (!opening) return null;
  const [, mark, words] = opening;
  const indent = indentOf(lines[at]);
  let end = at + 1;
  while (end < lines.length && !closes(lines[end], mark)) end += 1;
  const text = lines
    .slice(at + 1, end)
    .map((line) => dedent(line, indent))
    .join("\n");
  const block = { type: "code", language: words.trim().split(/\s/, 1)[0], text };
  return { block, end: Math.min(end + 1, lines.length) }; // a block still being written has no end
}

function closes(line, mark) {
  const text = line.trim();
  return text.length >= mark.length && text === mark[0].repeat(text.length);
}

/** Parse display mathematics, which is shown as source. */
function math(lines, at) {
  const first = lines[at].trim();
  const close = first.startsWith("\\[") ? "\\]" : first.startsWith("$$") ? "$$" : null;
  if (!close) return null;
  let end = at;
  while (end < lines.length) {
    const text = lines[end].trim();
    const isEnd = text.endsWith(close) && (end > at || text.length >= 4);
    if (isEnd || isBlank(text)) break;
    end += 1;
  }
  if (end === lines.length || isBlank(lines[end])) return null;
  const text = lines
    .slice(at, end + 1)
    .join("\n")
    .trim()
    .slice(2, -2)
    .trim();
  return { block: { type: "math", text }, end: end + 1 };
}

function heading(lines, at) {
  const found = HEADING.exec(lines[at]);
  if (!found) return null;
  let text = lines[at].slice(found[0].length).trim();
  const end = text.length - trailing(text, "#");
  if (end === 0 || " \t".includes(text[end - 1])) text = text.slice(0, end).trim();
  return { block: { type: "heading", level: found[1].length, text }, end: at + 1 };
}

function rule(lines, at) {
  const text = lines[at].replace(/[ \t]/g, "");
  const isRule = text.length >= 3 && "-*_".includes(text[0]) && text === text[0].repeat(text.length);
  return isRule ? { block: { type: "rule" }, end: at + 1 } : null;
}

function quote(lines, at, depth) {
  if (!QUOTE.test(lines[at])) return null;
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return { block: { type: "quote", blocks: blocksOf(inner, depth + 1) }, end };
}

function list(lines, at, depth) {
  const first = markerOf(lines[at]);
  if (!first) return null;
  const items = [];
  let end = at;
  let isLoose = false;
  for (;;) {
    const item = itemAt(lines, end, first.indent);
    items.push(itemOf(item.lines, depth));
    const next = afterBlanks(lines, item.end);
    const mark = next < lines.length ? markerOf(lines[next]) : null;
    const goesOn = mark && mark.kind === first.kind && mark.indent < first.indent + 2 && !rule(lines, next);
    if (!goesOn) return { block: { type: "list", ...first, isLoose, items }, end: item.end };
    isLoose ||= next > item.end;
    end = next;
  }
}

/** Return the lines of one item without marker and indent, and the item's end. */
function itemAt(lines, at, indent) {
  const { width } = markerOf(lines[at]);
  const own = [lines[at].slice(width)];
  let end = at + 1;
  while (end < lines.length) {
    const next = afterBlanks(lines, end);
    if (next === lines.length) break;
    const belongs = indentOf(lines[next]) >= indent + 2;
    const isLazy =
      next === end && !isBlank(own.at(-1)) && !markerOf(lines[next]) && !startsBlock(lines[next]);
    if (!belongs && !isLazy) break;
    while (end < next) own.push(lines[end++]);
    own.push(dedent(lines[end++], width));
  }
  return { lines: own, end };
}

function itemOf(lines, depth) {
  const task = TASK.exec(lines[0].trimStart());
  if (task) lines[0] = lines[0].trimStart().slice(task[0].length);
  return { isDone: task ? task[1] !== " " : null, blocks: blocksOf(lines, depth + 1) };
}

function markerOf(line) {
  const found = MARKER.exec(line);
  if (!found) return null;
  const [whole, , mark] = found;
  const indent = indentOf(line);
  const isOrdered = mark.length > 1;
  const start = isOrdered ? Number.parseInt(mark, 10) : null;
  return { kind: mark.at(-1), isOrdered, start, indent, width: Math.min(whole.length + 1, line.length) };
}

function table(lines, at) {
  if (!lines[at].includes("|") || at + 1 >= lines.length) return null;
  const rules = cellsOf(lines[at + 1]);
  const head = cellsOf(lines[at]);
  if (rules.length !== head.length || !rules.every((cell) => CELL_RULE.test(cell))) return null;
  const align = rules.map((cell) => `${cell.startsWith(":") ? "l" : ""}${cell.endsWith(":") ? "r" : ""}`);
  let end = at + 2;
  const rows = [];
  while (end < lines.length && lines[end].includes("|")) rows.push(cellsOf(lines[end++]));
  return { block: { type: "table", align, head, rows }, end };
}

function cellsOf(line) {
  const cells = [];
  let cell = "";
  const text = line.trim();
  for (let i = text.startsWith("|") ? 1 : 0; i < text.length; i += 1) {
    if (text[i] === "\\" && text[i + 1] === "|") {
      cell += "|";
      i += 1;
    } else if (text[i] === "|") {
      cells.push(cell.trim());
      cell = "";
    } else {
      cell += text[i];
    }
  }
  if (cell.trim()) cells.push(cell.trim());
  return cells;
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !startsBlock(lines[end])) end += 1;
  return { block: { type: "paragraph", text: lines.slice(at, end).join("\n").trim() }, end };
}

/** Return whether a line ends the paragraph above it; a number does so only if it begins a list. */
function startsBlock(line) {
  const mark = markerOf(line);
  if (mark) return !mark.isOrdered || mark.start === 1;
  return (
    FENCE.test(line) ||
    HEADING.test(line) ||
    QUOTE.test(line) ||
    Boolean(rule([line], 0)) ||
    /^\s*(\\\[|\$\$)/.test(line)
  );
}

function afterBlanks(lines, at) {
  let next = at;
  while (next < lines.length && isBlank(lines[next])) next += 1;
  return next;
}

function isBlank(line) {
  return line.trim() === "";
}

function indentOf(line) {
  let width = 0;
  for (const character of line) {
    if (character === " ") width += 1;
    else if (character === "\t") width += 4;
    else break;
  }
  return width;
}

/** Remove leading blanks, up to a number of columns. */
function dedent(line, width) {
  let left = width;
  let at = 0;
  while (left > 0 && (line[at] === " " || line[at] === "\t")) {
    left -= line[at] === "\t" ? 4 : 1;
    at += 1;
  }
  return line.slice(at);
}

function trailing(text, character) {
  let count = 0;
  while (count < text.length && text[text.length - 1 - count] === character) count += 1;
  return count;
}
