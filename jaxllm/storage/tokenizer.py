"""The tokenizer of a directory, as transformers reads it."""

from pathlib import Path

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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"huggingface.load: the tokenizer files must load, got {reason}") from error
