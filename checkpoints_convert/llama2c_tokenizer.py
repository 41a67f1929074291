"""llama2.c's tokenizer `.bin` as a tokenizer of `transformers`.

Little-endian: int32 length of the longest entry, then for each id a float32 score, an int32 byte count, the
bytes.
"""

import struct
from pathlib import Path


def read_entries(path, vocab: int) -> list[tuple[float, bytes]]:
    """Score and bytes of each of the `vocab` entries of a tokenizer file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"llama2c_tokenizer: no such file, got path={str(path)!r}")
    data, at = path.read_bytes(), 4
    entries: list[tuple[float, bytes]] = []
    while len(entries) < vocab and at + 8 <= len(data):
        score, size = struct.unpack_from("<fi", data, at)
        if size < 0 or at + 8 + size > len(data):
            break
        entries.append((score, data[at + 8 : at + 8 + size]))
        at += 8 + size
    if len(entries) != vocab or at != len(data):
        raise ValueError(
            f"llama2c_tokenizer: {path.name} must hold {vocab} entries and no more, "
            f"got {len(entries)} in {at} of {len(data)} bytes"
        )
    return entries


def load_tokenizer(path, vocab: int):
    """The tokenizer of a llama2.c file as one of `transformers`; `encode` begins with token 1.

    llama2.c joins the pair whose entry scores highest; here each way to make an entry is a merge,
    ranked by score. Exact but for one thing: where two ways to make the *same* entry overlap,
    llama2.c takes the leftmost. Only runs of one repeated string can do that, and no text we tried
    does. As in llama2.c, text is never read as a special token ("<s>" is three characters), and the
    first token's leading space is not printed; unlike in llama2.c that holds wherever decoding
    starts, as with every Llama tokenizer of Hugging Face.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    entries = read_entries(path, vocab)
    words = [text.decode("utf-8", errors="surrogateescape") for _, text in entries]
    special = ["<unk>", "<s>", "</s>"]
    words[:3] = special
    ids = {word: i for i, word in reversed(list(enumerate(words)))}  # the first of equals
    if len(ids) != vocab or any(f"<0x{i:02X}>" not in ids for i in range(256)):
        raise ValueError(f"llama2c_tokenizer: entries must differ and name all bytes, got {path=}")
    merges = [
        (-entries[i][0], i, len(word) - cut, word[:cut], word[cut:])
        for word, i in ids.items()
        for cut in range(1, len(word))
        if i > 2 and word[:cut] in ids and word[cut:] in ids
    ]
    bpe = models.BPE(
        vocab=ids,
        merges=[(left, right) for *_, left, right in sorted(merges)],
        unk_token="<unk>",
        fuse_unk=False,
        byte_fallback=True,
    )
    inner = Tokenizer(bpe)
    inner.normalizer = normalizers.Prepend(" ")
    inner.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    inner.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )
