"""What a template cannot make, however it goes about it: it is refused before it takes memory, or long."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from tgi_asgi.errors import TemplateError
from tgi_asgi.text.chat.template import ChatTemplate

HI = [{"role": "user", "content": "hi"}]
LAUGHS = "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}"
USES = [
    "{{ ns.a }}", "{{ ns.a | tojson }}", "{{ ns.a | string }}", "{{ 1 ~ ns.a }}", "{{ '%s' % (ns.a,) }}",
    "{{ '{}'.format(ns.a) }}", "{{ [ns.a] | join }}", "{{ '%s' | format(ns.a) }}", "{{ ns.a | pprint }}",
]  # fmt: skip
DEEP = "{% for a in range(10000) %}" * 9 + "BODY" + "{% endfor %}" * 9
LONG = "{% set l = range(10000) | list * 3000 %}"
DOUBLE = "{% for i in range(60) %}BODY{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**10 }}",
        "{{ 10**10 * 'x' }}",
        "{{ ([1] * 10**9) | length }}",
        "{{ 10 ** 100000 }}",
        "{% set ns = namespace(n=3) %}" + DOUBLE.replace("BODY", "{% set ns.n = ns.n * ns.n %}"),
        "{% set ns = namespace(s='xx') %}" + DOUBLE.replace("BODY", "{% set ns.s = ns.s + ns.s %}"),
        "{% set ns = namespace(s='xx') %}" + DOUBLE.replace("BODY", "{% set ns.s = ns.s ~ ns.s %}"),
        "{% set ns = namespace(s='xx') %}"
        + DOUBLE.replace("BODY", "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"),
        "{% set ns = namespace(s=[1]) %}" + DOUBLE.replace("BODY", "{% set ns.s = ns.s + ns.s %}"),
        "{% set ns = namespace(s='xx') %}"
        + DOUBLE.replace("BODY", "{% set ns.s = ns.s.replace('x', ns.s) %}"),
        "{% set ns = namespace(s='xx') %}" + DOUBLE.replace("BODY", "{% set ns.s = ''.join([ns.s, ns.s]) %}"),
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 1000000000) }}",
        "{{ 'x'.ljust(10**9) }}",
        "{{ 'x'.zfill(10**9) }}",
        "{{ 'x' | center(10**9) }}",
        "{{ 'a\n' * 1000000 | indent(9999) }}",
        "{{ ('x' * 30000) | replace('', 'x' * 30000) }}",
        "{{ ['x'] * 30000 | join('x' * 30000) }}",
        "{{ [1] | batch(10**9, 0) | list }}",
        "{{ [1] | slice(10**9) | list }}",
        "{{ 1.5 | round(10**8, 'ceil') }}",
        "{{ [[1]] * 30000 | sum(start=[]) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ ('x ' * 30000) | wordwrap(1, wrapstring='x' * 30000) }}",
        "{{ [1] | tojson(indent=10**9) }}",
        "{{ lipsum(n=10**8) }}",
        *(LAUGHS + use for use in USES),
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
    assert peak < 1 << 29


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'ab' * 3 ~ 1 ~ none ~ missing }}", "ababab1None"),
        ("{{ 'a' + 'b' }}{{ [1] + [2] }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ 2 * 3.5 }}", "ab[1, 2]102437.0"),
        ("{{ '%s-%05d' % ('a', 7) }}{{ '{:>4}|{}'.format(1, 2) }}", "a-00007   1|2"),
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
        LONG + "{% for i in range(10000) %}{% set x = l | sort %}{% endfor %}",
        LONG + "{% set x = l | max %}" * 1000,
    ],
)
def test_computing_for_ever_is_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgi_asgi.text.chat.time_limit.MAX_CPU_S", 0.1)
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
