"""The tokenizer that a GGUF file describes as one of `transformers`, and back.

The file has tokens, their kinds, and merges or scores. How text is cut before is a name
(`tokenizer.ggml.pre`) for byte-level BPE, "gpt2", and fixed for SentencePiece's, "llama". Of the names those
are known that the families here use; text that is cut otherwise gives other tokens without a word, so a
tokenizer of another name is left out with a warning when a file is read, and refused when one is written.
"""

import json
import warnings
from typing import Any

import numpy as np

from checkpoints_convert.json_fields import COUNT, FLAG, TEXT, Kind, null_or
from jaxllm.storage.metadata import excerpt, one_line

Metadata = dict[str, Any]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"  # SentencePiece's
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# How text is cut, by the names of llama.cpp: at each digit, by a pattern, by GPT-2's own.
CUTS: dict[str, tuple] = {
    "gpt-2": ("ByteLevel",),
    "smollm": ("Digits", "ByteLevel"),
    "llama-bpe": (WORDS,),
    "qwen2": (WORDS.replace("{1,3}", ""),),
}
ALIASES = {"starcoder": "smollm", "refact": "smollm", "command-r": "smollm", "deepseek-r1-qwen": "qwen2"}
ALIASES |= {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "phi-2": "gpt-2", "gigachat": "gpt-2"}
BEGINS = ("llama-bpe",)  # byte-level ones that begin texts with a token of their own unless the file says no
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read_tokenizer(metadata: Metadata, vocab: int):
    """The tokenizer of a file whose model has `vocab` tokens; None where it has none or an unknown one."""
    kind = _given(metadata, "model", null_or(TEXT)) or "none"
    if kind in ("none", "no_vocab"):
        return None
    tokens, kinds = _tokens(metadata, vocab)
    cut = _given(metadata, "pre", null_or(TEXT)) or "default"
    cut = ALIASES.get(cut, cut)
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and cut not in CUTS):
        warnings.warn(
            "gguf.load: the tokenizer is left out, which must be llama, or gpt2 that cuts text as one of "
            f"{', '.join(CUTS)}, got {excerpt(kind)} and {excerpt(cut)}",
            stacklevel=3,
        )
        return None
    try:
        inner = (
            _byte_level(metadata, tokens, cut) if kind == "gpt2" else _sentence_piece(metadata, tokens, kinds)
        )
        return _finished(metadata, inner, tokens, kinds, default_begin=kind == "llama" or cut in BEGINS)
    except Exception as error:  # whatever the tokenizers package says of a vocabulary that is none
        if isinstance(error, ValueError) and str(error).startswith("gguf.load"):
            raise
        raise ValueError(f"gguf.load: the tokenizer must be whole, got {one_line(error)}") from error


def stop_tokens_of(metadata: Metadata) -> tuple[int, ...]:
    """The tokens that end a text."""
    ends = [_given(metadata, name, null_or(COUNT)) for name in ENDS]
    return tuple(dict.fromkeys(end for end in ends if end is not None))


def _given(metadata: Metadata, name: str, kind: Kind):
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not kind.holds(value):
        raise ValueError(f"gguf.load: tokenizer.ggml.{name} must be {kind.must}, got {excerpt(value)}")
    return value


def _tokens(metadata: Metadata, vocab: int) -> tuple[list[str], np.ndarray]:
    """The tokens and the kind of each, without those that only fill the table up."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not 0 < len(tokens) <= vocab:
        told = len(tokens) if isinstance(tokens, list) else excerpt(tokens)
        raise ValueError(f"gguf.load: tokenizer.ggml.tokens must be 1 to {vocab} texts, got {told}")
    kinds = _numbers(metadata, "token_type", len(tokens))
    kinds = np.full(len(tokens), NORMAL) if kinds is None else kinds
    while tokens and kinds[len(tokens) - 1] == UNUSED and tokens[-1] == f"[PAD{len(tokens) - 1}]":
        tokens = tokens[:-1]
    if len(set(tokens)) != len(tokens):
        raise ValueError(
            f"gguf.load: tokens must differ, got {len(tokens) - len(set(tokens))} that stand twice"
        )
    return tokens, kinds[: len(tokens)]


def _numbers(metadata: Metadata, name: str, size: int) -> np.ndarray | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is not None and (not isinstance(value, np.ndarray) or len(value) != size):
        raise ValueError(f"gguf.load: tokenizer.ggml.{name} must be {size} numbers, got {excerpt(value)}")
    return value


def _merges(metadata: Metadata) -> list[tuple[str, str]] | None:
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None:
        return None
    pairs = [tuple(merge.split(" ")) for merge in merges] if isinstance(merges, list) else [()]
    wrong = next((i for i, pair in enumerate(pairs) if len(pair) != 2), None)
    if wrong is not None:
        told = excerpt(merges[wrong] if isinstance(merges, list) else merges)
        raise ValueError(f"gguf.load: tokenizer.ggml.merges must be two tokens and a space each, got {told}")
    return pairs  # type: ignore[return-value]


def _byte_level(metadata: Metadata, tokens: list[str], cut: str):
    """Byte-level BPE, as GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    merges = _merges(metadata)
    if merges is None:
        raise ValueError("gguf.load: a tokenizer of gpt2 must have tokenizer.ggml.merges, got none")
    vocab = {token: i for i, token in enumerate(tokens)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cut == "llama-bpe"))
    inner.pre_tokenizer = pre_tokenizer(cut)
    inner.normalizer = normalizers.NFC() if cut == "qwen2" else None
    inner.decoder = decoders.ByteLevel()
    return inner


