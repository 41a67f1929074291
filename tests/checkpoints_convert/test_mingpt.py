"""minGPT's gpt-nano, which sorts six digits: its own intermediate values, and what it sorts."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert import mingpt


@pytest.fixture(scope="module")
def model(shared_data):
    model, tokenizer = mingpt.load(shared_data / "models/gpt_nano_sort/gpt-nano-sort-model.json")
    assert tokenizer is None
    return model


@pytest.fixture(scope="module")
def golden(shared_data):
    saved = json.loads((shared_data / "models/gpt_nano_sort/gpt-nano-sort-t0-partials.json").read_text())
    return {name: mingpt.tensor(entry) for name, entry in saved.items() if "shape" in entry}


def test_gpt_nano_reproduces_its_golden_activations(model, golden):
    @jax.jit
    def forward(model, tokens):
        seen = {}

        def tap(name, x):
            seen[name] = x
            return x

        return model(tokens, tap=tap)[0], seen

    logits, seen = forward(model, jnp.asarray(golden["idx"], jnp.int32))
    heads = golden["q"].transpose(0, 2, 1, 3)
    expected = {
        "embedding": golden["x"],
        "layers.0.attention.q.in": golden["ln1"],
        "layers.0.attention.queries": heads,
        "layers.0.attention.o.in": golden["y"],
        "layers.0.attention.o.out": golden["yProj"],
        "layers.0.mlp.up.in": golden["ln2"],
        "layers.0.mlp.down.in": golden["gelu"],
        "layers.0.mlp.down.out": golden["mlp"],
        "layers.0.out": golden["block0"],
        "layers.1.out": golden["block1"],
        "layers.2.out": golden["block2"],
        "norm": golden["ln_f"],
    }
    for name, value in expected.items():
        np.testing.assert_allclose(seen[name], value, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(logits, golden["lm_head"], atol=1e-4)


def test_gpt_nano_sorts_six_digits_fed_back_one_at_a_time(model):
    digits = np.array(list(itertools.product(range(3), repeat=6)))[::7]  # 105 of the 729 lists
    rows = np.concatenate([digits, np.zeros((len(digits), 5), int)], axis=1)
    forward = jax.jit(lambda m, rows: jnp.argmax(m(rows)[0], axis=-1))
    for i in range(5, 11):
        chosen = np.asarray(forward(model, jnp.asarray(rows, jnp.int32)))[:, i]
        np.testing.assert_array_equal(chosen, np.sort(digits, axis=1)[:, i - 5])
        if i < 10:
            rows[:, i + 1] = chosen


SIZES = {"n_layer": 1, "n_head": 1, "n_embd": 4, "vocab_size": 3, "block_size": 5}
TENSOR = {"shape": [1], "dtype": "torch.float32", "data": "AAAAAA=="}


@pytest.mark.parametrize(
    "saved",
    [
        [],
        {"config": {"n_layer": 1}},
        {"config": SIZES | {"n_layer": 10**18}, "a": TENSOR},
        {"config": SIZES | {"n_embd": 4.0}, "a": TENSOR},
        {"config": SIZES | {"n_head": 0}, "a": TENSOR},
        {"config": SIZES, "a": TENSOR | {"shape": [-1]}},
        {"config": SIZES, "a": TENSOR | {"shape": [2]}},
        {"config": SIZES, "a": TENSOR | {"dtype": "torch.int32"}},
        {"config": SIZES, "a": TENSOR | {"data": "AAAA!AA=="}},
        {"config": SIZES, "a": None},
    ],
    ids=str,
)
def test_a_file_that_is_not_mingpt_is_one_line(tmp_path, saved):
    (tmp_path / "x.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="must be minGPT's config and tensors in JSON, got x.json") as caught:
        mingpt.load(tmp_path / "x.json")
    assert "\n" not in str(caught.value)
