"""Speculative decoding gives what the model gives alone: token for token, or in distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_llama import byte_tokenizer
from transformers import PreTrainedTokenizerFast

import jaxllm as jl
from jaxllm.decoding import loop
from jaxllm.decoding.drafts import entropy, look_up
from jaxllm.decoding.loop import decode_until
from jaxllm.decoding.options import GenerationOptions
from jaxllm.decoding.run import GenerationRun
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.models.t5 import T5
from jaxllm.models.t5 import TINY as T5_TINY
from jaxllm.training.gates import new_gates

CONFIG = dataclasses.replace(TINY, vocab=264, windows=(4, None))  # the window is shorter than a rollback
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [9, 3, 9, 3, 9]]
NEW = [20, 10, 15]
DRAWN = jl.Sampler(temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.2)


def near(model: Decoder, amount: float) -> Decoder:
    """The model with noise in its weights: a draft that is often right."""
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    noisy = [
        x + amount * jnp.std(x) * jax.random.normal(key, x.shape, x.dtype)
        for x, key in zip(leaves, keys, strict=True)
    ]
    return nnx.merge(graph, jax.tree.unflatten(tree, noisy))


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def draft(model) -> Decoder:
    return near(model, 0.25)


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def greedy(model):
    return jl.generate(model, None, PROMPTS, max_new_tokens=NEW, logprobs=True)


@pytest.fixture(scope="module")
def drawn(model):
    return jl.generate(model, None, PROMPTS, max_new_tokens=NEW, sampler=DRAWN, seed=[3, 4, 5])


def ids(outs) -> list[list[int]]:
    return [out.token_ids for out in outs]


def kinds(model, draft):
    """Drafts, by name: whatever proposes, the tokens are the model's."""
    return {
        "noisy": draft,
        "itself": model,
        "another": Decoder(dataclasses.replace(CONFIG, layers=1, windows=()), rngs=nnx.Rngs(9)),
        "layers": jl.first_layers(model, 1),
        "lookup": jl.LookupDraft(),
    }


@pytest.mark.parametrize("kind", ["noisy", "itself", "another", "layers", "lookup"])
def test_greedy_tokens_are_the_models_whatever_drafts(model, draft, greedy, kind):
    asked = jl.Speculation(draft=kinds(model, draft)[kind], tokens=3)
    outs = jl.generate(model, None, PROMPTS, max_new_tokens=NEW, logprobs=True, speculation=asked)
    assert ids(outs) == ids(greedy)
    for out, plain in zip(outs, greedy, strict=True):
        np.testing.assert_allclose(out.logprobs, plain.logprobs, atol=2e-5)
        of = out.speculation
        # Those that stand, and a token a step, but for the last one where the limit comes first.
        assert len(out.token_ids) - of.steps - of.stood in (0, 1)
        assert 0 <= of.stood <= of.proposed <= 3 * of.steps
        if kind == "itself":
            assert of.stood + 3 >= of.proposed  # all but those behind the limit


@pytest.mark.parametrize("kind", ["noisy", "another", "lookup"])
def test_by_shared_noise_drawn_tokens_are_the_models_too(model, draft, drawn, kind):
    asked = jl.Speculation(draft=kinds(model, draft)[kind], tokens=3, verification="noise")
    options = {"max_new_tokens": NEW, "sampler": DRAWN, "seed": [3, 4, 5]}
    outs = jl.generate(model, None, PROMPTS, speculation=asked, **options)
    assert ids(outs) == ids(drawn)
    if kind == "noisy":
        assert sum(out.speculation.stood for out in outs) >= 8


def test_a_request_does_not_depend_on_its_batch(model, draft):
    asked = jl.Speculation(draft=draft, tokens=3)
    options = {"sampler": DRAWN, "speculation": asked}
    batch = jl.generate(model, None, PROMPTS, max_new_tokens=NEW, seed=[3, 4, 5], **options)
    alone = jl.generate(model, None, PROMPTS[1:2], max_new_tokens=10, seed=[4], **options)
    assert alone == batch[1:2]


