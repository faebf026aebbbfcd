"""Markdown: how it is rendered, and that nothing in it is active."""

from __future__ import annotations

from typing import Any

import pytest

from tests.page.conftest import ChatPage, words
from tests.support.scripted_engine import say

pytestmark = pytest.mark.page

SHOW = """async (text) => {
  const { MarkdownView } = await import(new URL("page/render.js", document.baseURI));
  const place = document.createElement("div");
  new MarkdownView(place).show(text);
  for (const each of place.querySelectorAll("button, figcaption")) each.remove();
  for (const each of place.querySelectorAll("*")) {
    for (const name of each.getAttributeNames()) {
      if (name !== "href" && name !== "start") each.removeAttribute(name);
    }
  }
  return place.innerHTML;
}"""
CASES = {
    "plain": ("One\ntwo\n\nthree", "<p>One<br>two</p><p>three</p>"),
    "headings": ("# A #\n###### B\n#hash", "<h3>A</h3><h6>B</h6><p>#hash</p>"),
    "emphasis": (
        "*a* **b** ***c*** _d_ __e__ ~~f~~",
        "<p><em>a</em> <strong>b</strong> <strong><em>c</em></strong> <em>d</em> <strong>e</strong> "
        "<del>f</del></p>",
    ),
    "no emphasis": ("2 * 3 * 4, snake_case_name, a ~ b ~ c", "<p>2 * 3 * 4, snake_case_name, a ~ b ~ c</p>"),
    "open emphasis": ("**still coming", "<p>**still coming</p>"),
    "bold label": ("**Note:** it", "<p><strong>Note:</strong> it</p>"),
    "code": ("`a*b*` and ``c`d``", "<p><code>a*b*</code> and <code>c`d</code></p>"),
    "open code": ("a `b and ``c", "<p>a `b and ``c</p>"),
    "escapes": (r"\*a\* \_ \q", r"<p>*a* _ \q</p>"),
    "mathematics": (
        "so \\(a_1 * b_2 * c\\) and\n\n$$\nx^2\n$$",
        "<p>so <code>a_1 * b_2 * c</code> and</p><pre>x^2</pre>",
    ),
    "lists": (
        "- a\n- b\n  - c\n\n1. d\n2. e",
        "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><ol><li>d</li><li>e</li></ol>",
    ),
    "numbers go on": (
        "1. a\n   ```\n   x\n   ```\n2. b",
        "<ol><li>a<figure><pre><code>x</code></pre></figure></li><li>b</li></ol>",
    ),
    "bullets by two blanks": (
        "1. a\n  - b\n  - c\n2. d",
        "<ol><li>a<ul><li>b</li><li>c</li></ul></li><li>d</li></ol>",
    ),
    "start": ("3. c\n4. d", '<ol start="3"><li>c</li><li>d</li></ol>'),
    "loose": ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
    "tasks": ("- [x] a\n- [ ] b", "<ul><li><input>a</li><li><input>b</li></ul>"),
    "lists end paragraphs": ("Then:\n- a\n\nEnd", "<p>Then:</p><ul><li>a</li></ul><p>End</p>"),
    "a year is no list": ("It was in\n1984. Then", "<p>It was in<br>1984. Then</p>"),
    "fence": (
        "```py\na = 1\n\n# b\n```\nc",
        "<figure><pre><code>a = <span>1</span>\n\n<span># b</span></code></pre></figure><p>c</p>",
    ),
    "open fence": ("~~~\n<b>", "<figure><pre><code>&lt;b&gt;</code></pre></figure>"),
    "quote": ("> a\n> - b", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>"),
    "rule": ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    "table": (
        "| a | b |\n|---|:-:|\n| `1` | x \\| y |\n| 2 |",
        "<div><table><thead><tr><th>a</th><th>b</th></tr></thead>"
        "<tbody><tr><td><code>1</code></td><td>x | y</td></tr><tr><td>2</td><td></td></tr></tbody>"
        "</table></div>",
    ),
    "break": ("a<br>b<br/>c", "<p>a<br>b<br>c</p>"),
    "links": (
        '[a *b*](https://x.org/(y) "t") <https://z.org> https://w.org/a_b.',
        '<p><a href="https://x.org/(y)">a <em>b</em></a> <a href="https://z.org">https://z.org</a> '
        '<a href="https://w.org/a_b">https://w.org/a_b</a>.</p>',
    ),
    "mail": ("[a](mailto:a@b.org)", '<p><a href="mailto:a@b.org">a</a></p>'),
    "a link in a link": (
        "[https://a.org](https://b.org)",
        '<p><a href="https://b.org">https://a.org</a></p>',
    ),
    "brackets": ("[a] (b) [c", "<p>[a] (b) [c</p>"),
    "not a link": ("see xhttps://a.org", "<p>see xhttps://a.org</p>"),
}


@pytest.mark.parametrize("name", CASES)
def test_markdown_becomes(chat: ChatPage, name: str) -> None:
    text, shown = CASES[name]
    chat.open()
    assert chat.page.evaluate(SHOW, text) == shown


HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg onload='window.hacked = 1'>",
    "<iframe srcdoc='<script>top.hacked = 1</script>'></iframe>",
    "<style>body { display: none }</style>",
    "<base href='https://evil.example/'>",
    "<form action='https://evil.example'><input name=key></form>",
    "[click](javascript:window.hacked=1)",
    "[click](JaVaScRiPt:window.hacked=1)",
    "[click](java&#115;cript:window.hacked=1)",
    "[click](\tjavascript:window.hacked=1)",
    "[click](\x01javascript:window.hacked=1)",
    "[click](data:text/html,<script>top.hacked=1</script>)",
    "[click](vbscript:hacked)",
    "[click](file:///etc/passwd)",
    "[click](//evil.example/x)",
    "[click](page/main.js)",
    "<javascript:window.hacked=1>",
    '[a](https://evil.example/" onmouseover="window.hacked=1)',
    "![spy](https://evil.example/pixel.png)",
    "![spy](data:image/svg+xml,<svg onload='top.hacked=1'/>)",
    "[![spy](https://evil.example/a.png)](javascript:window.hacked=1)",
    '```" onclick="window.hacked=1\n</code></pre><script>window.hacked=1</script>\n```',
    "|a|b|\n|-|-|\n|<script>window.hacked=1</script>|<img src=x onerror=window.hacked=1>|",
    "# <a href='javascript:window.hacked=1'>x</a>",
]
ALLOWED = {
    "a", "blockquote", "br", "button", "code", "del", "div", "em", "figcaption", "figure", "h3", "h4", "h5",
    "h6", "hr", "input", "li", "ol", "p", "path", "pre", "span", "strong", "svg", "table", "tbody", "td",
    "th", "thead", "tr", "ul",
}  # fmt: skip


