"""`jl.chat`'s messages: laid out by the template, or refused in one line; `generate` inside of a jit."""

import jax
import pytest
from flax import nnx
from tiny_llama import byte_tokenizer
from transformers import PreTrainedTokenizerFast

import jaxllm as jl
from jaxllm.decoding.messages import encode_messages
from jaxllm.models.decoder import TINY, Decoder

ANY_ROLE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
FOUR_ROLES = ANY_ROLE + "{% if messages[0].role == 'tool' %}!{% endif %}"
USERS_ONLY = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + ANY_ROLE


def tokenizer(template: str | None):
    made = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def message(role: str = "user", content: str = "hi") -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    "template, messages, text",
    [
        (ANY_ROLE, [message("system"), message()], "<system>hi<user>hi"),
        (ANY_ROLE, (message(content=""),), "<user>"),
        (FOUR_ROLES, [message("tool")], "<tool>hi!"),
        (USERS_ONLY, [message()], "hi"),
        (STRICT, [message()], "<user>hi"),
    ],
)
def test_messages_become_what_the_template_writes(template, messages, text):
    made = tokenizer(template)
    assert encode_messages(made, messages) == made.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "template, messages, says",
    [
        (None, [message()], "the tokenizer must have a chat template"),
        (ANY_ROLE, "hello", "messages must be a list of .*, got a text"),
        (ANY_ROLE, message(), "messages must be a list of .*, got {'role'"),
        (ANY_ROLE, [], r"messages must be a list of .*, got \[\]"),
        (ANY_ROLE, ["hello"], "messages must be a list of .*, got 'hello' among them"),
        (ANY_ROLE, [{"role": "user"}], "each message must have a text as content, got none"),
        (ANY_ROLE, [{"content": "hi"}], "each message must have a text as role, got none"),
        (ANY_ROLE, [message(content=3)], "each message must have a text as content, got 3"),
        (ANY_ROLE, [message("wizard")], "role must be system, .* or in the chat template, got 'wizard'"),
        (ANY_ROLE, [message("tool")], "role must be .*, got 'tool'"),
        (USERS_ONLY, [message("system"), message()], "must take every role, got 'system' passed over"),
        (STRICT, [message("system")], "as the chat template asks, got its no system here"),
    ],
)
def test_what_the_template_does_not_take_is_refused_in_one_line(template, messages, says):
    with pytest.raises(ValueError, match=says) as caught:
        encode_messages(tokenizer(template), messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "transformed",
    [
        lambda model: jax.jit(lambda: jl.generate(model, None, [[1, 2]]))(),
        lambda model: jax.jit(lambda model: jl.generate(model, None, [[1, 2]]))(model),
        lambda model: jax.lax.scan(lambda x, _: (x, jl.generate(model, None, [[1]])), 0, length=2),
        lambda model: jax.jit(lambda: list(jl.stream(model, None, [1, 2])))(),
    ],
    ids=["jit", "jit of the model", "scan", "stream"],
)
def test_generate_inside_of_a_transformation_says_what_to_use_there(transformed):
    with pytest.raises(TypeError, match=r"outside of jax.jit, grad, .* got a call inside; there use model\("):
        transformed(Decoder(TINY, rngs=nnx.Rngs(0)))
