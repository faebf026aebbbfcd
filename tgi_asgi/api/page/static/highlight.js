// Syntax highlighting for any language, by common elements: comments, strings, numbers, words.
import { h } from "./dom.js";

const WORDS = new Set(
  `abstract as assert async await begin bool boolean break case catch char class const continue crate
  def default defer del delete do double elif else end enum except export extends extern false False
  final finally float fn for foreach from func function global go goto if impl implements import in
  include inline instanceof int interface internal is lambda let local long loop match mod module move
  mut namespace new nil None nonlocal not null nullptr of operator or and package pass private
  protected pub public raise readonly ref require rescue return self Self short signed sizeof static
  str string struct super switch template then this throw throws trait true True try type typedef
  typeof undefined union unless unsafe unsigned until use using val var virtual void volatile when
  where while with yield SELECT FROM WHERE INSERT INTO UPDATE DELETE CREATE TABLE JOIN LEFT RIGHT
  INNER ON GROUP BY ORDER HAVING LIMIT AND OR NOT echo export fi done esac`.split(/\s+/),
);
const HASH_COMMENTS =
  /^(py|python|sh|bash|zsh|shell|console|rb|ruby|yaml|yml|toml|r|perl|makefile|dockerfile|conf|ini)$/i;
const DASH_COMMENTS = /^(sql|lua|haskell|hs)$/i;
const PLAIN = /^(|text|txt|plain|plaintext|output|markdown|md)$/i;
const MAX_LENGTH = 50_000; // longer code is not highlighted, to keep the page responsive

const STRING =
  String.raw`"""[^]*?(?:"""|$)|"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'|` + "`(?:[^`\\\\]|\\\\.)*`?";
const NUMBER = String.raw`\b\d[\w.]*`;
const NAME = String.raw`[A-Za-z_]\w*`;
const COMMENTS = {
  hash: String.raw`#[^\n]*`,
  dash: String.raw`--[^\n]*`,
  slash: String.raw`\/\/[^\n]*|\/\*[^]*?(?:\*\/|$)|<!--[^]*?(?:-->|$)`,
};

/** Return the nodes of a piece of code: strings, and spans with a class. */
export function highlight(text, language) {
  if (PLAIN.test(language) || text.length > MAX_LENGTH) return [text];
  const comment =
    COMMENTS[HASH_COMMENTS.test(language) ? "hash" : DASH_COMMENTS.test(language) ? "dash" : "slash"];
  const pattern = new RegExp(`(${comment})|(${STRING})|(${NUMBER})|(${NAME})`, "g");
  const nodes = [];
  let from = 0;
  for (const found of text.matchAll(pattern)) {
    const [whole, isComment, isString, isNumber] = found;
    const next = text[found.index + whole.length];
    const kind = isComment
      ? "comment"
      : isString
        ? "string"
        : isNumber
          ? "number"
          : WORDS.has(whole)
            ? "word"
            : next === "("
              ? "name"
              : null;
    if (!kind) continue;
    if (found.index > from) nodes.push(text.slice(from, found.index));
    nodes.push(h("span", { class: kind }, whole));
    from = found.index + whole.length;
  }
  nodes.push(text.slice(from));
  return nodes;
}
