"""Stop strings are found in the text with its special tokens; what is shown has none of them."""

import jax.numpy as jnp
import pytest
from flax import nnx
from tiny_llama import byte_tokenizer
from transformers import PreTrainedTokenizerFast

import jaxllm as jl
from jaxllm.decoding.text import NewText
from jaxllm.models.decoder import Config, Decoder

END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), bos_token="<s>", eos_token="</s>", extra_special_tokens=[END]
    )


@pytest.fixture(scope="module")
def reciter(tokenizer):
    """A model that writes one text, whatever it is: each token is followed by the next."""
    path = tokenizer.encode(f"#abc{END}xyz", add_special_tokens=False)
    V = len(tokenizer)
    sizes = {"layers": 1, "width": V, "heads": 1, "kv_heads": 1, "head_dim": 2, "ffn": 2, "vocab": V}
    model = Decoder(Config(**sizes, context=32, tied=False), rngs=nnx.Rngs(0))
    follows = jnp.zeros((V, V)).at[jnp.array(path[1:]), jnp.array(path[:-1])].set(5.0)
    block = model.layers[0]
    for linear, rows in (
        (model.embedding.table, jnp.eye(V)),
        (model.head.w, follows),
        (block.attention.o.w, jnp.zeros((V, 2))),
        (block.mlp.down.w, jnp.zeros((V, 2))),
    ):
        linear.set_value(type(linear.get_value())(rows))
    return model


@pytest.mark.parametrize(
    "stop, text",
    [
        ([END], "abc"),
        (["</s>", END], "abc"),
        ([f"c{END}"], "ab"),  # over an ordinary and a special token
        ([f"{END}xy"], "abc"),
        (["im_end"], "abc"),  # a part of a special token is its text as well
        ([f"bc{END}x"], "a"),
        (["yz"], "abcx"),
        (["cx"], "abcxyz"),  # which no one wrote: a token lies between
    ],
)
def test_a_stop_string_may_be_or_hold_a_special_token(reciter, tokenizer, stop, text):
    options = {"max_new_tokens": 7, "stop": stop, "stop_tokens": []}
    (out,) = jl.generate(reciter, tokenizer, [tokenizer.encode("#", add_special_tokens=False)], **options)
    assert out.text == text and out.finish_reason == ("length" if stop == ["cx"] else "stop")
    streamed = list(jl.stream(reciter, tokenizer, out.prompt_ids, **options))
    assert "".join(token.text for token in streamed) == text
    assert [token.token_id for token in streamed] == out.token_ids


def test_a_text_is_shown_up_to_any_of_its_characters_without_special_tokens(tokenizer):
    ids = tokenizer.encode(f"<s>für{END}é{END}", add_special_tokens=False)
    text = NewText(tokenizer, ids[:2], ids[2:])
    assert text.all() == f"ür{END}é{END}" and text.shown() == "üré"
    shown = [text.shown(end) for end in range(len(text.all()) + 1)]
    assert shown == ["", "ü", *["ür"] * 11, *["üré"] * 11]
