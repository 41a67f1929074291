"""Tokenizers of GGUF files: the same tokens there and back, and what no name says."""

from importlib.resources import files
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_llama import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from checkpoints_convert.gguf.tokenizer import pre_tokenizer, read_tokenizer, tokenizer_metadata


def sentence_piece(space: str = "first"):
    """A tokenizer as Llama's, with bytes, in one of the spellings of the prefix."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        *"▁abcd",
        "ab",
        "▁ab",
        "cd",
        "abcd",
    ]
    merges = [("a", "b"), ("▁", "ab"), ("c", "d"), ("ab", "cd")]
    bpe = models.BPE(
        vocab={w: i for i, w in enumerate(words)}, merges=merges, unk_token="<unk>", byte_fallback=True
    )
    inner = Tokenizer(bpe)
    if space == "prepend":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space, split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def byte_level():
    """A byte-level tokenizer that knows six merges."""
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), bos_token="<s>", eos_token="</s>")


def told_and_read(tokenizer, vocab: int, *, stop_tokens=(), without=()):
    """A tokenizer as the keys that tell it, read again; lists of numbers as a file gives them."""
    config = SimpleNamespace(vocab=vocab, stop_tokens=stop_tokens)
    metadata = tokenizer_metadata(tokenizer, config)
    assert len(metadata["tokenizer.ggml.tokens"]) == vocab
    for name in {"tokenizer.ggml.token_type", "tokenizer.ggml.scores"} & metadata.keys():
        metadata[name] = np.asarray(metadata[name])
    return read_tokenizer({name: value for name, value in metadata.items() if name not in without}, vocab)


@pytest.mark.parametrize("space", ["first", "never", "prepend"])
@pytest.mark.parametrize("without", [(), ("tokenizer.ggml.merges",)])  # other tools write scores alone
def test_a_sentence_piece_tokenizer_comes_back(space, without):
    tokenizer = sentence_piece(space)
    read = told_and_read(tokenizer, 280, stop_tokens=(2,), without=without)
    assert len(read) == len(tokenizer)
    texts = ["ab abcd", "abab  cdx é"]
    if space != "first":  # which puts no space before one: llama.cpp and SentencePiece do
        texts += [" abab", "é</s>a"]
    for text in texts:
        assert read.encode(text) == tokenizer.encode(text)
        assert read.decode(read.encode(text)) == tokenizer.decode(tokenizer.encode(text)).removeprefix(
            " " if space != "never" else ""
        )


def test_a_byte_level_tokenizer_comes_back_with_its_template_and_policy():
    file = files("jaxllm") / "pico" / "target" / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token="<|bos|>", eos_token="<|eos|>")
    tokenizer.chat_template = "{{ messages[0].content }}"
    read = told_and_read(tokenizer, 1024, stop_tokens=(tokenizer.eos_token_id,))
    text = "In 1999 a girl couldn't find\n\n her 2 dogs."
    assert read.encode(text) == tokenizer.encode(text) and read.encode(text)[0] == tokenizer.bos_token_id
    assert read.chat_template == tokenizer.chat_template and read.eos_token == tokenizer.eos_token


@pytest.mark.parametrize("cut", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_cut_is_known_again_by_its_name(cut):
    tokenizer = told_and_read(byte_level(), 264)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer(cut)
    assert (
        tokenizer_metadata(tokenizer, SimpleNamespace(vocab=264, stop_tokens=()))["tokenizer.ggml.pre"] == cut
    )


def test_text_cut_in_an_unknown_way_is_told():
    metadata = tokenizer_metadata(byte_level(), SimpleNamespace(vocab=264, stop_tokens=()))
    metadata["tokenizer.ggml.token_type"] = np.asarray(metadata["tokenizer.ggml.token_type"])
    with pytest.warns(UserWarning, match="the tokenizer is left out"):
        assert read_tokenizer(metadata | {"tokenizer.ggml.pre": "bloom"}, 264) is None
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"gguf\.save: the tokenizer must be"):
        told_and_read(tokenizer, 264)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tokens", ["a"] * 264, "tokens must differ"),
        ("tokens", np.arange(264), "must be 1 to 264 texts"),
        ("token_type", np.ones(3), "must be 264 numbers"),
        ("merges", ["a b c"], "two tokens and a space each"),
        ("merges", ["t zz"], "the tokenizer must be whole"),
        ("merges", None, "must have tokenizer.ggml.merges"),
        ("bos_token_id", 264, "bos_token_id must be below 264"),
        ("add_bos_token", 7, "must be true or false"),
    ],
)
def test_a_vocabulary_that_is_none_is_one_line(key, value, said):
    metadata = tokenizer_metadata(byte_level(), SimpleNamespace(vocab=264, stop_tokens=()))
    metadata["tokenizer.ggml.token_type"] = np.asarray(metadata["tokenizer.ggml.token_type"])
    with pytest.raises(ValueError, match=said) as caught:
        read_tokenizer(metadata | {f"tokenizer.ggml.{key}": value}, 264)
    assert "\n" not in str(caught.value)
