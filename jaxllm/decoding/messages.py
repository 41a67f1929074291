"""A conversation as token ids, laid out by a tokenizer's chat template, which must take all of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

ROLES = ("system", "user", "assistant")  # of every template; it names its others


def encode_messages(tokenizer, messages: Any) -> list[int]:
    """The ids of a list of messages, dicts with "role" and "content", and of the beginning of an answer.

    Raises ValueError, in one line, for a tokenizer without a template, for messages that are none, and for a
    role or a message that the template does not take.
    """
    template = getattr(tokenizer, "chat_template", None)
    if tokenizer is None or not template:
        raise ValueError("chat: the tokenizer must have a chat template, this model's has none")
    _check(messages, str(template))
    said = [dict(message) for message in messages]
    text = _laid_out(tokenizer, said)
    for i, message in enumerate(said):
        other = message | {"content": message["content"] + "."}
        if _laid_out(tokenizer, [*said[:i], other, *said[i + 1 :]]) == text:
            raise ValueError(f"chat: the template must take every role, got {message['role']!r} passed over")
    return tokenizer.encode(text, add_special_tokens=False)  # the template writes its own


def _check(messages: Any, template: str) -> None:
    """Raises ValueError unless messages have what a template asks of them."""
    kind = 'a list of {"role": ..., "content": ...}'
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        got = f"{messages!r:.60}" if not isinstance(messages, str) else "a text"
        raise ValueError(f"chat: messages must be {kind}, got {got}")
    for message in messages:
        if not isinstance(message, Mapping):
            raise ValueError(f"chat: messages must be {kind}, got {message!r:.60} among them")
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                got = f"{message[field]!r:.60}" if field in message else "none"
                raise ValueError(f"chat: each message must have a text as {field}, got {got}")
        role = message["role"]
        if role not in ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
            raise ValueError(f"chat: role must be {', '.join(ROLES)} or in the chat template, got {role!r}")


def _laid_out(tokenizer, messages: list[dict[str, str]]) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:  # a template's own words: which roles, in which order
        raise ValueError(f"chat: messages must be as the chat template asks, got its {error}") from error
