"""processing/budget.py and sandbox.py: a template from a checkpoint takes bounded time and memory, while it is compiled and
while it renders, and ordinary ones render as before.

The attacks run in a forked child under limits of memory and processor time, with a budget a hundredth of the usual one.
"""

from __future__ import annotations

import resource

import pytest

from qwen35moe.processing import ChatTemplate
from qwen35moe.processing import budget as module
from tests.support.chat import TEMPLATE
from tests.support.memory import forked, limit_address_space

MEMORY, SECONDS = 1 << 29, 60  # beyond those of the libraries; the attacks take about 2 s in all

# Each doubles a value 60 times, or nests it 60 deep in two places, and then does something with it.
DOUBLE = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x | length }}"
NESTED = ("{%% set ns = namespace(x=['a'], y=['a']) %%}{%% for i in range(60) %%}{%% set ns.x = [ns.x, ns.x] %%}"
          "{%% set ns.y = [ns.y, ns.y] %%}{%% endfor %%}%s")  # fmt: skip

ATTACKS = [
    *(DOUBLE % ("'aaaa'", form) for form in ("ns.x ~ ns.x", "ns.x + ns.x", "[ns.x, ns.x] | join", "ns.x.join([ns.x, ns.x])",
                                             "ns.x * 2", "'%s%s' % (ns.x, ns.x)", "'{0}{0}'.format(ns.x)",
                                             "ns.x | replace('a', 'aa')", "ns.x.replace('a', 'aa')",
                                             "ns.x.center(2 * ns.x | length)")),
    *(DOUBLE % ("[1]", form) for form in ("ns.x + ns.x", "ns.x * 2")),
    DOUBLE % ("9", "ns.x * ns.x"),
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = y %}{% endfor %}",
    "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    *(NESTED % f"{{{{ {form} }}}}" for form in (
        "ns.x", "ns.x | tojson", "ns.x | string", "ns.x | upper", "ns.x | trim", "ns.x | indent", "ns.x | safe",
        "ns.x | urlencode",
        "ns.x | map('string') | list", "ns.x == ns.y", "ns.x is eq(ns.y)", "ns.x in [ns.y]", "[ns.x].index(ns.y)",
        "[ns.x, ns.y] | sort", "[ns.x, ns.y] | unique | list", "'%s' % (ns.x,)", "'{}'.format(ns.x)", "raise_exception(ns.x)",
        "ns.x[ns.x]", "{}[ns.x].foo", "ns.x ~ 'a'", "[ns.x].count(ns.y)", "ns.x < ns.y", "{'a': ns.x}.items()",
        "ns.x | replace('a', 'b')", "ns.x | center(3)", "'%s' | format(ns.x)", "ns.x | escape")),
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}", "{% set n = 10**9 %}{{ [0] * n }}", "{{ 10**9 * 'a' }}", "{{ 10 ** (10 ** 10) }}",
    "{{ 2 ** -(10**9) }}",
    "{{ '%1500000000d' % 1 }}", "{{ '%*d' % (10**9, 1) }}", "{{ '%(a)1500000000d' % {'a': 1} }}",
    "{{ '%(a(b))1500000000d' % {} }}",
    "{{ '%1500000000d' | format(1) }}", "{{ '%.1500000000f' % 1.0 }}", "{{ '{:1500000000d}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}", "{{ '{a:1500000000d}'.format_map({'a': 1}) }}",
    "{{ ('{0}' * 9999).format('a' * 99999) }}",
    "{{ ('%(a)s' * 99999) % {'a': 'a' * 99999} }}", "{{ 'a'.center(10**9) }}", "{{ 'a' | center(10**9) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ '\\t'.expandtabs(10**9) }}", "{{ '\\t'.expandtabs(tabsize=10**9) }}", "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "{{ ('a' * 99999).replace('', 'b' * 99999) }}", "{{ ('b' * 99999).join('a' * 99999) }}",
    "{{ ('a' * 9999) | join('b' * 9999) }}",
    "{{ ('a' * 9999) | join(d='b' * 9999) }}", "{{ ('\\n' * 99999) | indent(99999) }}",
    "{{ ('\\n' * 9999) | indent('a' * 9999) }}",
    "{{ 'a'.translate({97: 'b' * 99999}) }}", "{{ (1).to_bytes(10**9, 'big') }}", "{{ 'a'.encode().center(10**9) }}",
    "{{ 'a'.encode() * 10**9 }}", "{{ 'a%1500000000d'.encode() % 1 }}", "{{ 1.5 | round(10**9, 'ceil') }}",
    "{{ [1] | slice(10**9) | list }}", "{{ [1] | batch(10**9, 0) | list }}", "{{ [1] | tojson(indent=10**9) }}",
    "{{ [1, 2] | tojson(separators=('a' * 99999, ':')) }}", "{{ lipsum(10**6) }}", "{{ strftime_now('%1000000000d') }}",
    "{{ strftime_now('%-1000000000d') }}", "{{ [[1]] | sum(start=[]) }}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% for x in [1, 2] recursive %}{% if loop.depth < 40 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "{% macro f(n) %}{{ caller(n) }}{{ caller(n) }}{% endmacro %}{% macro g(n) %}{% if n %}{% call(m) f(n) %}{{ g(m - 1) }}"
    "{% endcall %}{% endif %}{% endmacro %}{{ g(40) }}",
    "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "{% for i in range(99999) %}{% set x = [" + "1," * 2000 + "] %}{% endfor %}",
    "{{ range(99999)" + " | map('upper')" * 200 + " | list }}", "{{ ('a' * 99999).split('a') }}", "{{ ('a' * 99999) | list }}",
    "{{ ('\\n' * 99999).splitlines() }}", "{{ ('a ' * 99999).split() }}", "{{ range(99999) | list | sort }}",
    *("{% set a = 'a' * 99999 %}{% set b = 'a' * 99999 %}"
      "{% for i in range(99999) %}{% if " + form + " %}{% endif %}{% endfor %}"
      for form in ("a == b", "'b' in a", "a[1:]", "a.find('b')", "a | upper", "a is upper", "a + b", "a ~ b")),
    "{% set x = namespace(y=[]) %}{% for i in range(99999) %}{% set x.y = x.y + [range(9999) | list] %}{% endfor %}",
    "{% autoescape 'x' | center(10**9) %}x{% endautoescape %}", "{% if 'a' * 10**9 %}{% endif %}",
    "{% set x = 'a' ~ 'b' * 10**9 %}",
    "{% filter center(10**9) %}x{% endfilter %}", "{{ ('a' * 99999) | urlize }}", "{{ 'a' | wordwrap(1) }}", "{{ 1 | pprint }}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}", "{% include 'x' %}", "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "{{ ''.__class__.__mro__ }}", "{% if 1 %}" * 1200 + "{% endif %}" * 1200, "{{ " + "(" * 1500 + "1" + ")" * 1500 + " }}",
    "{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "{{ 1" + "+1" * 1500 + " }}", "{{ " + "not " * 1500 + "1 }}",
    "{{ " + "9" * 99999 + " }}", "x" * (1 << 20),
]  # fmt: skip


