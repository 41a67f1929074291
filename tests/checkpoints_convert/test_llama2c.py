"""llama2.c's files: the golden values of stories260K, its tokenizer, and files that are broken."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert import llama2c
from checkpoints_convert.llama2c_tokenizer import load_tokenizer, read_entries
from jaxllm.decoding.generate import generate


@pytest.fixture(scope="module")
def stories(shared_data):
    return shared_data / "models/stories260K"


@pytest.fixture(scope="module")
def golden(stories):
    return json.loads((stories / "golden.json").read_text())


@pytest.fixture(scope="module")
def loaded(stories):
    return llama2c.load(stories / "stories260K.bin")


@jax.jit
def forward(model, tokens):
    return model(tokens)[0]


def test_stories260k_gives_the_golden_logits_and_every_greedy_choice(loaded, golden):
    model, _ = loaded
    ids = np.array(golden["greedy_ids"])
    logits = np.asarray(forward(model, jnp.asarray(ids[None], jnp.int32)))[0]
    want = np.array(golden["logits_positions_0_15_first8"])
    np.testing.assert_allclose(logits[:16, :8], want, atol=2e-5)
    assert logits[:16].argmax(-1).tolist() == golden["argmax_0_15"]
    assert logits[4:-1].argmax(-1).tolist() == ids[5:].tolist()


def test_generate_reproduces_the_256_golden_ids_and_their_text(loaded, golden):
    model, tokenizer = loaded
    (out,) = generate(model, tokenizer, [golden["prompt"]], max_new_tokens=251)
    assert out.prompt_ids + out.token_ids == golden["greedy_ids"]
    assert tokenizer.decode(golden["greedy_ids"], skip_special_tokens=True) == golden["text"]
    assert golden["prompt"] + out.text == golden["text"]


def test_the_int8_file_agrees_with_249_of_251_golden_choices(stories, golden):
    model, tokenizer = llama2c.load(stories / "stories260K-q8.bin")
    ids = np.array(golden["greedy_ids"])
    logits = np.asarray(forward(model, jnp.asarray(ids[None], jnp.int32)))[0]
    assert (logits[4:-1].argmax(-1) == ids[5:]).sum() == 249
    assert tokenizer.encode(golden["prompt"]) == golden["prompt_ids"]


@pytest.mark.parametrize(("leaf", "largest"), [("q", 0.0070), ("k", 0.0044), ("v", 0.0017), ("o", 0.0024)])
def test_int8_weights_differ_from_float_ones_by_no_more_than_stated(stories, loaded, leaf, largest):
    eight, _ = llama2c.load(stories / "stories260K-q8.bin")

    def weights(model):
        return np.stack(
            [np.asarray(getattr(layer.attention, leaf).w.get_value().rows) for layer in model.layers]
        )

    assert round(float(np.abs(weights(eight) - weights(loaded[0])).max()), 4) == largest


def by_the_book(entries, text: str) -> list[int]:
    """llama2.c's encoding, word for word: the best-scoring pair first, the leftmost of equals."""
    table = {}
    for i, (_, word) in enumerate(entries):
        table.setdefault(word, i)
    ids = [1] + [table[b" "]] * bool(text)
    for character in text:
        word = character.encode()
        ids += [table[word]] if word in table else [byte + 3 for byte in word]
    while True:
        pairs = [
            (-entries[joined][0], i, joined)
            for i in range(len(ids) - 1)
            if (joined := table.get(entries[ids[i]][1] + entries[ids[i + 1]][1])) is not None
        ]
        if not pairs:
            return ids
        _, i, joined = min(pairs)
        ids[i : i + 2] = [joined]


def hard_texts() -> list[str]:
    rng = np.random.default_rng(0)
    texts = [
        "",
        "a",
        " ",
        "  ",
        " a\n\n",
        "<s>",
        "</s> <unk>",
        "<0x0A>",
        "Lily’s — “ball” é 😀 \u2028\0",
    ]
    texts += [character * n for character in " a-=.0\n" for n in (2, 3, 5, 7, 16, 33)]
    pieces = [" ", "  ", "a", "b", "aa", "he", "\n", "==", "the ", "Once upon", "é", "x"]
    return texts + ["".join(rng.choice(pieces, 30)) for _ in range(150)]


