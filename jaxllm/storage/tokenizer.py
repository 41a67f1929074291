"""The tokenizer of a directory, as transformers reads it."""

import importlib.util
from pathlib import Path

from jaxllm.storage.metadata import one_line

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "tokenizer_config.json",
)
SENTENCE_PIECE = ("tokenizer.model", "spiece.model")


def load_tokenizer(path: Path):
    """The tokenizer of a directory, None where there are no tokenizer files."""
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # whatever a broken or unsupported tokenizer file raises
        lost = [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]
        if lost and (models := [name for name in SENTENCE_PIECE if _is_sentence_piece(path / name)]):
            raise ValueError(
                f"load: the tokenizer is of SentencePiece, whose package must be installed: pip install "
                f"'jaxllm[sentencepiece]', got {models[0]} and no {lost[0]}"
            ) from error
        raise ValueError(f"load: the tokenizer files must load, got {one_line(error)}") from error


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _is_sentence_piece(file: Path) -> bool:
    """Whether a file is a SentencePiece model: a protocol buffer, its first field a piece, and no text."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(1) == b"\n"