def attack() -> list[str]:
    """The error of each attack. Anything else than a ValueError ends the process."""
    chat = [{"role": "user", "content": "x"}]
    assert ChatTemplate("{{ messages[0].content }}").render(chat) == "x"  # imports everything
    limit_address_space(MEMORY)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    module.BASE, module.PER_ITEM = 20_000, 10
    errors = []
    for source in ATTACKS:
        try:
            errors.append("rendered: " + ChatTemplate(source).render(chat)[:50])
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_hostile_templates_are_stopped() -> None:
    errors = forked(attack)
    assert len(errors) == len(ATTACKS) > 120
    for source, error in zip(ATTACKS, errors, strict=True):
        assert error.startswith(("chat template: ", "invalid chat template: ")), (source[:200], error)
        assert "MemoryError" not in error and len(error) < 1500, (source[:200], error)


def test_the_budget_grows_with_the_messages() -> None:
    """3,000 messages render; so does one of two million characters, and a program as large as the messages may have."""
    template = ChatTemplate(TEMPLATE)
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"turn {n}"} for n in range(3000)]
    text = template.render(turns)
    assert text.count("<|im_start|>") == 3000 and "turn 2999" in text
    large = [{"role": "user", "content": "word " * 400_000}]
    assert len(template.render(large)) > 1_999_000
    assert module.Budget(turns, {}).allowed > module.Budget(turns[:10], {}).allowed + 2000 * module.PER_ITEM


def test_ordinary_expressions_are_what_jinja_makes_of_them() -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    data = {"xs": [3, 1, 2], "d": {"b": 1, "a": [1, "x"]}, "s": "Ab c\n d", "n": 5}
    for source in (
        "{{ xs | sort }}{{ xs | join('-') }}{{ xs | map('string') | list }}{{ xs | sum }}{{ xs | min }}{{ xs[1:] }}",
        "{% for x in xs if x > 1 %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ x }}{% endfor %}",
        "{% for k, v in d | dictsort %}{{ k }}={{ v }}{% endfor %}{% for k in d %}{{ k }}{% endfor %}",
        "{{ s | upper }}{{ s.split() }}{{ s.replace('b', 'x') }}{{ s | indent(2) }}{{ s | title }}{{ s ~ n ~ xs }}",
        "{{ '%s-%5d|%-4s' % (s, n, 'a') }}{{ '{:>5}{a}'.format(n, a=1) }}{{ '%05.2f' | format(1.5) }}{{ n ** 3 }}{{ 7 // 2 }}",
        "{{ xs == [3, 1, 2] }}{{ 1 in xs }}{{ 'a' in d }}{{ n is odd }}{{ undefined_name is defined }}{{ 3 > n > 1 }}{{ -n }}",
        "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{{ f(1) }}{% call f(3, b=4) %}c{% endcall %}",
        "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{{ loop.depth }}{% endfor %}",
        "{% set q %}a{{ n }}{% endset %}{{ q }}{% filter upper %}b{{ q }}{% endfilter %}{% with z = n %}{{ z }}{% endwith %}",
        "{{ xs | batch(2, 0) | list }}{{ xs | slice(2) | list }}{{ xs | first }}{{ xs | reverse | list }}{{ o | d('d') }}",
        "{{ [d, d] | map(attribute='b') | list }}{{ [d] | selectattr('b') | list }}{{ xs | unique | list }}",
        "{{ '5' | int + 1 }}{{ '2.5' | float }}{{ 2.567 | round(1) }}{{ -3 | abs }}{{ cycler(1, 2).next() }}{{ range(3) }}",
    ):  # fmt: skip
        assert ChatTemplate(source).run([], data) == plain.from_string(source).render(data), source


@pytest.mark.parametrize("source", ["{{ messages[0].content.foo.bar }}", "{{ messages | nofilter }}",
                                    "{{ messages is notest }}"])  # fmt: skip
def test_errors_are_short(source: str) -> None:
    with pytest.raises(ValueError) as caught:
        ChatTemplate(source).render([{"role": "user", "content": "x" * 100_000}])
    assert len(str(caught.value)) < 400