@pytest.mark.parametrize(
    ("file", "vocab"),
    [
        ("stories260K/tok512.bin", 512),
        pytest.param("llama2_tokenizer/tokenizer.bin", 32_000, marks=pytest.mark.slow),
    ],
)
def test_tokenizer_encodes_by_the_book_and_decodes_back(shared_data, file, vocab):
    path = shared_data / "models" / file
    tokenizer, entries = load_tokenizer(path, vocab), read_entries(path, vocab)
    assert len(tokenizer) == tokenizer.vocab_size == vocab
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    for text in hard_texts():
        ids = tokenizer.encode(text)
        assert ids == by_the_book(entries, text), text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_is_the_same_after_saving_it_as_a_hugging_face_one(stories, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(stories / "tok512.bin", 512)
    tokenizer.save_pretrained(str(tmp_path))
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in hard_texts():
        assert again.encode(text) == tokenizer.encode(text)


def write_tiny(path, *, V=12, tied=True, extra=b""):
    """A float file with the layout spelled out: d 8, h 12, L 2, H 2, K 1, S 5."""
    d, h, L, H, K, S = 8, 12, 2, 2, 1, 5
    k = K * d // H
    shapes = {
        "embedding": (V, d),
        "attention_norm": (L, d),
        "wq": (L, d, d),
        "wk": (L, k, d),
        "wv": (L, k, d),
        "wo": (L, d, d),
        "ffn_norm": (L, d),
        "w1": (L, h, d),
        "w2": (L, d, h),
        "w3": (L, h, d),
        "norm": (d,),
        "tables": (S, d // H),
    } | ({} if tied else {"head": (V, d)})
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(s).astype("<f4") for name, s in shapes.items()}
    header = struct.pack("<7i", d, h, L, H, K, V if tied else -V, S)
    path.write_bytes(header + b"".join(t.tobytes() for t in tensors.values()) + extra)
    return tensors


def test_every_tensor_lands_where_it_belongs_and_q_k_rows_are_permuted(tmp_path):
    tensors = write_tiny(tmp_path / "m.bin", tied=False)
    model, tokenizer = llama2c.load(tmp_path / "m.bin")
    assert tokenizer is None
    layer = model.layers[1]

    def row(linear):
        return np.asarray(linear.w.get_value().rows)

    halves = [0, 2, 1, 3]  # of a head of size 4: neighbours (0, 1), (2, 3) become (0, 2), (1, 3)
    np.testing.assert_array_equal(row(layer.attention.k), tensors["wk"][1][halves])
    np.testing.assert_array_equal(row(layer.attention.q), tensors["wq"][1][halves + [4 + i for i in halves]])
    pairs = [
        (row(layer.attention.v), "wv"),
        (row(layer.attention.o), "wo"),
        (row(layer.mlp.gate), "w1"),
        (row(layer.mlp.down), "w2"),
        (row(layer.mlp.up), "w3"),
        (np.asarray(layer.attention_norm.scale.get_value()), "attention_norm"),
        (np.asarray(layer.mlp_norm.scale.get_value()), "ffn_norm"),
    ]
    for ours, name in pairs:
        np.testing.assert_array_equal(ours, tensors[name][1])
    np.testing.assert_array_equal(row(model.head), tensors["head"])
    np.testing.assert_array_equal(model.norm.scale.get_value(), tensors["norm"])


def test_a_cast_and_a_tied_head(tmp_path):
    tensors = write_tiny(tmp_path / "m.bin")
    model, _ = llama2c.load(tmp_path / "m.bin", dtype=jnp.bfloat16)
    assert model.head is None and model.dtype == jnp.bfloat16
    want = jnp.asarray(tensors["embedding"]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(model.embedding.table.get_value().rows, want)


def test_a_file_of_another_length_than_its_header_says_is_refused(tmp_path):
    path = tmp_path / "m.bin"
    write_tiny(path, extra=b"\0\0\0\0")
    with pytest.raises(ValueError, match=r"m.bin must have \d+ bytes by its header, got \d+"):
        llama2c.load(path)
    write_tiny(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="by its header"):
        llama2c.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends inside its header"),
        (b"\0" * 10, "ends inside its header"),
        (b"PK\x03\x04" * 100, "has no llama2.c header"),
        (struct.pack("<Ii", llama2c.MAGIC, 3) + b"\0" * 300, "must be of version 2, got version=3"),
        (struct.pack("<Ii", llama2c.MAGIC, 2) + b"\0" * 20, "ends inside its header"),
        (struct.pack("<Ii", llama2c.MAGIC, 2) + b"\0" * 300, "group size must be positive"),
    ],
)
def test_a_file_of_something_else_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "m.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        llama2c.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        llama2c.load(tmp_path / "m.bin")


def test_a_tokenizer_of_another_size_than_the_model_is_refused(stories):
    with pytest.raises(ValueError, match="must hold 500 entries and no more"):
        load_tokenizer(stories / "tok512.bin", 500)


@pytest.mark.parametrize(
    "place", [pytest.param(2, marks=pytest.mark.slow), 8 + 8]
)  # of the layers in a float header, and in an int8 one
def test_sizes_beyond_the_file_are_refused_before_anything_is_built(tmp_path, stories, place):
    name = "stories260K.bin" if place == 2 else "stories260K-q8.bin"
    data = bytearray((stories / name).read_bytes())
    struct.pack_into("<i", data, 4 * place if place == 2 else place, (1 << 24) - 1)
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"x.bin must have \d+ bytes or more by its header, got"):
        llama2c.load(tmp_path / "x.bin")