def counted(model, prompt: list[int], N: int, spec) -> tuple[np.ndarray, np.ndarray]:
    """How often N requests write each text of three tokens, and how often the model's law says."""
    sampler = jl.Sampler(temperature=0.7, top_k=4)
    options = {"max_new_tokens": 3, "stop_tokens": (), "sampler": sampler, "seed": 11}
    outs = jl.generate(model, None, [prompt] * N, speculation=spec, **options)
    forward = jax.jit(lambda tokens: model(tokens)[0])

    def law(text: list[int]) -> np.ndarray:
        tokens = jnp.array([[*text, 0, 0][: len(prompt) + 2]])  # causal: what stands behind does not matter
        logits = np.asarray(forward(tokens)[0, len(text) - 1], np.float64) / 0.7
        logits[np.argsort(logits)[:-4]] = -np.inf
        odds = np.exp(logits - logits.max())
        return odds / odds.sum()

    want: dict[tuple[int, ...], float] = {}
    for a in np.flatnonzero(first := law(prompt)).tolist():
        for b in np.flatnonzero(second := law([*prompt, a])).tolist():
            third = law([*prompt, a, b])
            for c in np.flatnonzero(third).tolist():
                want[a, b, c] = N * first[a] * second[b] * third[c]
    found = dict.fromkeys(want, 0)
    for out in outs:
        found[tuple(out.token_ids)] += 1  # KeyError: a text that the model cannot write
    return np.array(list(found.values())), np.array(list(want.values()))


def statistic(found: np.ndarray, want: np.ndarray) -> float:
    """Chi-square over its degrees of freedom, rare texts together."""
    rare = want < 5
    found = np.append(found[~rare], found[rare].sum())
    want = np.append(want[~rare], want[rare].sum())
    return float(((found - want) ** 2 / np.maximum(want, 1e-9)).sum() / (len(want) - 1))


@pytest.mark.parametrize("verification", ["token", "block"])
def test_drawn_texts_have_the_models_law(monkeypatch, verification):
    model = Decoder(dataclasses.replace(TINY, vocab=16), rngs=nnx.Rngs(0))
    draft = near(model, 0.5)
    small = [5, 6, 7]
    spec = jl.Speculation(draft=draft, tokens=2, verification=verification)
    assert statistic(*counted(model, small, 4096, spec)) < 1.6
    # The test sees what is wrong: where what does not stand is replaced by a draw of the model's own law.
    monkeypatch.setattr(loop, "residual", lambda p, q, token, joint: p)
    wrong = jl.Speculation(draft=draft, tokens=1, verification=verification)  # another program
    assert statistic(*counted(model, small, 4096, wrong)) > 2.5


def test_a_stop_token_inside_of_drafts_ends_a_request(model, draft, greedy):
    stop = greedy[0].token_ids[7]
    first = greedy[0].token_ids.index(stop)
    spec = jl.Speculation(draft=model, tokens=4)
    out = jl.generate(model, None, PROMPTS[:1], max_new_tokens=20, stop_tokens=[stop], speculation=spec)[0]
    assert out.token_ids == greedy[0].token_ids[: first + 1] and out.finish_reason == "stop"


def test_stop_strings_and_streams_are_as_without_drafts(model, draft, tokenizer):
    options = {"max_new_tokens": 40, "sampler": DRAWN}
    plain = jl.generate(model, tokenizer, ["the end"], **options)[0]
    options["stop"] = [plain.text[20:22], "never there"]
    plain = jl.generate(model, tokenizer, ["the end"], **options)[0]
    options["speculation"] = jl.Speculation(draft=draft, tokens=3, verification="noise")
    out = jl.generate(model, tokenizer, ["the end"], **options)[0]
    assert (out.text, out.token_ids, out.finish_reason) == (plain.text, plain.token_ids, "stop")
    streamed = list(jl.stream(model, tokenizer, "the end", logprobs=True, **options))
    assert [t.token_id for t in streamed] == out.token_ids
    assert "".join(t.text for t in streamed) == out.text


def test_caches_hold_after_all_what_a_fresh_reading_of_the_text_gives(model, draft):
    options = GenerationOptions(max_new_tokens=12, speculation=jl.Speculation(draft=draft, tokens=3))
    run = GenerationRun(model, None, PROMPTS[:1], options)
    for _ in range(4):
        run.advance(1)
    written, length = run.state.written, int(run.state.cache.lengths[0])
    text = [*PROMPTS[0], *np.asarray(written.tokens)[0, : int(written.counts[0])].tolist()]
    assert length == len(text) - 1 and int(run.state.draft.lengths[0]) in (length, length - 1)
    for own, cache in ((model, run.state.cache), (draft, run.state.draft)):
        read = int(cache.lengths[0])
        fresh = own(jnp.array([text[:read]]), own.make_cache(1, 64))[1]
        for token in (text[read], 5, 6):  # each of which sees all before
            (kept, cache), (wanted, fresh) = (own(jnp.array([[token]]), c) for c in (cache, fresh))
            np.testing.assert_allclose(kept, wanted, atol=1e-5)


