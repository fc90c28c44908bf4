"""Chat templates that print, compute or loop too much are refused; all others render as before."""

import threading
import time

import chats
import pytest

import lddyn
from lddyn.data import template_limits
from lddyn.data.audit import audit
from lddyn.data.chat import ChatTemplate
from lddyn.data.rows import encode_row

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"
DOUBLED = (
    "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = TWICE %}"
    "{% endfor %}{{ ns.x }}"
)
TEXT = "{% set a = 'x' * 60000 %}"
HOSTILE = {
    "a product": "{{ 'x' * 2000000000 }}",
    "a product of products": "{% set n = 1000 %}{{ 'x' * (n * n * n) }}",
    "a constant that is not printed": "{% if false %}{{ 'x' * 2000000000 }}{% endif %}",
    "nested loops": LOOPS.replace("BODY", ""),
    "printing loops": "{% set q %}" + LOOPS.replace("BODY", "xx") + "{% endset %}{{ q|length }}",
    "recursion": "{% macro f(n) %}{{ f(n-1) if n }}{{ f(n-1) if n }}{% endmacro %}{{ f(40) }}",
    "a filter's width": "{{ 'x'|center(2000000000) }}",
    "a method's width": "{{ 'x'.ljust(2000000000) }}",
    "a width in %": "{{ '%2000000000d' % 1 }}",
    "a width beside %": "{{ '%*d' % (2000000000, 1) }}",
    "a width in format": "{{ '{:2000000000}'.format(1) }}",
    "text doubled": DOUBLED.replace("START", "'ab'").replace("TWICE", "ns.x ~ ns.x"),
    "text added": DOUBLED.replace("START", "'ab'").replace("TWICE", "ns.x + ns.x"),
    "lists in lists": DOUBLED.replace("START", "[1]").replace("TWICE", "[ns.x, ns.x]"),
    "a power": "{{ 10 ** (10 ** 10) }}",
    "replacing": TEXT + "{{ a.replace('x', a) }}",
    "a replacing filter": TEXT + "{{ a|replace('x', a) }}",
    "joining": TEXT + "{{ a.join(a) }}",
    "random text": "{{ lipsum(n=100000000) }}",
}
# What templates of known models do, and what looks like the above.
HARMLESS = [
    chats.TEMPLATE,
    chats.GENERATION_TEMPLATE,
    chats.FORGETFUL_TEMPLATE,
    "{% for m in messages[::-1] %}{{ loop.index0 ~ '/' ~ loop.length ~ m.content }}{% endfor %}",
    "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.content %}"
    "{% endfor %}{{ ns.t | replace('e', 'EE') }}{{ '-' * 40 }}{{ messages | tojson(indent=4) }}",
    "{% macro say(m) %}{{ '**{}** 20240101 {:>8}'.format(m.role, 3) }}"
    "{{ '%s %% %5.2f' % (m.role, 2) }}"
    "{{ caller() if caller else '' }}{% endmacro %}{% for m in messages %}{{ say(m) }}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ 2 ** 10 + 7 % 3 }}",
    "{% for k, v in messages[0] | dictsort recursive %}{{ k | upper ~ v | center(9) }}{% endfor %}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ dict(a=1) }}{{ bos_token }}",
]


@pytest.fixture(scope="module")
def tokenizer():
    return chats.make_tokenizer()


def with_template(tokenizer, template):
    return ChatTemplate(tokenizer, kwargs={"chat_template": template})


@pytest.mark.case("chat templates that never end or print too much")
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_that_does_too_much_is_a_finding_of_its_row(tokenizer, kind, monkeypatch):
    for name, value in {"SECONDS": 0.1, "_ITEMS": 1 << 14, "LARGEST": 1 << 22}.items():
        monkeypatch.setattr(template_limits, name, value)
    threads, began = threading.active_count(), time.process_time()
    row = {"messages": [chats.user("Is it red?"), chats.assistant("Yes.")]}
    options = {"chat_template_kwargs": {"chat_template": HOSTILE[kind]}}
    with pytest.raises(lddyn.ExampleError, match=r"the chat template .*: it is no template of"):
        encode_row(tokenizer, row, **options)
    found = audit(tokenizer, [row], **options).findings
    assert [f.problem for f in found if f.severity == "error"] == ["template_error"]
    assert threading.active_count() == threads
    assert time.process_time() - began < 4


def test_other_templates_render_to_the_tokenizer_s_bytes(tokenizer):
    messages = [chats.user("Where do cats sleep?"), chats.assistant("In the sun.")] * 3
    for template in HARMLESS:
        own = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        template_limits.check_work(
            template, {"messages": messages, "add_generation_prompt": False, "bos_token": "<|bos|>"}
        )
        made = template_limits._compiled(template)
        given = {"messages": messages, "add_generation_prompt": False, "bos_token": "<|bos|>"}
        template_limits._count.start()
        assert made.render(given) == own  # the limits change nothing of what it does
        ids = with_template(tokenizer, template).render(messages)
        whole = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True)
        assert ids == list(whole["input_ids"])


def test_a_template_that_raises_is_a_finding_of_its_row(tokenizer):
    row = {"messages": [chats.user("Is it red?"), chats.assistant("Yes.")]}
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(lddyn.ExampleError, match="roles must alternate"):
        encode_row(tokenizer, row, chat_template_kwargs={"chat_template": template})
