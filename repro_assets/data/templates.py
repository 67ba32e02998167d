"""Chat templates: where they are found, the sandbox they run in, and a run on stand-ins that shows what a template does with any content.

What a conversation's text and spans are is `rendering.py`.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment

from repro_assets.data.errors import RenderingError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
#: contents that stand in for any content, one private-use character each; in the second plane for `content | trim`
ANY, TRIMMED = 0xF0000, 0x100000
# Filters and tests that may see a content: the first is tracked, the others say the same of every string.
_TRACKED = {"trim"}
_SAME_OF_ALL = {"string", "defined", "undefined", "none", "mapping", "number", "boolean", "true", "false", "integer", "float"}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`: its body, between the two strings of `environment.marks`."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        start, end = self.environment.marks  # type: ignore[attr-defined]
        return f"{start}{caller()}{end}"


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment(kind: type[ImmutableSandboxedEnvironment] = ImmutableSandboxedEnvironment) -> ImmutableSandboxedEnvironment:
    # strftime_now is left out on purpose: a template that reads the clock would give other bytes tomorrow.
    environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.extend(marks=("", ""))
    return environment


def find_template(files: Mapping[str, bytes]) -> str:
    """The chat template among a tokenizer's files: chat_template.jinja, else the one in tokenizer_config.json (the default of several).

    Raises RenderingError when there is none.
    """
    if (own := files.get("chat_template.jinja")) is not None:
        return own.decode("utf-8")
    found = _config(files).get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    if not isinstance(found, str):
        raise RenderingError(
            "the base model has no chat template: neither chat_template.jinja nor `chat_template` in tokenizer_config.json; "
            "put the template that the model will be served with into chat_template.jinja"
        )
    return found


def named_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """The special tokens that a template may name (`bos_token`, `eos_token`, ...), from tokenizer_config.json."""
    config = _config(files)
    extra = config.get("extra_special_tokens")
    found = {**{name: config.get(name) for name in NAMED}, **(extra if isinstance(extra, dict) else {})}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: value for name, value in texts.items() if isinstance(value, str)}


def _config(files: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(files.get("tokenizer_config.json", b"{}"))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RenderingError(f"tokenizer_config.json is not JSON: {error}; restore the base model's files") from error
    return value if isinstance(value, dict) else {}


class Inspected(Exception):
    """A template did something with a content that depends on what the content is."""


class Content(str):
    """Stands for any content: it can be joined to text and trimmed, and refuses to be looked at."""

    __slots__ = ()

    def __add__(self, other: str) -> "Content":
        return Content(str.__add__(self, other))

    def __radd__(self, other: str) -> "Content":
        return Content(str.__add__(other, self))

    def strip(self, chars: str | None = None) -> "Content":  # type: ignore[override]
        if chars is not None or str.__len__(self) != 1:
            raise Inspected
        return Content(chr(TRIMMED + ord(self) % 0x10000))

    def __bool__(self) -> bool:
        raise Inspected


def _refuse(*_arguments: Any, **_named: Any) -> Any:
    raise Inspected


_KEPT = {"__new__", "__init__", "__class__", "__getattribute__", "__str__", "__add__", "strip", "__setattr__", "__delattr__", "__doc__"}
_KEPT |= {"__init_subclass__", "__subclasshook__", "__dir__", "__reduce__", "__reduce_ex__", "__sizeof__", "__getstate__"}
for _name in dir(str):
    if _name not in _KEPT:
        setattr(Content, _name, _refuse)


def _holds(value: Any) -> bool:
    """Whether a content is somewhere in `value`."""
    if isinstance(value, dict):
        return any(_holds(one) for pair in value.items() for one in pair)
    return isinstance(value, Content) or (isinstance(value, list | tuple) and any(_holds(one) for one in value))


def _watched(function: Any) -> Any:
    # Filters turn their argument into an ordinary string first, which would look at a content unseen.
    @functools.wraps(function)
    def watching(*arguments: Any, **named: Any) -> Any:
        if _holds(arguments) or _holds(named):
            raise Inspected
        return function(*arguments, **named)

    return watching


class Symbolic(ImmutableSandboxedEnvironment):
    """Runs a template on `Content`s and refuses whatever could read one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters = {name: one if name in _TRACKED else _watched(one) for name, one in self.filters.items()}
        self.tests = {name: one if name in _SAME_OF_ALL else _watched(one) for name, one in self.tests.items()}

    def call(self, context: Any, called: Any, /, *arguments: Any, **named: Any) -> Any:
        if _holds(arguments) or _holds(named):
            raise Inspected
        return super().call(context, called, *arguments, **named)


def traceable(template: str) -> bool:
    """Whether the template has none of the constructs in which a `Content` would become an ordinary string unseen."""
    tree = environment().parse(template)
    losing = (jinja2.nodes.Concat, jinja2.nodes.AssignBlock, jinja2.nodes.FilterBlock, jinja2.nodes.Macro, jinja2.nodes.Include)
    if next(tree.find_all((*losing, jinja2.nodes.FromImport, jinja2.nodes.Import)), None) is not None:
        return False
    if any(not isinstance(block.call.node, jinja2.nodes.ExtensionAttribute) for block in tree.find_all(jinja2.nodes.CallBlock)):
        return False
    if any(isinstance(node.left, jinja2.nodes.Const) and isinstance(node.left.value, str) for node in tree.find_all(jinja2.nodes.Mod)):
        return False
    return not any(
        operand.op in ("in", "notin") and isinstance(operand.expr, jinja2.nodes.Const) and isinstance(operand.expr.value, str)
        for operand in tree.find_all(jinja2.nodes.Operand)
    )


def literals(template: str) -> str:
    """The text that the template itself writes: its raw text and string constants, joined by a null character."""
    tree = environment().parse(template)
    texts = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
    texts |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return "\0".join(sorted(texts))
