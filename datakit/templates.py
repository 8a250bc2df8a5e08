"""From a conversation to the text that a model was trained on, by its chat template.

Templates are Jinja as transformers runs it: the same sandbox, white space rules, tags, filters and
functions, so the text is the one that a trainer sees. A template is untrusted: it reaches nothing
but the messages and its own special tokens. The sandbox bounds what it can reach, not what it
costs.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from datakit.errors import InputError, Rejected
from datakit.models.specs import ChatSpec, ScriptedSpec
from datakit.records import Message, Messages
from datakit.text import digest, near_miss, shorten

if TYPE_CHECKING:
    import jinja2

TODAY = datetime(2024, 7, 26)
"""The date for templates that ask for one: what Llama 3.1's falls back on. With the calendar's, a
text would be another one tomorrow, and so would its likelihood and its key."""

_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""

_PLAIN = """\
{%- for message in messages -%}
{{ message['role'] + ': ' + message['content'] + '\\n\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'assistant:' }}
{%- endif -%}
"""


@dataclass(frozen=True)
class Template:
    """A chat template. `name` is for messages only.

    source: Jinja text. special_tokens: names and texts of what it may use, as `bos_token`.
    is_whole: it writes every special token itself, so that a server must add none; `plain` leaves
    that to the server.
    """

    name: str
    source: str
    special_tokens: tuple[tuple[str, str], ...] = ()
    is_whole: bool = True

    def fingerprint(self) -> str:
        """Hash of all that decides what it renders."""
        return digest([self.source, sorted(self.special_tokens), self.is_whole])


BUILT_IN = {
    "chatml": Template("chatml", _CHATML, (("eos_token", "<|im_end|>"),)),
    "llama3": Template(
        "llama3",
        _LLAMA3,
        (("bos_token", "<|begin_of_text|>"), ("eos_token", "<|eot_id|>")),
    ),
    "plain": Template("plain", _PLAIN, is_whole=False),
}
"""`chatml`: Qwen and many others; `llama3`: Llama 3; `plain`: `role: content` paragraphs, for base
models."""


def load_template(name_or_path: str | Path) -> Template:
    """A built-in template, or that of a `.jinja` file or a model folder.

    A folder's is its chat_template.jinja, else chat_template in its tokenizer_config.json (the one
    named `default` of several); special tokens are those of the tokenizer_config.json beside it.
    Raises InputError where there is none, or it is not Jinja.
    """
    if isinstance(name_or_path, str) and name_or_path in BUILT_IN:
        return BUILT_IN[name_or_path]
    path = Path(name_or_path)
    folder = path if path.is_dir() else path.parent
    file = path / "chat_template.jinja" if path.is_dir() else path
    config = folder / "tokenizer_config.json"
    if not path.exists():
        known = near_miss(str(name_or_path), BUILT_IN)
        raise InputError(
            f"no chat template {str(name_or_path)!r}: neither built in nor a path{known}"
        )
    template = _load(str(path.absolute()), file, config, _stamp(file), _stamp(config))
    _compiled(template.source, template.name)
    return template


def template_of(spec: ChatSpec, named: str | Path | None = None) -> Template:
    """The template for texts that a model is to read: the named one, else the model's own.

    A model has one of its own where `model` is the whole path of its folder; the fake reads
    ChatML. Raises InputError where there is none, or it cannot be used.
    """
    folder = Path(spec.model)
    if named is None and isinstance(spec, ScriptedSpec):
        named = "chatml"
    # Only by its whole path: what happens to lie in the current folder means nothing.
    if named is None and folder.is_absolute() and folder.is_dir():
        named = folder
    if named is None:
        raise InputError(
            f"which chat template does model {spec.model!r} read? It is no folder that could tell "
            f"(a whole path); name a built-in one ({', '.join(BUILT_IN)}), a .jinja file, or a "
            "model folder as `template`"
        )
    template = load_template(named)
    check_template(template)
    return template


def render(
    messages: Messages, template: Template, add_generation_prompt: bool, now: datetime = TODAY
) -> str:
    """The text of a conversation, up to where an answer begins with `add_generation_prompt`.

    now: the date for templates that ask for one. Raises Rejected (`template_refuses`) where the
    template itself refuses the conversation, and InputError where it fails.
    """
    import jinja2

    compiled = _compiled(template.source, template.name)
    try:
        return compiled.render(
            messages=[_plain(turn) for turn in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=now.strftime,
            **dict(template.special_tokens),
        )
    except _Refusal as error:
        raise Rejected("template_refuses", f"{template.name}: {shorten(str(error))}") from error
    except jinja2.exceptions.SecurityError as error:
        raise InputError(
            f"chat template {template.name!r} does what no template may: {shorten(str(error))}"
        ) from error
    # Whatever else goes wrong in it, the template is at fault: nothing of ours runs there.
    except Exception as error:
        said = f"{type(error).__name__}: {shorten(str(error))}"
        raise InputError(f"chat template {template.name!r} fails: {said}") from error


def render_split(
    prompt: Messages, completion: Messages, template: Template, now: datetime = TODAY
) -> tuple[str, str]:
    """The texts of a prompt, up to where the answer begins, and of the turns that follow it.

    Together they are the text of the whole conversation. Raises Rejected (`template_splits`) where
    the template writes the prompt in another way once an answer follows, so that no text is the
    answer's alone, and what `render` raises.
    """
    answers = completion[0].role == "assistant"
    before = render(prompt, template, answers, now)
    whole = render((*prompt, *completion), template, False, now)
    if not whole.startswith(before):
        at = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), 0)
        raise Rejected(
            "template_splits",
            f"{template.name} writes the prompt in another way where an answer follows: "
            f"{shorten(before[at:], 40)!r} before it, {shorten(whole[at:], 40)!r} with it",
        )
    return before, whole[len(before) :]


@lru_cache(maxsize=32)
def check_template(template: Template) -> None:
    """Try a template on the smallest conversation, before anything is spent on many.

    Raises InputError where it fails, refuses, or does not let an answer follow its prompt.
    """
    prompt, answer = Message(role="user", content="Hi"), Message(role="assistant", content="Ho")
    try:
        render_split((prompt,), (answer,), template)
    except Rejected as error:
        raise InputError(f"chat template {template.name!r} cannot be used: {error}") from error


def _plain(turn: Message) -> dict[str, str]:
    return {"role": turn.role, "content": turn.content}


def _stamp(file: Path) -> tuple[int, int]:
    """Size and time, by which a file that changed is read anew."""
    try:
        stat = file.stat()
    except OSError:
        return (0, 0)
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=32)
def _load(name: str, file: Path, config: Path, *_: tuple[int, int]) -> Template:
    said = _config(config)
    tokens = tuple(
        (key, text)
        for key, value in said.items()
        if key.endswith("_token") and (text := _token_text(value)) is not None
    )
    if file.is_file():
        try:
            return Template(name, file.read_text(encoding="utf-8"), tokens)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the chat template {str(file)!r}: {error}") from error
    source = said.get("chat_template")
    if isinstance(source, list):
        listed: dict[Any, Any] = {
            one.get("name"): one.get("template")
            for one in cast("list[Any]", source)
            if isinstance(one, dict)
        }
        source = listed.get("default")
    if not isinstance(source, str):
        raise InputError(
            f"no chat template in {name!r}: neither chat_template.jinja nor a chat_template in "
            "tokenizer_config.json; name one of the built-in ones "
            f"({', '.join(BUILT_IN)}) or a .jinja file"
        )
    return Template(name, source, tokens)


def _config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {str(path)!r}: {shorten(str(error))}") from error
    if not isinstance(said, dict):
        raise InputError(f"{str(path)!r} is not a JSON object")
    return cast("dict[str, Any]", said)


def _token_text(value: object) -> str | None:
    """A special token: its text, or an object that holds it as `content`."""
    if isinstance(value, dict):
        value = cast("dict[str, object]", value).get("content")
    return value if isinstance(value, str) else None


class _Refusal(Exception):
    """A template's own `raise_exception`."""


@lru_cache(maxsize=32)
def _compiled(source: str, name: str) -> "jinja2.Template":
    import jinja2

    try:
        return _environment().from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        raise InputError(
            f"chat template {name!r} is not Jinja{where}: {shorten(str(error))}"
        ) from error


@lru_cache(maxsize=1)
def _environment() -> "jinja2.Environment":
    """The environment of transformers' chat templates (utils/chat_template_utils.py)."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.runtime import Macro
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}`, which marks an answer's text for trainers and changes none of it."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_body")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _body(self, caller: Macro) -> str:
            return caller()

    class SafeNamespace(Namespace):
        """A namespace without names that begin with `_`."""

        def __init__(*args: Any, **named: Any) -> None:
            self, *rest = args
            held = dict(*rest, **named)
            for name in held:
                SafeNamespace._check(name)
            Namespace.__init__(self, held)

        def __setitem__(self, name: str, value: Any) -> None:
            SafeNamespace._check(name)
            Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name: object) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"no namespace holds a name like {name!r}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    given: dict[str, Any] = {
        "raise_exception": _raise_exception,
        "dict": _Dict(),
        "namespace": SafeNamespace,
    }
    environment.globals.update(given)
    return environment


class _Dict:
    """`dict` without the type behind it."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        return dict(*args, **named)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _raise_exception(message: object) -> None:
    raise _Refusal(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML's escapes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
