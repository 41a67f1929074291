"""DP-LLM whole: what is read on calibration text is the target; files, meshes, generation; bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxllm as jl
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.models.gpt import TINY as GPT_TINY
from jaxllm.models.gpt import Gpt
from jaxllm.models.linears import linear_weights
from jaxllm.precision import (
    DpLlm,
    StaticWidths,
    attach_precision,
    bits_read,
    set_target,
    targets_of,
)
from jaxllm.precision.dp_llm import quantile_above
from jaxllm.weights.planes.adaptive_planes import AdaptivePlanes, ChosenPlanes
from jaxllm.weights.planes.bit_planes import BitPlanes
from tests.precision.conftest import with_planes, with_scales

TARGETS = (3.5, 4.25)


def attach(model, text, **more):
    method = DpLlm(**{"targets": TARGETS, "memory_bits": 5.0, "steps": 2} | more)
    return attach_precision(model, method, text, progress=False)


@pytest.fixture(scope="module")
def chosen(planes_model, text):
    """By projections, on half of the text."""
    return attach(planes_model, text[:4], estimator="projection", projection_rows=16)


def read_on(model, rows):
    """The bits of each target on some rows."""
    found = [bits_read(set_target(model, t), rows.ravel(), context=rows.shape[1]) for t in targets_of(model)]
    return [one.mean for one in found]


def test_the_bits_read_on_calibration_text_are_the_target(chosen, text):
    np.testing.assert_allclose(read_on(chosen, text[:4]), TARGETS, atol=0.5 / text[:4].size)


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "linear", "asynchronous": True},
        pytest.param({"estimator": "linear"}, marks=pytest.mark.slow),
        pytest.param({"estimator": "projection", "asynchronous": True}, marks=pytest.mark.slow),
        pytest.param({"estimator": "exact"}, marks=pytest.mark.slow),
        pytest.param({"estimator": "random"}, marks=pytest.mark.slow),
        pytest.param({}, marks=pytest.mark.slow),
    ],
)
def test_they_are_by_every_estimator(planes_model, text, options):
    model = attach(planes_model, text[:4], steps=0, **options)
    # to the nearest token in each linear; what is random depends on last bits, so it is so on average
    close = 0.02 if options.get("estimator") == "random" else 0.5 / text[:4].size
    np.testing.assert_allclose(read_on(model, text[:4]), TARGETS, atol=close)


def test_planes_that_memory_does_not_allow_are_not_there(chosen, planes_model):
    sizes = {name: np.prod(w.shape) for name, w in linear_weights(planes_model).items() if "." in name}
    held = {name: w for name, w in linear_weights(chosen).items() if name in sizes}
    bits = {n: (w.held if isinstance(w, AdaptivePlanes) else w).planes.shape[0] for n, w in held.items()}
    assert sum(bits[name] * n for name, n in sizes.items()) <= 5.0 * sum(sizes.values())
    assert min(bits.values()) < 6


def test_layers_of_which_the_narrowest_width_is_held_stay_at_it(planes_model, text):
    """The released code fails on them."""
    model = attach(planes_model, text[:4], memory_bits=3.4, targets=(3.2,), estimator="linear", steps=1)
    kinds = [type(w) for name, w in linear_weights(model).items() if "." in name]
    assert BitPlanes in kinds and AdaptivePlanes in kinds
    np.testing.assert_allclose(read_on(model, text[:4]), [3.2], atol=0.02)


@pytest.mark.slow
def test_whole_targets_are_the_width_that_is_stored_bit_for_bit(planes_model, text):
    model = attach(planes_model, text[:4], memory_bits=6.0, targets=(4.0, 6.0), start="target", steps=0)
    tokens = jnp.asarray(text[:2, :1])
    for target in (4.0, 6.0):
        logits, _ = set_target(model, target)(tokens)
        np.testing.assert_array_equal(logits, jl.read_at(planes_model, int(target))(tokens)[0])


def test_static_widths_are_as_many_bits_as_asked_for_at_most(planes_model, text):
    model = attach_precision(planes_model, StaticWidths(targets=TARGETS), text[:4], progress=False)
    for target, bits in zip(TARGETS, read_on(model, text[:4]), strict=True):
        assert target - 0.3 < bits <= target + 1e-5
    spread = bits_read(model, text.ravel(), context=24).by_window
    np.testing.assert_allclose(spread, spread[0], atol=1e-5)


def test_generating_at_other_targets_compiles_nothing_new(chosen):
    from jaxllm.decoding.loop import decode_until

    def run(model):
        return jl.generate(model, None, [[5, 6, 7]], max_new_tokens=6)[0].token_ids

    low = run(set_target(chosen, 3.5))
    before = decode_until._cache_size()
    high = run(set_target(chosen, 4.25))
    assert decode_until._cache_size() == before and len(low) == len(high) == 6


@pytest.mark.slow
def test_tokens_that_were_drafted_choose_as_those_decoded_one_by_one(chosen):
    def run(**more):
        return jl.generate(chosen, None, [[5, 6, 7, 5, 6, 7, 5]], max_new_tokens=12, **more)[0]

    plain, out = run(), run(speculation=jl.Speculation(draft=jl.LookupDraft(), tokens=3))
    assert out.token_ids == plain.token_ids and out.speculation.proposed > 0


def test_perplexity_is_measured_with_the_bits_that_decoding_reads(chosen, planes_model, text):
    ids = text.ravel()
    found = [jl.perplexity(set_target(chosen, t), ids, context=24).nll_per_token for t in TARGETS]
    full = jl.perplexity(planes_model, ids, context=24).nll_per_token
    assert found[0] != found[1] and full not in found


def test_a_cache_that_was_evicted_is_read_by_a_model_that_chooses(chosen, text):
    """Scoring and pruning know nothing of the weights; steps behind them choose."""
    rows = [text[0].tolist()]
    cache = jl.prefill(chosen, rows)
    scores = jl.eviction.snapkv_scores(chosen, rows, prefix=1, window=4)
    small = jl.eviction.evict(cache, scores, ratio=0.5, prefix=1, capacity=8)
    out = jl.generate(chosen, None, [[5]], max_new_tokens=3, cache=small, stop_tokens=())
    assert len(out[0].token_ids) == 3


def test_a_model_that_chooses_comes_back_from_disk(chosen, tmp_path):
    jl.save(set_target(chosen, 4.25), tmp_path / "m")
    back, _ = jl.load(tmp_path / "m")
    assert targets_of(back) == TARGETS
    one = next(w for w in linear_weights(chosen).values() if isinstance(w, AdaptivePlanes))
    assert one.target == 0  # attached at the lowest
    jax.tree.map(np.testing.assert_array_equal, set_target(chosen, 4.25), back)


def test_a_model_that_chooses_can_be_given_away_and_mapped(chosen, text):
    tokens = jnp.asarray(text[:3, :1])
    want = set_target(chosen, TARGETS[1])(tokens)[0]
    given = jax.tree.map(jnp.copy, chosen)
    moved = jax.jit(lambda model: set_target(model, jnp.int32(1)), donate_argnums=0)(given)
    assert all(x.is_deleted() for w in linear_weights(given).values() for x in jax.tree.leaves(w)[:1])
    np.testing.assert_array_equal(moved(tokens)[0], want)
    mapped = jax.vmap(lambda row: moved(row[None])[0][0])(tokens)
    np.testing.assert_allclose(mapped, want, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["projection", "linear"])
def test_on_eight_devices_every_token_chooses_as_on_one(text, estimator):
    config = dataclasses.replace(TINY, width=256, heads=8, kv_heads=8, head_dim=32, ffn=256)
    model = with_planes(with_scales(Decoder(config, rngs=nnx.Rngs(3))))
    model = attach(model, text[:4], estimator=estimator, steps=0)
    one = bits_read(model, text.ravel(), context=24)
    split = jl.shard(model, jl.make_mesh(model=8))
    eight = bits_read(split, text.ravel(), context=24)
    np.testing.assert_array_equal(one.by_token, eight.by_token)
    tokens = jnp.asarray(text[:2, :1])
    np.testing.assert_allclose(split(tokens)[0], model(tokens)[0], atol=2e-4)


def test_the_threshold_is_what_a_part_of_the_estimates_lies_above():
    e = np.random.default_rng(0).permutation(100).astype(np.float32)
    for part in (0.0, 0.013, 0.25, 0.5, 0.999, 1.0):
        assert (e > quantile_above(e, part)).sum() == round(part * 100)
    assert (np.ones(5) > quantile_above(np.ones(5), 0.5)).sum() == 0  # equal ones cannot be told apart
    assert quantile_above(np.array([1.0, np.nan, 2.0]), 1 / 3) == 1.5
    assert quantile_above(np.array([1.0, np.nan, 2.0]), 2 / 3) == -np.inf  # what is no number is never above


def test_a_gpt_chooses_too_but_not_early(text):
    model = with_planes(Gpt(GPT_TINY, rngs=nnx.Rngs(2)))
    rows = text[:4, :12] % GPT_TINY.vocab
    found = attach(model, rows, estimator="linear", steps=0, targets=(3.5,))
    np.testing.assert_allclose(read_on(found, rows), [3.5], atol=0.03)
    with pytest.raises(
        ValueError, match="^attach_precision: asynchronous must be of a Decoder's blocks, got Gpt$"
    ):
        attach(model, rows, asynchronous=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"targets": (2.5, 4.0)}, r"targets must lie in 3 to 5, what the planes hold, got \(2\.5, 4\.0\)"),
        ({"targets": (5.5,)}, r"targets must lie in 3 to 5, what the planes hold, got \(5\.5,\)"),
        ({"memory_bits": 2.0}, r"memory_bits must be at least 3, got 2\.0"),
    ],
)
def test_what_the_planes_do_not_hold_is_refused_in_one_line(planes_model, text, options, message):
    with pytest.raises(ValueError, match=rf"^attach_precision: {message}$"):
        attach(planes_model, text, **options)


def test_models_that_cannot_choose_are_refused_in_one_line(chosen, planes_model, text):
    dense = Decoder(TINY, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^attach_precision: .* any-precision weights, got Dense$"):
        attach(dense, text)
    with pytest.raises(ValueError, match=r"^attach_precision: .* got one that chooses already$"):
        attach(chosen, text)
    with pytest.raises(ValueError, match=r"^set_target: bits must be one of .* 3\.5, 4\.25, got 3\.7$"):
        set_target(chosen, 3.7)
    with pytest.raises(ValueError, match="^precision: the model must have weights that .*, got none$"):
        set_target(planes_model, 3.5)
    with pytest.raises(ValueError, match=r"^DpLlm: targets must be .* ascending order, got \(4\.0, 3\.5\)$"):
        DpLlm(targets=(4.0, 3.5))
    with pytest.raises(ValueError, match=r"^DpLlm: projection_rows must be at least 1, got 0$"):
        DpLlm(projection_rows=0)


def test_what_has_chosen_is_not_a_format_of_files():
    from jaxllm.weights.matmul import FORMATS

    assert AdaptivePlanes in FORMATS and ChosenPlanes not in FORMATS
