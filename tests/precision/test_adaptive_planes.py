"""A weight of which each token reads as many bits as its input asks for."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.decoder import Decoder
from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.precision import bits_read, set_target
from jaxllm.weights.matmul import matmul
from jaxllm.weights.planes.adaptive_planes import always, every_token_chooses
from tests.precision.conftest import nested

K, N = 40, 24


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def planes():
    return nested(normal(0, N, K))


def adaptive(planes, low=(3, 4), threshold=(6.0, 6.0), **more):
    """Tokens above a length of 6 read the bit more."""
    return dataclasses.replace(
        always(planes, (3.5, 4.5)), low=jnp.array(low), threshold=jnp.array(threshold, jnp.float32), **more
    )


@jax.jit
def product(x, w):
    return matmul(x, w)


def alike(y, want):
    """Equal but for last bits, in which another program of the same may differ."""
    np.testing.assert_allclose(y, want, rtol=2e-5, atol=2e-6)


def test_no_token_above_the_threshold_is_the_lower_width_bit_for_bit_and_all_are_the_upper(planes):
    x = normal(1, 9, K)
    for threshold, b in ((jnp.inf, 3), (-jnp.inf, 4)):
        w = adaptive(planes, threshold=(threshold, 0.0))
        alike(product(x, w), product(x, planes.at(b)))
        alike(product(x[:1], w), product(x[:1], planes.at(b)))
        with jax.disable_jit():
            np.testing.assert_array_equal(matmul(x, w), matmul(x, planes.at(b)))


def test_rows_that_differ_read_a_width_each(planes):
    x = normal(2, 3, 4, K)
    w = dataclasses.replace(adaptive(planes), tokens="all")
    high = np.linalg.norm(x, axis=-1) > 6
    assert 0 < high.sum() < 12
    want = np.where(high[..., None], product(x, planes.at(4)), product(x, planes.at(3)))
    np.testing.assert_allclose(product(x, w), want, atol=1e-5)
    alone = jnp.stack([jnp.stack([product(row[None], w)[0] for row in rows]) for rows in x])
    np.testing.assert_allclose(alone, want, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(partial(product, w=w))(x), want, atol=1e-5)


def test_another_target_is_the_same_program(planes):
    x, w = normal(3, 2, K), adaptive(planes, low=(3, 5), threshold=(jnp.inf, -jnp.inf))
    before = product._cache_size()
    first = product(x, w)
    assert product._cache_size() == before + 1
    second = product(x, dataclasses.replace(w, target=jnp.int32(1)))
    assert product._cache_size() == before + 1
    alike(first, product(x, planes.at(3)))
    alike(second, product(x, planes.at(6)))


def test_a_text_being_read_takes_all_planes_and_a_token_chooses(planes):
    w = adaptive(planes, threshold=(jnp.inf, 0.0))
    text, token = normal(4, 2, 6, K), normal(4, 2, 1, K)
    alike(product(text, w), product(text, planes))
    alike(product(token, w), product(token, planes.at(3)))
    alike(product(text, every_token_chooses(w)), product(text, planes.at(3)))


def test_zero_rows_and_rows_that_are_no_numbers_read_the_lower_width(planes):
    w = adaptive(planes, threshold=(0.0, 0.0))
    x = jnp.stack([jnp.zeros(K), jnp.full(K, jnp.nan), jnp.ones(K)])
    np.testing.assert_array_equal(w.is_high(x), [False, False, True])
    below = dataclasses.replace(w, threshold=jnp.array([-1.0, 0.0]))
    np.testing.assert_array_equal(below.is_high(x), [True, False, True])


def test_the_exact_estimate_is_the_length_of_what_the_bit_changes(planes):
    x = normal(5, 6, K)
    w = adaptive(planes, estimator="exact")
    step = planes.at(4).dequantize_rows() - planes.at(3).dequantize_rows()
    np.testing.assert_allclose(w.estimate(x, jnp.int32(0)), np.linalg.norm(x @ step.T, axis=1), rtol=1e-4)


def test_thresholding_exact_errors_is_the_best_choice_of_so_many_tokens(planes):
    """Of all choices that give the bit more to as many tokens, against brute force."""
    import itertools

    x = normal(6, 9, K)
    w = adaptive(planes, estimator="exact")
    e = np.asarray(w.estimate(x, jnp.int32(0)), np.float64)
    for count in range(10):
        threshold = np.inf if count == 0 else np.sort(e)[::-1][count] if count < 9 else -np.inf
        high = np.asarray(dataclasses.replace(w, threshold=jnp.array([threshold, 0], jnp.float32)).is_high(x))
        assert high.sum() == count
        best = min((e[list(low)] ** 2).sum() for low in itertools.combinations(range(9), 9 - count))
        np.testing.assert_allclose((e[~high] ** 2).sum(), best, rtol=1e-6)


def test_a_higher_threshold_never_reads_more(planes):
    x = normal(7, 50, K)
    counts = [
        int(adaptive(planes, threshold=(t, 0.0)).is_high(x).sum()) for t in np.linspace(4, 9, 11).tolist()
    ]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]


def test_the_program_reads_the_planes_of_the_chosen_width_alone(planes):
    """Planes that are not to be read are filled with garbage."""
    x = normal(8, 1, K)
    spoilt = dataclasses.replace(planes, planes=planes.planes.at[3:].set(jnp.uint32(0xFFFFFFFF)))
    w = adaptive(spoilt, threshold=(jnp.inf, 0.0))
    alike(product(x, w), product(x, planes.at(3)))


# In a whole model


def choosing(model: Decoder, threshold: float = 5.0, **more) -> Decoder:
    """All linears between 3 and 4 bits, or 4 and 5 at the second target."""
    weights = {name: w for name, w in linear_weights(model).items() if "." in name}
    new = {name: adaptive(w, threshold=(threshold, threshold), **more) for name, w in weights.items()}
    return replace_weights(model, new)


@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_text_read_at_once_chooses_as_its_tokens_do_one_by_one(planes_model, text, batch):
    model, tokens = choosing(planes_model), jnp.asarray(text[:batch, :6])
    whole, _ = jax.jit(every_token_chooses(model).__call__)(tokens)
    step = jax.jit(lambda model, token, cache: model(token, cache))
    cache, alone = model.make_cache(batch, 6), []
    for t in range(6):
        logits, cache = step(model, tokens[:, t : t + 1], cache)
        alone.append(logits[:, 0])
    np.testing.assert_allclose(whole, jnp.stack(alone, axis=1), atol=2e-4)
    read = bits_read(model, np.asarray(tokens[0]), context=6)
    assert 3 < read.mean < 4  # or nothing was chosen


@pytest.mark.slow
def test_a_step_that_reads_all_bits_is_the_prefill_of_that_token(planes_model, text):
    model = choosing(planes_model, threshold=-np.inf, low=(5, 5))
    tokens = jnp.asarray(text[:2, :5])
    whole, _ = model(tokens)
    logits, cache = model(tokens[:, :4], model.make_cache(2, 5))
    np.testing.assert_array_equal(logits, planes_model(tokens[:, :4], planes_model.make_cache(2, 5))[0])
    last, _ = model(tokens[:, 4:], cache)
    np.testing.assert_allclose(last[:, 0], whole[:, 4], atol=1e-4)


def test_early_estimates_look_at_the_stream_one_addition_before(planes_model, text):
    """By the table of DP-LLM's section 2.7: norms of this block, of what the stream was."""
    model, seen, stream = choosing(planes_model, early=True), {}, {}

    def tap(path, x):
        if path.endswith(".seen"):
            seen[path.removesuffix(".seen")] = x
        if path.endswith((".middle", ".out")) or path == "embedding":
            stream[path] = x
        if path.endswith(".in"):
            stream[path] = x
        return x

    every_token_chooses(model)(jnp.asarray(text[:2, :6]), tap=tap)
    one = model.layers[1]
    for name in ("q", "k", "v"):
        want = one.attention_norm(stream["layers.0.middle"])
        np.testing.assert_array_equal(seen[f"layers.1.attention.{name}"], want)
        np.testing.assert_array_equal(
            seen[f"layers.0.attention.{name}"], stream[f"layers.0.attention.{name}.in"]
        )
    for i, before in ((0, "embedding"), (1, "layers.0.out")):
        for name in ("gate", "up"):
            want = model.layers[i].mlp_norm(stream[before])
            np.testing.assert_array_equal(seen[f"layers.{i}.mlp.{name}"], want)
        for name in ("attention.o", "mlp.down"):
            np.testing.assert_array_equal(seen[f"layers.{i}.{name}"], stream[f"layers.{i}.{name}.in"])