@pytest.mark.parametrize("ngram", [1, 3])
def test_a_look_up_is_what_followed_the_last_longest_match(ngram):
    rng, G = np.random.default_rng(ngram), 5

    def brute(text: list[int]) -> list[int]:
        for size in range(min(ngram, len(text) - 1), 0, -1):
            tail = text[-size:]
            for end in range(len(text) - 1, size - 1, -1):
                if text[end - size : end] == tail:
                    return text[end : end + G]
        return []

    texts = [rng.integers(0, 3, rng.integers(1, 14)).tolist() for _ in range(64)]
    room = np.full((64, 16), 7, np.int32)
    for row, text in zip(room, texts, strict=True):
        row[: len(text)] = text
    tokens, lengths = look_up(jnp.asarray(room), jnp.array([len(t) for t in texts]), ngram, G)
    for row, count, text in zip(np.asarray(tokens), np.asarray(lengths), texts, strict=True):
        assert row[:count].tolist() == brute(text), text


def test_drafting_ends_before_a_token_that_the_draft_doubts(model, greedy):
    uncertain = near(model, 0.25)
    law = jax.nn.log_softmax(uncertain(jnp.array([PROMPTS[0]]))[0][0, -1])
    assert float(entropy(law[None])[0]) == pytest.approx(-float((jnp.exp(law) * law).sum()), rel=1e-5)
    found = {}
    for doubt in (1e-3, 100.0):
        spec = jl.Speculation(draft=uncertain, tokens=3, doubt=doubt)
        outs = jl.generate(model, None, PROMPTS, max_new_tokens=NEW, speculation=spec)
        assert ids(outs) == ids(greedy)
        found[doubt] = sum(out.speculation.proposed for out in outs)
    assert found[1e-3] == 0 < found[100.0]


def test_a_draft_whose_logits_are_no_numbers_costs_tokens_none(model, greedy):
    broken = near(model, float("nan"))
    for asked in ({}, {"sampler": DRAWN, "seed": [3, 4, 5]}):
        spec = jl.Speculation(draft=broken, tokens=3)
        outs = jl.generate(model, None, PROMPTS, max_new_tokens=NEW, speculation=spec, **asked)
        assert all(out.finish_reason == "length" and out.speculation.proposed == 0 for out in outs)
    outs = jl.generate(model, None, PROMPTS, max_new_tokens=NEW, speculation=spec)
    assert ids(outs) == ids(greedy)


def test_caches_of_codes_given_ones_and_evicted_ones_take_drafts(model, draft):
    spec = jl.Speculation(draft=draft, tokens=3)
    coded = {"cache": jl.CacheOptions(bits=8), "max_new_tokens": 16}
    assert ids(jl.generate(model, None, PROMPTS, speculation=spec, **coded)) == ids(
        jl.generate(model, None, PROMPTS, **coded)
    )
    start = jl.prefill(model, [PROMPTS[1]], slack=32)
    scores = jl.eviction.METHODS["random"].score(model, start, [PROMPTS[1]])
    looked = jl.Speculation(draft=jl.LookupDraft(), tokens=3)
    given = [[9, 9, 4, 9, 9], [5]]
    for cache in (start, jl.eviction.evict(start, scores, ratio=0.5)):
        behind = {"cache": cache, "max_new_tokens": 16}
        outs = jl.generate(model, None, given, speculation=looked, **behind)
        assert ids(outs) == ids(jl.generate(model, None, given, **behind))
        assert sum(out.speculation.proposed for out in outs) > 0


def test_other_prompts_and_seeds_are_the_same_program(model, draft):
    spec = jl.Speculation(draft=draft, tokens=3)
    options = {"max_new_tokens": 12, "sampler": DRAWN, "speculation": spec}
    jl.generate(model, None, PROMPTS[:1], seed=1, **options)
    before = decode_until._cache_size()
    jl.generate(model, None, [[4, 4, 2]], seed=2, **options)
    assert decode_until._cache_size() == before


