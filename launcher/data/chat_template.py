"""Write a conversation as text with a chat template, and say which characters the assistant wrote.

A template is a program that comes with a tokenizer. It runs in Jinja's sandbox, and sees the same names and
settings as in Hugging Face transformers. Only the time is missing: the text would depend on it.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from launcher.config.errors import ConfigError
from launcher.data.conversation import ASSISTANT, BadConversation, Conversation

# Characters (start, end) of a text.
CharSpan = tuple[int, int]

# ChatML, for tokenizers without a template.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
TEMPLATE_FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
# Around the assistant's text while a template runs. Unicode has no such characters.
MARKS = _BEGIN, _END = "\ufdd0", "\ufdd1"
_HAS_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, and the special tokens by the names under which it reads them, such as bos_token."""

    source: str
    tokens: dict[str, str] = field(default_factory=dict)

    @cached_property
    def _render(self) -> Callable[..., str]:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """The block {% generation %} of transformers, which marks the text of the assistant."""

            tags = {"generation"}  # noqa: RUF012  (as the base class declares it)

            def parse(self, parser: Any) -> Any:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

            def _marked(self, caller: Callable[[], str]) -> str:
                return f"{_BEGIN}{caller()}{_END}"

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, **options)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        return environment.from_string(self.source).render

    def write(self, conversation: Conversation) -> tuple[str, list[CharSpan]]:
        """Return the text of a conversation, and the spans that the assistant wrote. Raises BadConversation.

        These are the blocks {% generation %} of the template. Without such blocks, an answer begins after the
        prompt that the template writes to ask for it, and ends with the end of its message.
        """
        text = self._text(conversation, conversation.messages)
        if _HAS_GENERATION.search(self.source):
            return _without_marks(text)
        spans = []
        for number, message in enumerate(conversation.messages):
            if message["role"] == ASSISTANT:
                before = self._text(conversation, conversation.messages[:number], add_generation_prompt=True)
                through = self._text(conversation, conversation.messages[: number + 1])
                if not (text.startswith(through) and through.startswith(before)):
                    why = f"the chat template writes message {number + 1} otherwise when more messages follow"
                    mend = "put {% generation %} and {% endgeneration %} around its answers, in a copy"
                    raise BadConversation(f"cannot be divided into turns, because {why}: {mend}")
                spans.append((len(before), len(through.rstrip())))
        return text, spans

    def _text(
        self, conversation: Conversation, messages: list[Any], *, add_generation_prompt: bool = False
    ) -> str:
        import jinja2

        try:
            return self._render(
                messages=messages, tools=conversation.tools, documents=None,
                add_generation_prompt=add_generation_prompt, **self.tokens,
            )  # fmt: skip
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise BadConversation(f"is refused by the chat template: {error}") from None

    def check(self, setting: str, value: object, remedy: str) -> None:
        """Raise ConfigError about `setting` if the template cannot be compiled."""
        import jinja2

        try:
            _ = self._render
        except jinja2.TemplateSyntaxError as error:
            why = f"line {error.lineno} of the chat template is wrong: {error.message}"
            raise ConfigError(setting, value, why, remedy) from None


def _without_marks(text: str) -> tuple[str, list[CharSpan]]:
    """Return the text without marks, and the spans that they enclosed."""
    pieces, spans, length, begins = [], [], 0, list[int]()
    for piece in re.split(f"([{_BEGIN}{_END}])", text):
        if piece == _BEGIN:
            begins.append(length)
        elif piece == _END and begins:
            spans.append((begins.pop(), length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), sorted(spans)


def template_of(
    tokenizer: Path | None, template: Path | None, *, tokenizer_field: str, template_field: str
) -> ChatTemplate:
    """Return the template in the file `template`, or the tokenizer's own; ChatML if tokens are bytes.

    A tokenizer carries it beside its tokenizer.json, as chat_template.jinja or in tokenizer_config.json.
    Raises ConfigError.
    """
    if tokenizer is not None and not tokenizer.is_file():
        inside = tokenizer / "tokenizer.json"
        path = inside if inside.is_file() else "PATH of a tokenizer.json"
        raise ConfigError(tokenizer_field, tokenizer, "is not a file", f"{tokenizer_field}={path}")
    remedy = f"{template_field}=PATH of a file with a Jinja chat template"
    config = _config_beside(tokenizer, tokenizer_field)
    tokens = {name: text for name, value in config.items() if (text := _token(name, value)) is not None}
    if template is not None:
        made, field_, value = ChatTemplate(_read(template, template_field), tokens), template_field, template
    elif tokenizer is None:
        return ChatTemplate(CHATML)
    else:
        beside = tokenizer.parent / TEMPLATE_FILE
        source = _read(beside, tokenizer_field) if beside.is_file() else _named(config.get("chat_template"))
        if source is None:
            why = f"neither {beside} nor {TOKENIZER_CONFIG} beside this tokenizer has a chat template"
            raise ConfigError(template_field, None, why, remedy)
        made, field_, value = ChatTemplate(source, tokens), tokenizer_field, tokenizer
    made.check(field_, value, remedy)
    return made


def _config_beside(tokenizer: Path | None, setting: str) -> dict[str, Any]:
    path = None if tokenizer is None else tokenizer.parent / TOKENIZER_CONFIG
    if path is None or not path.is_file():
        return {}
    try:
        config = json.loads(_read(path, setting))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        why = f"{path} is not a JSON object"
        raise ConfigError(setting, tokenizer, why, f"the {TOKENIZER_CONFIG} of the tokenizer")
    return config


def _read(path: Path, setting: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeError) as error:
        why = f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        raise ConfigError(setting, path, why, f"{setting}=PATH of a readable file") from None


def _token(name: str, value: Any) -> str | None:
    """Return the spelling of a special token in tokenizer_config.json; None for another setting."""
    spelling = value.get("content") if isinstance(value, dict) else value
    return spelling if name.endswith("_token") and isinstance(spelling, str) else None


def _named(templates: Any) -> str | None:
    """Return the template in tokenizer_config.json: the only one, or the one with the name `default`."""
    if isinstance(templates, list):
        named = {item.get("name"): item.get("template") for item in templates if isinstance(item, dict)}
        templates = named.get("default")
    return templates if isinstance(templates, str) else None