def test_hostile_output_is_text(chat: ChatPage) -> None:
    text = "\n\n".join(HOSTILE)
    chat.engine.script = say(f"<think>{HOSTILE[1]}</think>", *words(text))
    chat.open()
    chat.send(HOSTILE[1])
    chat.expect("article.assistant").to_have_attribute("aria-busy", "false")
    body = chat.page.locator("article.assistant .body")
    assert "<script>window.hacked = 1</script>" in body.inner_text()
    tags: list[str] = body.evaluate("(e) => [...e.querySelectorAll('*')].map((each) => each.localName)")
    assert set(tags) <= ALLOWED
    links: list[str] = body.evaluate("(e) => [...e.querySelectorAll('a')].map((each) => each.protocol)")
    assert set(links) == {"https:"}
    names: list[str] = body.evaluate(
        "(e) => [...e.querySelectorAll('*')].flatMap((each) => each.getAttributeNames())"
    )
    assert not {name for name in names if name.startswith("on")} | ({"style", "src"} & set(names))
    for link in body.locator("a").all():
        assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    assert chat.page.evaluate("window.hacked") is None
    assert chat.page.locator("article.user .body").inner_text() == HOSTILE[1]


def test_hostile_names_of_models_tools_and_titles_are_text(chat: ChatPage) -> None:
    bad = "<img src=x onerror=window.hacked=1>"
    chat.page.route(
        "**/v1/models", lambda route: route.fulfill(json={"data": [{"id": bad}, {"id": "<b>other</b>"}]})
    )
    chat.open()
    chat.expect("#models option").to_have_text(bad)
    chat.send(bad)
    chat.wait_for_answer("Hello world")
    chat.expect("#conversations .title").to_have_text(bad)
    assert chat.page.evaluate("window.hacked") is None


