"""Chat templates: built in, in files and folders, hostile; and what transformers makes of them."""

import json
from datetime import datetime

import pytest
from steps_kit import assistant, user

from datakit.errors import InputError, Rejected
from datakit.models.specs import OpenAISpec, ScriptedSpec
from datakit.records import Message
from datakit.templates import (
    BUILT_IN,
    TODAY,
    Template,
    check_template,
    load_template,
    render,
    render_split,
    template_of,
)

SYSTEM = (Message(role="system", content="Be brief."),)
CHATS = {
    "one turn": user("Hi"),
    "answered": user(" Hi\n") + assistant("  Ho  \n\n"),
    "with a system prompt": SYSTEM + user("Hi") + assistant("Ho"),
    "long": user("a") + assistant("b") + user("c") + assistant("d") + user("e"),
    "marks": user("<b>&'\"{{ x }}{% if %}") + assistant("{# no comment #} <|im_end|>"),
    "letters": user("漢字 😀 é\u0301\u202e") + assistant("\x00\t«да»"),
    "empty": user("Hi") + assistant(""),
}


def made(source, **tokens):
    return Template("made", source, tuple(tokens.items()))


# The built-in ones.


def test_chatml():
    template = BUILT_IN["chatml"]
    asked = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert render(SYSTEM + user("Hi"), template, False) == asked
    assert render_split(SYSTEM + user("Hi"), assistant(" Ho "), template) == (
        f"{asked}<|im_start|>assistant\n",
        " Ho <|im_end|>\n",
    )


def test_llama3():
    before, after = render_split(SYSTEM + user(" Hi "), assistant("Ho"), BUILT_IN["llama3"])
    assert before == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert after == "Ho<|eot_id|>"


def test_plain():
    assert render_split(user("Hi"), assistant("Ho"), BUILT_IN["plain"]) == (
        "user: Hi\n\nassistant:",
        " Ho\n\n",
    )


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("chat", CHATS)
def test_prompt_and_answer_make_the_whole_text(name, chat):
    template = BUILT_IN[name]
    check_template(template)
    prompt, tail = CHATS[chat], assistant("one") + user("two") + assistant("three")
    if prompt[-1].role == "assistant":
        prompt += user("go on")
    before, after = render_split(prompt, tail, template)
    assert before == render(prompt, template, True)
    assert before + after == render(prompt + tail, template, False)
    assert "three" in after
    # A tail that begins with the user has no place where an answer begins.
    before, after = render_split(prompt, tail[1:], template)
    assert before == render(prompt, template, False)
    assert "two" in after


# Files and folders.


def folder(path, template=None, config=None):
    path.mkdir(parents=True, exist_ok=True)
    if template is not None:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


ECHO = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def test_a_folders_file_comes_before_its_config(tmp_path):
    config = {
        "chat_template": "config",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False},
        "unk_token": None,
        "add_bos_token": True,
    }
    given = folder(tmp_path / "m", ECHO, config)
    template = load_template(given)
    assert render(user("a") + assistant("b"), template, False) == "<s>a</s>b</s>"
    assert dict(template.special_tokens) == {"bos_token": "<s>", "eos_token": "</s>"}
    assert load_template(str(given / "chat_template.jinja")).fingerprint() == template.fingerprint()
    (given / "chat_template.jinja").unlink()
    assert render(user("a"), load_template(given), False) == "config"
    # What is written anew is read anew.
    folder(given, None, config | {"chat_template": "other"})
    assert render(user("a"), load_template(given), False) == "other"


def test_of_several_templates_the_default_counts(tmp_path):
    listed = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    assert render(
        user("a"), load_template(folder(tmp_path, None, {"chat_template": listed})), False
    ) == ("d")
    folder(tmp_path, None, {"chat_template": [*listed[:1], None, 3]})
    with pytest.raises(InputError, match="no chat template in"):
        load_template(tmp_path)


def test_a_file_alone_has_no_special_tokens(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(ECHO)
    assert render(user("a"), load_template(file), False) == "a"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot read"):
        load_template(file)


@pytest.mark.parametrize("config", ["{", "[]", "3", "[" * 100_000])
def test_a_broken_config_is_told(tmp_path, config):
    folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):
        load_template(tmp_path)


def test_what_is_missing_is_told_with_what_there_is(tmp_path):
    with pytest.raises(InputError, match="did you mean 'chatml'"):
        load_template("chatlm")
    with pytest.raises(InputError, match=r"no chat template in .*built-in ones \(chatml, llama3"):
        load_template(folder(tmp_path / "m", None, {"bos_token": "<s>"}))
    with pytest.raises(InputError, match="neither built in nor a path"):
        load_template(tmp_path / "x")


def test_a_fingerprint_is_what_a_template_says(tmp_path):
    seen = {
        template.fingerprint()
        for template in (
            *BUILT_IN.values(),
            made(ECHO),
            made(ECHO, bos_token="<s>"),
            made(ECHO, eos_token="<s>"),
            made(f"{ECHO} "),
        )
    }
    assert len(seen) == 7
    assert Template("other", ECHO).fingerprint() == made(ECHO).fingerprint()


