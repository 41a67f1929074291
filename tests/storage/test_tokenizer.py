"""Tokenizers of a directory: a SentencePiece file alone loads, or the line says what to install."""

import importlib.util
import json
import struct

import pytest

from jaxllm.storage.tokenizer import load_tokenizer

INSTALLED = importlib.util.find_spec("sentencepiece") is not None


def settings(path, kind="LlamaTokenizer"):
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind} | names))


@pytest.mark.skipif(not INSTALLED, reason="needs the package sentencepiece")
def test_a_file_of_sentence_piece_alone_loads(tmp_path):
    import io

    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    made = io.BytesIO()
    lines = ["the dog went to the park", "a girl had a big red ball", "they were very happy"] * 8
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=made, vocab_size=300, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(made.getvalue())
    settings(tmp_path)
    theirs = SentencePieceProcessor(model_proto=made.getvalue())
    ours = load_tokenizer(tmp_path)
    for text in ("the big dog", "zq!", "happy  girl"):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text)
        assert ours.decode(theirs.encode(text)) == text


def piece(text, kind):
    """One entry of the protocol buffer: text, score, kind."""
    body = b"\n" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", 0.0) + b"\x18" + bytes([kind])
    return b"\n" + bytes([len(body)]) + body


@pytest.mark.skipif(INSTALLED, reason="says what to install where the package is missing")
@pytest.mark.parametrize(
    ("kind", "name"), [("LlamaTokenizer", "tokenizer.model"), ("T5Tokenizer", "spiece.model")]
)
def test_without_the_package_the_line_says_what_to_install(kind, name, tmp_path):
    (tmp_path / name).write_bytes(piece(b"<unk>", 2) + piece(b"<s>", 3) + piece(b"</s>", 3) + piece(b"a", 1))
    settings(tmp_path, kind)
    with pytest.raises(ValueError, match=r"pip install 'jaxllm\[sentencepiece\]'") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_broken_file_that_is_none_of_sentence_piece_is_told_as_it_is(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\n")
    settings(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer files must load") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