@pytest.mark.slow
def test_weights_of_several_widths_draft_for_themselves(model):
    planes = jl.quantize(
        model,
        jl.AnyPrecision(parent_bits=4, seed_bits=3, restarts=1),
        np.random.default_rng(0).integers(0, 264, (4, 16)),
        progress=False,
    )
    spec = jl.Speculation(draft=jl.read_at(planes, 3), tokens=3)
    plain = jl.generate(planes, None, PROMPTS, max_new_tokens=NEW)
    outs = jl.generate(planes, None, PROMPTS, max_new_tokens=NEW, speculation=spec)
    assert ids(outs) == ids(plain)
    assert sum(out.speculation.stood for out in outs) > 0


@pytest.mark.slow
def test_on_eight_devices_as_on_one():
    config = dataclasses.replace(TINY, width=256, heads=8, kv_heads=8, head_dim=32, ffn=256)
    model = Decoder(config, rngs=nnx.Rngs(3))
    small = near(model, 0.2)
    mesh = jl.make_mesh(model=8)
    plain = jl.generate(model, None, PROMPTS, max_new_tokens=8)
    spec = jl.Speculation(draft=jl.shard(small, mesh), tokens=3)
    outs = jl.generate(jl.shard(model, mesh), None, PROMPTS, max_new_tokens=8, speculation=spec)
    assert ids(outs) == ids(plain)


def refused(model, match: str, spec=None, **options) -> None:
    with pytest.raises(ValueError, match=match):
        jl.generate(
            model, options.pop("tokenizer", None), PROMPTS[:1], max_new_tokens=4, speculation=spec, **options
        )


def test_what_does_not_go_together_is_one_line(model, draft, tokenizer):
    for bad in ({"tokens": 0}, {"doubt": 0.0}):
        with pytest.raises(
            ValueError, match="Speculation: (tokens must be at least 1|doubt must be positive)"
        ):
            jl.Speculation(draft=draft, **bad)
    with pytest.raises(ValueError, match="first_layers: layers must lie in"):
        jl.first_layers(model, 0)
    other = Decoder(dataclasses.replace(CONFIG, vocab=300), rngs=nnx.Rngs(1))
    refused(model, "a draft must have the model's 264 tokens", jl.Speculation(draft=other))
    refused(
        model,
        "a draft must be a decoder, a LookupDraft or a drafts.Draft, got str",
        jl.Speculation(draft="pico"),
    )
    start = jl.prefill(model, [[1, 2]], slack=16)
    refused(model, "must have read the whole text", jl.Speculation(draft=draft), cache=start)
    refused(model, "doubt is of a model that drafts", jl.Speculation(draft=jl.LookupDraft(), doubt=1.0))
    budget = jl.eviction.CacheBudget(gates=new_gates(model, "fast"), tokens=20, recent=3)
    held = jl.CacheOptions(budget=budget)
    refused(model, "a cache that is not evicted as it grows", jl.Speculation(draft=draft), cache=held)
    reader = T5(T5_TINY, rngs=nnx.Rngs(0))
    refused(
        reader, "a decoder alone, got a model that reads a source", jl.Speculation(draft=jl.LookupDraft())
    )
    misspelt = jl.Speculation(draft=draft)
    object.__setattr__(misspelt, "verification", "blocks")  # the tests' type checks would come first
    with pytest.raises(ValueError, match="Speculation: verification must be one of token, block, noise"):
        misspelt.__post_init__()
    changed = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), bos_token="<t>", eos_token="</s>")
    spec = jl.Speculation(draft=draft, tokenizer=changed)
    refused(model, "the draft's tokenizer must have the model's tokens", spec, tokenizer=tokenizer)


def test_a_draft_of_another_vocabulary_is_cut_or_filled_where_tokenizers_agree(model, tokenizer):
    plain = jl.generate(model, tokenizer, ["the end"], max_new_tokens=12)[0]
    for vocab in (260, 300):
        other = Decoder(dataclasses.replace(CONFIG, vocab=vocab, layers=1, windows=()), rngs=nnx.Rngs(1))
        spec = jl.Speculation(draft=other, tokens=2, tokenizer=tokenizer)
        out = jl.generate(model, tokenizer, ["the end"], max_new_tokens=12, speculation=spec)[0]
        assert out.token_ids == plain.token_ids