def test_the_browser_itself_refuses_html_and_foreign_scripts(chat: ChatPage) -> None:
    chat.open()
    refused = """() => {
      try { document.body.innerHTML = "<b>x</b>"; return "written"; } catch (error) { return error.name; }
    }"""
    assert chat.page.evaluate(refused) == "TypeError"
    chat.page.evaluate("""() => new Promise((resolve) => {
      const script = document.createElement("img");
      script.onerror = script.onload = resolve;
      script.src = "https://evil.example/x.png";
    })""")
    assert any("evil.example" in fault for fault in chat.errors)
    chat.errors.clear()
    chat.foreign_requests.clear()  # the request was refused before it was sent


WORST: dict[str, Any] = {
    "stars": "*a **b " * 20_000,
    "run of stars": "*" * 100_000,
    "closing stars": "a* b** " * 20_000,
    "mixed": "*_~~" * 30_000,
    "brackets": "[" * 100_000,
    "brackets and ends": "[a](" * 25_000,
    "pairs of brackets": "[]" * 50_000,
    "backticks": " ".join("`" * (i % 400) for i in range(600)),
    "quotes": ">" * 100_000,
    "nested quotes": "\n".join(">" * i for i in range(400)),
    "nested lists": "\n".join(" " * (2 * i) + "- a" for i in range(300)),
    "list of blanks": "- a\n" + "\n" * 100_000 + "b",
    "blanks": " " * 100_000 + "x" + " " * 100_000,
    "heading of blanks": "# a" + " " * 100_000 + "b" + "#" * 50_000,
    "table": "|" * 50_000 + "\n" + "|-" * 50_000,
    "rows": "|a|b|\n|-|-|\n" + "|x|y|\n" * 8_000,
    "links": "https://a.org/" + ")" * 100_000,
    "addresses": "https://a " * 10_000,
    "mathematics": "\\(" * 50_000 + "$$" * 50_000,
    "escapes": "\\" * 100_000,
    "html": "<br" + " " * 100_000 + "<" * 50_000,
}


@pytest.mark.parametrize("name", WORST)
def test_no_text_keeps_the_page_for_long(chat: ChatPage, name: str) -> None:
    """Parsing 0.1 MB takes a few milliseconds; with quadratic time it would take minutes."""
    chat.open()
    seconds: float = chat.page.evaluate(
        """async (text) => {
          const { parse } = await import(new URL("page/markdown.js", document.baseURI));
          const { parseInline } = await import(new URL("page/inline.js", document.baseURI));
          const began = performance.now();
          for (const block of parse(text)) if (block.text) parseInline(block.text);
          return (performance.now() - began) / 1000;
        }""",
        WORST[name],
    )
    assert seconds < 5


def test_a_view_that_grows_equals_one_that_is_made_at_once(chat: ChatPage) -> None:
    text = "\n\n".join(shown for shown, _ in CASES.values())
    chat.open()
    chat.page.evaluate(
        """async (text) => {
          const { MarkdownView } = await import(new URL("page/render.js", document.baseURI));
          const [grown, whole] = [document.createElement("div"), document.createElement("div")];
          const view = new MarkdownView(grown);
          for (let size = 0; size < text.length; size += 3) view.show(text.slice(0, size));
          view.show(text);
          new MarkdownView(whole).show(text);
          if (!grown.isEqualNode(whole)) throw new Error(grown.textContent);
        }""",
        text,
    )
