"""What a template cannot make, however it goes about it: it is refused before it takes memory."""

from __future__ import annotations

import tracemalloc

import pytest

from tgi_asgi.errors import TemplateError
from tgi_asgi.text.chat import ChatTemplate

HI = [{"role": "user", "content": "hi"}]
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
