"""Parse conversations in JSON: messages as OpenAI or ShareGPT write them, or a prompt and a completion."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]  # at least `role`; all fields reach the chat template

ASSISTANT = "assistant"
# The names of ShareGPT, and the roles that chat templates know.
_ROLES = {
    "human": "user", "user": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bing": ASSISTANT,
    "bard": ASSISTANT, ASSISTANT: ASSISTANT, "system": "system", "tool": "tool",
}  # fmt: skip
SHAPES = "`messages` (OpenAI), `conversations` (ShareGPT), or `prompt` and `completion`"


class BadConversation(ValueError):
    """Raised for a record that cannot be trained on; the message says why."""


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template. The assistant's messages are learned."""

    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class PromptCompletion:
    """Text without a template. The completion is learned."""

    prompt: str
    completion: str


def parsed(record: dict[str, Any]) -> Conversation | PromptCompletion:
    """Return the conversation or pair that a record contains. Raises BadConversation."""
    if "messages" in record:
        messages = [_message(message, place) for place, message in _numbered(record, "messages")]
        return Conversation(_checked(messages), _tools(record.get("tools")))
    if "conversations" in record:
        messages = [_message(message, place) for place, message in _numbered(record, "conversations")]
        if isinstance(record.get("system"), str) and record["system"]:
            messages.insert(0, {"role": "system", "content": record["system"]})
        return Conversation(_checked(messages), _tools(record.get("tools")))
    if "prompt" in record and "completion" in record:
        for name in ("prompt", "completion"):
            if not isinstance(record[name], str):
                raise BadConversation(f"has no text in {name!r}")
        if not record["completion"]:
            raise BadConversation("has an empty completion, so there is nothing to learn")
        return PromptCompletion(record["prompt"], record["completion"])
    names = ", ".join(list(record)[:5]) or "none"
    raise BadConversation(f"has no conversation; {SHAPES} are read, and its fields are: {names}")


def _tools(value: Any) -> list[Any] | None:
    """Return the tools of a conversation, also of JSON text, as data sets of Hugging Face write them."""
    if not value:
        return None
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        tools = value
    if not isinstance(tools, list | None) or not all(isinstance(tool, dict) for tool in tools or ()):
        raise BadConversation("has no list of objects in 'tools'")
    return tools or None


def texts_in(value: Any) -> Iterator[str]:
    """Yield all strings in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)


def _numbered(record: dict[str, Any], field: str) -> Iterator[tuple[str, Message]]:
    messages = record[field]
    if not isinstance(messages, list) or not messages:
        raise BadConversation(f"has no list of messages in {field!r}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise BadConversation(f"has no object as message {number}")
        yield f"message {number}", message


def _message(message: Message, place: str) -> Message:
    """Return a message in OpenAI's shape. A list `conversations` may hold messages of either shape."""
    return _sharegpt(message, place) if "from" in message else _openai(message, place)


def _openai(message: Message, place: str) -> Message:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise BadConversation(f"has no role in {place}")
    if isinstance(content, list):
        content = "".join(_text_of_part(part, place) for part in content)
    if not isinstance(content, str) and not message.get("tool_calls"):
        raise BadConversation(f"has no text in {place}")
    # Templates write an absent field right, and null as "None".
    return {name: value for name, value in {**message, "content": content}.items() if value is not None}


def _text_of_part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise BadConversation(f"has a part in {place} that is not text")


def _sharegpt(message: Message, place: str) -> Message:
    name, content = message.get("from"), message.get("value")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadConversation(f"has the unknown speaker {name!r} in {place}; known are {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise BadConversation(f"has no text in {place}")
    return {"role": role, "content": content}


def _checked(messages: list[Message]) -> list[Message]:
    if all(message["role"] != ASSISTANT for message in messages):
        raise BadConversation("has no message of the assistant, so there is nothing to learn")
    return messages
