"""Limits of templates: one cannot compute forever or exhaust the machine with one expression."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from tgi_asgi.errors import TemplateError
from tgi_asgi.text.chat.template import ChatTemplate

HI = [{"role": "user", "content": "hi"}]
DEEP = "{% for a in range(10000) %}" * 9 + "BODY" + "{% endfor %}" * 9


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**10 }}",
        "{{ 10**10 * 'x' }}",
        "{{ ([1] * 10**9) | length }}",
        "{{ 10 ** 100000 }}",
        "{{ 2 ** 3 ** 4 ** 5 }}",
        "{% for i in range(10001) %}{% endfor %}",
        "{{ range(10 ** 9) | list }}",
        "{{ lipsum(n=10 ** 8) }}",
        "{{ 'x'.center(10 ** 8) | length }}",
        "{{ '1'.zfill(10 ** 8) | length }}",
        "{{ ('\\t'.expandtabs(tabsize=10 ** 8)) | length }}",
        "{{ (1).to_bytes(10 ** 8) | length }}",
        "{{ 'x'.encode().rjust(10 ** 8) | length }}",
        "{{ 'x' | center(10 ** 8) | length }}",
        "{{ 'a\nb' | indent(10 ** 8) | length }}",
        "{{ [1] | batch(10 ** 8, 'x') | list | length }}",
        "{{ [1] | slice(10 ** 8) | list | length }}",
        "{{ [1] | tojson(indent=10 ** 8) | length }}",
        "{{ ('%100000000d' % 1) | length }}",
        "{{ ('%.*f' % (10 ** 8, 1)) | length }}",
        "{{ ('%100000000d' | format(1)) | length }}",
        "{{ ('%(a)100000000d' | format(a=1)) | length }}",
        "{{ '{:>100000000}'.format(1) | length }}",
        "{{ '{:{w}}'.format(1, w=10 ** 8) | length }}",
        "{{ '{a:{w}}'.format_map({'a': 1, 'w': 10 ** 8}) | length }}",
    ],
)
def test_a_value_out_of_proportion_is_refused(source: str) -> None:
    template = ChatTemplate("{% if tools %}" + source + "{% endif %}", {})
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError):
            template.render(HI, tools=[{"x": 1}])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 24


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 2 * 3 * 1.5 }}{{ [1] * 2 }}{{ 10000000 * 10000000 }}{{ 'ab' * 0 }}", "9.0[1, 1]100000000000000"),
        ("{{ 'ab' * 3 ~ 1 ~ none ~ missing }}", "ababab1None"),
        ("{{ 'a' + 'b' }}{{ [1] + [2] }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ 2 * 3.5 }}", "ab[1, 2]102437.0"),
        ("{{ '%s-%05d' % ('a', 7) }}{{ '{:>4}|{}'.format(1, 2) }}", "a-00007   1|2"),
        ("{{ '%d%%' % 10 ** 8 }} {{ '{:d}'.format(10 ** 8) }} {{ 10 ** 8 % 7 }}", "100000000% 100000000 2"),
        ("{% set s %}a{{ 1 }}{% endset %}{{ s }}{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(2) }}", "a1<2>"),
        ("{{ 'a,b'.replace(',', ';') }}{{ '-'.join(['x', 'y']) }}{{ 'q'.center(3) }}", "a;bx-y q "),
    ],
)
def test_what_templates_do_works_as_ever(source: str, text: str) -> None:
    assert ChatTemplate(source, {}).render(HI) == text


@pytest.mark.parametrize(
    "source",
    [
        DEEP.replace("BODY", ""),
        DEEP.replace("BODY", "{% set x = 1 %}"),
        DEEP.replace("BODY", "{% for x in range(10000) if false %}{% endfor %}"),
        DEEP.replace("BODY", "{% if x is string %}a{% endif %}"),
        "{% macro m(n) %}{% if n %}{% set x = m(n - 1) ~ m(n - 1) %}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% for i in range(10000) recursive %}{% if loop.depth < 9 %}{% set x = loop(range(10000)) %}"
        "{% endif %}{% endfor %}",
    ],
)
def test_computing_for_ever_is_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgi_asgi.text.chat.time_limit.MAX_CPU_S", 0.02)
    template = ChatTemplate("{% if tools %}" + source + "{% endif %}", {})
    began_s = time.thread_time()
    with pytest.raises(TemplateError, match="computed for more than"):
        template.render(HI, tools=[{"x": 1}])
    assert time.thread_time() - began_s < 60
    assert template.render(HI) == ""


def test_what_filters_do_works_as_ever() -> None:
    source = (
        "{{ 'a\nb' | indent }}|{{ 'a\nb' | indent('> ', true) }}|{{ 'aXb' | replace('X', 1) }}"
        "|{{ [1, 'b'] | join('-') }}|{{ [{'n': 1}, {'n': 2}] | join(',', attribute='n') }}"
        "|{{ [1, 2, 3] | batch(2, 0) | list }}|{{ [1, 2, 3] | slice(2) | list }}|{{ 2.55 | round(1) }}"
        "|{{ [1, 2] | sum }}|{{ [{'n': 1}] | sum('n') }}|{{ '%s=%d' | format('a', 1) }}|{{ [1] | string }}"
        "|{{ 'ab cd' | wordwrap(2) }}|{{ {'b': '<é>', 'a': [1]} | tojson }}|{{ [1] | tojson(indent=1) }}"
        "|{% for x in [1, 2, 3] if x != 2 %}{{ loop.index }}/{{ loop.length }}"
        "{% if not loop.last %},{% endif %}{% else %}none{% endfor %}"
    )
    assert ChatTemplate(source, {}).render(HI) == (
        "a\n    b|> a\n> b|a1b|1-b|1,2|[[1, 2], [3, 0]]|[[1, 2], [3]]|2.5|3|1|a=1|[1]|ab\ncd"
        '|{"b": "<é>", "a": [1]}|[\n 1\n]|1/2,2/2'
    )
