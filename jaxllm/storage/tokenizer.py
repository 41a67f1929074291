"""The tokenizer of a directory, as transformers reads it."""

from pathlib import Path

from jaxllm.storage.metadata import one_line

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "tokenizer_config.json",
)


def load_tokenizer(path: Path):
    """The tokenizer of a directory, None where there are no tokenizer files."""
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # whatever a broken or unsupported tokenizer file raises
        raise ValueError(f"load: the tokenizer files must load, got {one_line(error)}") from error
