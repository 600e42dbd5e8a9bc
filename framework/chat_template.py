"""A base's chat template, rendered as transformers renders it, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tunefleet.errors import BaseModelError, RequestInvalid


class ChatTemplate:
    """Compiled once per base. Templates come from the base only, never from an upload or a request.

    Settings, filters and globals are those of ``transformers.utils.chat_template_utils`` (5.23).
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            environment = _environment()
            self._template = environment.from_string(source)
            self.literals = _literals(environment, source)
        except jinja2.TemplateError as error:
            raise BaseModelError(f"the base's chat template can't be compiled: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text before the model's answer.

        Raises:
            RequestInvalid: the template refuses these messages, for example two user turns in a row.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise RequestInvalid(
                f"the base's chat template refuses these messages: {error}",
                param="messages",
                code="invalid_messages",
            ) from error


class _Namespace(jinja2.utils.Namespace):
    """Refuses underscore names, which would reach interpreter internals."""

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise jinja2.TemplateError(f"a chat template can't store {name!r} on a namespace")
        super().__setitem__(name, value)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        "namespace": _Namespace,
    }
    return environment


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks assistant text for training; when serving, its body is plain text."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it as an instance variable

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, RUF100  templates may pass it by position
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _literals(environment: jinja2.Environment, source: str) -> tuple[str, ...]:
    """All the text that the template itself can write."""
    tree = environment.parse(source)
    texts = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
    texts |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return tuple(sorted(texts))