def pre_tokenizer(cut: str):
    """What cuts text in one of the ways of `CUTS`."""
    from tokenizers import Regex, pre_tokenizers

    made: list[Any] = []
    for how in CUTS[cut]:
        if how == "ByteLevel":
            made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
        elif how == "Digits":
            made.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            made.append(pre_tokenizers.Split(Regex(how), behavior="isolated"))
            made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(made)


def _sentence_piece(metadata: Metadata, tokens: list[str], kinds: np.ndarray):
    """SentencePiece's BPE: the pair whose token scores highest is joined; bytes for what has no token."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges(metadata)
    if merges is None:
        scores = _numbers(metadata, "scores", len(metadata["tokenizer.ggml.tokens"]))
        if scores is None:
            raise ValueError("gguf.load: a tokenizer of llama must have tokenizer.ggml.scores, got none")
        ranked = [
            (-float(scores[i]), i, len(token) - cut, token[:cut], token[cut:])
            for i, token in enumerate(tokens)
            if kinds[i] == NORMAL
            for cut in range(1, len(token))
            if token[:cut] in vocab and token[cut:] in vocab
        ]
        merges = [(left, right) for *_, left, right in sorted(ranked)]
    unknown = next((tokens[i] for i in np.flatnonzero(kinds == UNKNOWN)), None)
    inner = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = _given(metadata, "add_space_prefix", null_or(FLAG)) is not False
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE)] * prefix + [normalizers.Replace(" ", SPACE)]
    )
    strip = [decoders.Strip(content=" ", left=1)] * prefix
    inner.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return inner


def _finished(metadata: Metadata, inner, tokens: list[str], kinds: np.ndarray, *, default_begin: bool):
    """The tokenizer with what special tokens there are, and which of them each text gets."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    ids = {name: _given(metadata, key, null_or(COUNT)) for name, key in SPECIAL.items()}
    for name, i in ids.items():
        if i is not None and i >= len(tokens):
            raise ValueError(f"gguf.load: {SPECIAL[name]} must be below {len(tokens)}, got {i}")
    special = {i for i in ids.values() if i is not None} | set(np.flatnonzero(kinds == CONTROL).tolist())
    special |= set(np.flatnonzero(kinds == UNKNOWN).tolist())
    inner.add_special_tokens([AddedToken(tokens[i], normalized=False, special=True) for i in sorted(special)])
    inner.add_tokens([AddedToken(tokens[i], normalized=False) for i in np.flatnonzero(kinds == USER_DEFINED)])
    begin, end = (_given(metadata, f"add_{name}_token", null_or(FLAG)) for name in ("bos", "eos"))
    begin = default_begin if begin is None else begin
    around = [tokens[ids["bos"]]] if begin and ids["bos"] is not None else []
    after = [tokens[ids["eos"]]] if end and ids["eos"] is not None else []
    if around or after:
        one, two = [*around, "$A", *after], [*around, "$B:1", *after]
        inner.post_processor = processors.TemplateProcessing(
            single=one, pair=[*one, *two], special_tokens=[(t, tokens.index(t)) for t in {*around, *after}]
        )
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"gguf.load: tokenizer.chat_template must be text, got {excerpt(template)}")
    named = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **named)
    made.chat_template = template
    return made