def test_with_parts_that_add_nothing_early_estimates_are_the_others(planes_model, text):
    still = {
        name: nested(0 * normal(0, *w.shape[::-1]) + 1e-30 * normal(1, *w.shape[::-1]))
        for name, w in linear_weights(planes_model).items()
        if name.endswith((".o", ".down"))
    }
    model = replace_weights(planes_model, still)
    read = [bits_read(choosing(model, early=early), text[0], context=24) for early in (False, True)]
    np.testing.assert_array_equal(read[0].by_token, read[1].by_token)


def test_bits_that_are_read_count_by_the_size_of_their_linears(planes_model, text):
    model = choosing(planes_model)
    read = bits_read(model, text.ravel(), context=24, batch=4)
    sizes = {name: np.prod(w.shape) for name, w in linear_weights(model).items() if "." in name}
    mean = sum(read.by_linear[name] * n for name, n in sizes.items()) / sum(sizes.values())
    np.testing.assert_allclose(read.mean, mean, rtol=1e-5)
    assert read.by_token.shape == (8, 24) and read.by_window.shape == (8,)
    np.testing.assert_allclose(read.by_window.mean(), read.mean, rtol=1e-5)
    second = bits_read(set_target(model, 4.5), text.ravel(), context=24, batch=4)
    np.testing.assert_allclose(second.mean, read.mean + 1, atol=0.3)