def test_a_model_has_its_own_template_where_it_is_a_folder(tmp_path, monkeypatch):
    def spec(model):
        return OpenAISpec(kind="openai", model=str(model), base_url="http://127.0.0.1:9/v1")

    chatml = BUILT_IN["chatml"].source
    given = folder(tmp_path / "m", chatml)
    assert template_of(spec(given)).source == chatml
    assert template_of(spec(given), "llama3") == BUILT_IN["llama3"]
    assert template_of(ScriptedSpec(kind="scripted")) == BUILT_IN["chatml"]
    with pytest.raises(InputError, match="no chat template in"):
        template_of(spec(folder(tmp_path / "bare")))
    # A folder that only happens to lie here is not meant.
    monkeypatch.chdir(tmp_path)
    for name in ("m", "org/name", str(tmp_path / "none")):
        with pytest.raises(InputError, match="which chat template does model"):
            template_of(spec(name))


# Templates that fail.


def test_a_template_may_refuse_a_conversation():
    strict = made(
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('no system role') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    check_template(strict)
    with pytest.raises(Rejected) as raised:
        render(SYSTEM + user("a"), strict, False)
    assert raised.value.reason == "template_refuses"
    assert "no system role" in str(raised.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% if add_generation_prompt %}think{% endif %}{{ messages[-1].content }}",
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{{ raise_exception('never') }}",
    ],
)
def test_a_template_whose_prompt_changes_with_the_answer_is_no_use(source):
    with pytest.raises(InputError, match="cannot be used"):
        check_template(made(source))
    with pytest.raises(Rejected, match="template_"):
        render_split(user("a"), assistant("b"), made(source))


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ a", "{% endfor %}", "{{ x | nosuch }}", "{% unknown %}", "{{ (" * 9]
)
def test_what_is_not_jinja_is_told_when_it_is_loaded(tmp_path, source):
    with pytest.raises(InputError, match="is not Jinja, line 1"):
        load_template(folder(tmp_path, source))


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ ''.__class__.__mro__ }}x{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__['os'] }}",
        "{{ raise_exception.__globals__['json'].loads('1') }}",
        "{{ namespace(__x=1) }}",
        "{% set n = namespace() %}{% set n.__class__ = 3 %}",
        "{{ range(100000000) | list }}",
        "{{ ('%s' | attr('__class__')).mro() }}",
        "{{ strftime_now.__self__.__class__.__subclasses__() }}",
        "{{ dict.__class__.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_reaches_nothing(source):
    with pytest.raises(InputError, match="made"):
        render(user("a"), made(source), False)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
        "{{ messages + 1 }}",
        "{{ nosuch() }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_template_that_fails_is_the_users_mistake(source):
    with pytest.raises(InputError, match="chat template 'made' fails"):
        render(user("a"), made(source), False)


def test_the_date_stands_still():
    dated = made("{{ strftime_now('%d %b %Y') }}")
    assert render(user("a"), dated, False) == "26 Jul 2024"
    assert render(user("a"), dated, False, datetime(2031, 2, 3)) == "03 Feb 2031"


# The twin: what transformers makes of the same templates.

HARD = {
    "white space": """
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- 'U: ' + message['content'] -}}
    {% else %}
  A: {{ message['content'] | trim }}
    {%- endif %}
{% endfor %}
    {% if add_generation_prompt %}
A:
    {% endif %}
""",
    "loop controls": (
        "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}"
        "{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.index0 }}{{ m.content }}"
        "{% endfor %}"
    ),
    "json": (
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}"
        "{{ messages[0] | tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':')) }}"
    ),
    "namespaces": (
        "{% set ns = namespace(seen='', n=0) %}{% for m in messages %}"
        "{% set ns.seen = ns.seen + m.role %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.seen }}{{ ns.n }}{{ dict(a=1).a }}{{ dict.fromkeys('ab', 1) }}"
    ),
    "special tokens": (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{{ unk_token }}{{ pad_token is defined }}{{ tools is none }}{{ documents is none }}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}\n"
        "  {{ m.content }}\n  {% endgeneration %}\n{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "macros": (
        "{% macro turn(m) %}[{{ m.role | upper }}:{{ m.content | replace('a', 'b') }}]"
        "{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}"
        "{% if add_generation_prompt %}{{ turn({'role': 'x', 'content': ''}) }}{% endif %}"
    ),
    "tests": (
        "{% for m in messages %}{% if m.content is string and m.tool_calls is not defined %}"
        "{{ m.content.split('\\n')[-1].strip() }}{{ m.get('name', '-') }}{% endif %}{% endfor %}"
        "{{ strftime_now is defined }}{{ messages[1:] | length }}"
        "{{ messages | map(attribute='role') | join(',') }}"
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BUILT_IN, *HARD])
def test_transformers_renders_the_same(name, tokenizer, tmp_path):
    tokenizer.chat_template = BUILT_IN[name].source if name in BUILT_IN else HARD[name]
    tokenizer.save_pretrained(tmp_path)
    # Read as it was saved: the file, and its tokens in the config beside it.
    template = load_template(tmp_path)
    for chat in CHATS.values():
        turns = [{"role": turn.role, "content": turn.content} for turn in chat]
        for answers in (False, True):
            wanted = tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=answers
            )
            assert render(chat, template, answers) == wanted


@pytest.mark.slow
def test_transformers_dates_the_same(tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%Y') }}"
    turns = [{"role": "user", "content": "a"}]
    wanted = tokenizer.apply_chat_template(turns, tokenize=False)
    now = datetime.now()
    assert render(user("a"), made(tokenizer.chat_template), False, now) == wanted
    assert now > TODAY