def tokenizer_metadata(tokenizer, config: Any) -> Metadata:
    """The keys of a tokenizer and of the tokens that end a text; ValueError for one that has no name."""
    ends = config.stop_tokens
    if len(ends) > len(ENDS):
        raise ValueError(f"gguf.save: a file names {len(ENDS)} tokens that end a text at most, got {ends}")
    found: Metadata = {f"tokenizer.ggml.{name}": end for name, end in zip(ENDS, ends, strict=False)}
    if tokenizer is None:
        return found | {"tokenizer.ggml.model": "none"}
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    found |= _model_metadata(whole)
    vocab = tokenizer.get_vocab()
    if max(vocab.values()) >= config.vocab:
        raise ValueError(
            f"gguf.save: tokens must be below the model's {config.vocab}, got {max(vocab.values())}"
        )
    of_space = SPACE if found["tokenizer.ggml.model"] == "llama" else " "  # byte-level tokens have none
    model = whole["model"]
    tokens = [f"[PAD{i}]" for i in range(config.vocab)]
    kinds = [UNUSED] * config.vocab
    added = {one["id"]: CONTROL if one["special"] else USER_DEFINED for one in whole["added_tokens"]}
    for token, i in vocab.items():
        is_byte = model["byte_fallback"] and len(token) == 6 and token.startswith("<0x")
        kinds[i] = added.get(i, BYTE if is_byte else NORMAL)
        tokens[i] = token if i in added else token.replace(" ", of_space)
    if model["unk_token"] is not None:
        kinds[vocab[model["unk_token"]]] = UNKNOWN
    found |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merges = [tuple(part.replace(" ", of_space) for part in pair) for pair in pairs]
    if merges:
        found["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges]
    if found["tokenizer.ggml.model"] == "llama":
        found["tokenizer.ggml.scores"] = _scores(tokens, merges)
    for name, key in SPECIAL.items():
        i = getattr(tokenizer, f"{name}_token_id")
        if i is not None:
            found.setdefault(f"tokenizer.ggml.{key}", i)
    ids = tokenizer("a")["input_ids"]
    found["tokenizer.ggml.add_bos_token"] = ids[0] == tokenizer.bos_token_id
    found["tokenizer.ggml.add_eos_token"] = ids[-1] == tokenizer.eos_token_id
    if isinstance(tokenizer.chat_template, str):
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """A score for each token by which SentencePiece's way joins what the merges do, in their order."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault("".join(merge), i)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _model_metadata(whole: dict[str, Any]) -> Metadata:
    """Which of llama.cpp's kinds a tokenizer is."""
    model, steps = whole["model"], _steps(whole["pre_tokenizer"])
    normal = _parts(whole["normalizer"], "normalizers")
    if model["type"] == "BPE" and model["byte_fallback"] and (prefix := _prefix(normal, steps)) is not None:
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.add_space_prefix": prefix,
        }
    if model["type"] == "BPE" and not model["byte_fallback"] and normal in ([], [{"type": "NFC"}]):
        for name in CUTS:
            if steps == _steps(json.loads(pre_tokenizer(name).__getstate__())):
                return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}
    told = {name: whole[name] for name in ("normalizer", "pre_tokenizer")}
    raise ValueError(
        f"gguf.save: the tokenizer must be SentencePiece's BPE, or byte-level BPE that cuts text as one of "
        f"{', '.join(CUTS)}, got {model['type']} with {json.dumps(told)[:200]}"
    )


def _prefix(normal: list[dict[str, Any]], steps: list[dict[str, Any]]) -> bool | None:
    """Whether a SentencePiece tokenizer puts a space before a text; None for what is none.

    Four spellings: Llama's first and present one, Gemma's (whose splitting at spaces finds none left), and
    llama2.c's, whose tokens have spaces as they are.
    """
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    at_spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    if steps in ([], [at_spaces]) and normal in (
        [replaced],
        [{"type": "Prepend", "prepend": SPACE}, replaced],
    ):
        return len(normal) == 2
    if not steps and normal == [{"type": "Prepend", "prepend": " "}]:
        return True
    metaspace = {"type": "Metaspace", "replacement": SPACE, "split": False}
    for how in ("first", "always", "never"):
        if not normal and steps == [metaspace | {"prepend_scheme": how}]:
            return how != "never"
    return None


def _parts(one: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a part of tokenizer.json, one or a sequence."""
    return [] if one is None else one[name] if one["type"] == "Sequence" else [one]


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of cutting, without what changes no token."""
    idle = {"trim_offsets": True, "invert": False}
    return [
        {key: value for key, value in step.items() if key not in idle}
        for step in _parts(pre_tokenizer, "pretokenizers")
    ]
