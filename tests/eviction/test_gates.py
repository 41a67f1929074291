"""Gates guess KVzip's scores in the pass that reads a text, and a held budget keeps a growing cache small."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxllm as jl
from jaxllm import cache as kv
from jaxllm.cache import repack
from jaxllm.decoding import prefill
from jaxllm.eviction import kvzip, running_budget
from jaxllm.eviction.budget import evict
from jaxllm.eviction.gates import ZapGate, load_gates, save_gates
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.training import gates as training
from jaxllm.training.gates import new_gates, train_gates

CONFIG = dataclasses.replace(TINY, layers=3, windows=(None, 8, None), context=192)
ROWS = [list(range(3, 43)), [5, 9, 2, 7] * 8]
FORMS = ("fast", "zap", "zap-linear")


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module", params=["fast", "zap", pytest.param("zap-linear", marks=pytest.mark.slow)])
def gates(model, request):
    """Gates with nothing zero in them."""
    plain = new_gates(model, request.param, hidden=12)
    leaves, tree = jax.tree.flatten(plain)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([x + jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def by_hand(gates, layer, x):
    """Scores [K, T] of what a layer reads [T, D], in float64, one head and token at a time."""
    g = {f.name: getattr(gates, f.name) for f in dataclasses.fields(gates)}
    g = {name: None if w is None else np.asarray(w, np.float64)[layer] for name, w in g.items()}
    out = np.zeros((2, len(x)))
    for t, row in enumerate(np.asarray(x, np.float64)):
        for h in range(2):
            if isinstance(gates, ZapGate):
                y = row
                if g["up"] is not None:
                    z = row @ g["up"] + g["up_bias"]
                    y = np.asarray(jax.nn.gelu(jnp.asarray(z, jnp.float32), approximate=False))
                out[h, t] = y @ g["down"][:, h] + g["down_bias"][h]
                continue

            def norm(v, scale):
                return v / np.sqrt((v * v).mean() + 1e-6) * scale

            key = norm(row @ g["keys"][:, h], g["key_norm"])
            for query in range(2):
                q = row @ g["queries"][:, h, query] + g["query_bias"][h, query]
                q = norm(q, g["query_norm"])
                own = q @ key / 4 + g["bias"][h, query]
                out[h, t] += 0.5 / (1 + np.exp(g["sinks"][h] @ q / 4 - own).sum())
    return out


def test_scores_are_the_published_formula_of_what_layers_read(model, gates):
    seen = {}

    def tap(name, x):
        seen[name] = x
        return x

    read = jax.jit(lambda: [model(jnp.asarray([ROWS[0]]), tap=tap), dict(seen)][1])()
    _, scores = prefill.prefill_with_scores(model, ROWS, gates, prefix=2)
    assert scores.shape == (2, 2, 2, 38) and not np.asarray(scores)[:, 1, :, 30:].any()
    for i, layer in enumerate((0, 2)):
        want = by_hand(gates, i, read[f"layers.{layer}.attention.q.in"][0])
        np.testing.assert_allclose(scores[i, 0], want[:, 2:], rtol=1e-4, atol=1e-5)


def test_a_text_is_read_once_and_its_cache_is_that_of_prefill(model, gates):
    plain = prefill.prefill(model, ROWS)
    cache, scores = prefill.prefill_with_scores(model, ROWS, gates)
    jax.tree.map(np.testing.assert_array_equal, cache, plain)
    parts, again = prefill.prefill_with_scores(model, ROWS, gates, chunk=12)
    np.testing.assert_allclose(again, scores, atol=1e-5, rtol=1e-5)
    assert evict(parts, again, ratio=0.3).lengths.tolist() == [40, 32]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_training_lowers_the_loss_and_learns_the_ranks(model, form, monkeypatch):
    monkeypatch.setattr(training, "TEXTS_AT_ONCE", 3)  # the last ones are fewer
    texts = [np.random.default_rng(i).integers(3, 120, 24).tolist() for i in range(4)]
    gates, done = train_gates(
        model,
        texts,
        form=form,
        prefix=1,
        tokens=80,
        steps=60,
        batch=64,
        hidden=12,
        optimizer=optax.adamw(2e-2),
        progress=False,
    )
    assert done.losses[-5:].mean() < done.losses[:5].mean()
    want = kvzip.kvzip_scores(
        model,
        prefill.prefill(model, texts, slack=64),
        [text[1:] for text in texts],
        prefix=1,
        output_aware=form != "fast",
    )

    def rank(x):
        return np.argsort(np.argsort(np.asarray(x), axis=-1), axis=-1).ravel()

    def guess(gates):
        return prefill.prefill_with_scores(model, texts, gates, prefix=1)[1]

    before, after = (
        np.corrcoef(rank(guess(g)), rank(want))[0, 1] for g in (new_gates(model, form, hidden=12), gates)
    )
    assert after > max(before, 0.0) + 0.2


def test_binary_cross_entropy_is_least_where_the_score_is_right(model):
    gates = new_gates(model, "fast")
    x = jax.random.normal(jax.random.key(0), (1, 5, CONFIG.width))
    p, loss_of = jax.jit(lambda g: g(0, x))(gates), jax.jit(lambda g, p: g.loss(0, x, p))
    loss = loss_of(gates, p)
    np.testing.assert_allclose(loss, -(p * jnp.log(p) + (1 - p) * jnp.log(1 - p)), rtol=1e-5)
    for step in (-0.1, 0.1):  # other scores, the same truth
        other = dataclasses.replace(gates, bias=gates.bias + step)
        assert (loss_of(other, p) > loss).all()


# -- a budget that holds


@pytest.fixture(scope="module")
def fast(model):
    return new_gates(model, "fast")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 8])
def test_a_long_generation_stays_within_its_budget_and_equals_the_loop_by_hand(model, fast, bits):
    hold = running_budget.CacheBudget(gates=fast, tokens=20, buffer=8, recent=3, sinks=2)
    prompts = [list(range(3, 25)), [7, 8, 9]]
    outs = jl.generate(model, None, prompts, max_new_tokens=60, cache=jl.CacheOptions(budget=hold, bits=bits))

    cache = hold.enforce(model.make_cache(2, 1, slack=8, bits=bits), None)
    sizes, made = set(), [[], []]
    read = jax.jit(prefill.forward)
    token = None
    queue = [np.asarray([3 + i for i in range(22)] + [0, 0]), np.asarray([7, 8, 9] + [0] * 21)]
    for at in (0, 8, 16):  # a prompt in pieces of the buffer
        piece = jnp.asarray(np.stack([q[at : at + 8] for q in queue]), jnp.int32)
        real = jnp.clip(jnp.asarray([22, 3], jnp.int32) - at, 0, 8)
        logits, tail, scores = read(model, fast, None, cache.context, piece, cache.tail, real)
        token = jnp.where(real > 0, logits.argmax(-1), 0 if token is None else token)
        cache = hold.enforce(kv.with_context(cache.context, tail), scores)
        sizes.add(kv.num_bytes(cache))
    waiting = []
    for _ in range(60):
        for row, t in zip(made, token.tolist(), strict=True):
            row.append(t)
        logits, tail, scores = read(
            model, fast, None, cache.context, token[:, None], cache.tail, jnp.ones(2, jnp.int32)
        )
        token, cache = logits.argmax(-1), kv.with_context(cache.context, tail)
        waiting.append(scores)
        if len(waiting) == 8:
            cache, waiting = hold.enforce(cache, jnp.concatenate(waiting, axis=-1)), []
            sizes.add(kv.num_bytes(cache))
            rows = repack.positions_by_head(cache)
            for b in range(2):
                held = [set(head.tolist()) for layer in rows for head in layer[b]]
                assert sum(map(len, held)) <= 20 * 4
                n = int(cache.lengths[b])
                assert all({0, 1, n - 3, n - 2, n - 1} <= head for head in held)
    assert [o.token_ids for o in outs] == made
    assert len(sizes) == 1  # from the first token to the last


@pytest.mark.slow
def test_a_budget_that_holds_everything_changes_nothing(model, fast):
    hold = running_budget.CacheBudget(gates=fast, tokens=100, buffer=16, recent=3)
    prompts = [[5, 6, 7, 8], list(range(20, 50))]
    budget = jl.CacheOptions(budget=hold)
    free = jl.generate(model, None, prompts, max_new_tokens=40)
    held = jl.generate(model, None, prompts, max_new_tokens=40, cache=budget)
    assert [o.token_ids for o in held] == [o.token_ids for o in free]
    streamed = [t.token_id for t in jl.stream(model, None, prompts[1], max_new_tokens=40, cache=budget)]
    assert streamed == free[1].token_ids


@pytest.mark.slow
def test_a_held_cache_goes_on_from_an_evicted_one_and_from_a_text_read_within_the_budget(model, fast):
    hold = running_budget.CacheBudget(gates=fast, tokens=16, buffer=8, recent=2)
    read = prefill.prefill_within_budget(model, ROWS, hold)
    assert read.lengths.tolist() == [40, 32]
    assert sum(len(h) for layer in repack.positions_by_head(read) for h in layer[0]) == 16 * 4
    prompts = [ROWS[0] + [8], ROWS[1] + [9]]
    whole = jl.generate(model, None, prompts, max_new_tokens=20, cache=jl.CacheOptions(budget=hold))
    after = jl.generate(
        model, None, [[8], [9]], max_new_tokens=20, cache=jl.CacheOptions(budget=hold, start=read)
    )
    # the text ends with a full buffer, so that both have read it in the same pieces
    assert [o.token_ids for o in after] == [o.token_ids for o in whole]
    cache, scores = prefill.prefill_with_scores(model, ROWS, fast)
    small = evict(cache, scores, ratio=0.5)
    wide = dataclasses.replace(hold, tokens=64)  # all that was left and will come: nothing more is lost
    free = jl.generate(model, None, [[8], [9]], max_new_tokens=20, cache=small)
    held = jl.generate(
        model, None, [[8], [9]], max_new_tokens=20, cache=jl.CacheOptions(budget=wide, start=small)
    )
    assert [o.token_ids for o in held] == [o.token_ids for o in free]


# -- files and wrong use


@pytest.mark.parametrize("form", FORMS)
def test_gates_come_back_from_a_file(model, tmp_path, form):
    gates = new_gates(model, form, hidden=12)
    save_gates(gates, tmp_path / "g", note="drawn")
    again = load_gates(tmp_path / "g")
    assert type(again) is type(gates)
    jax.tree.map(np.testing.assert_array_equal, again, gates)
    save_gates(jax.tree.map(lambda x: x * np.float32(np.nan), gates), tmp_path / "nan")
    with pytest.raises(ValueError, match="load_gates: .* must be finite, got inf or NaN"):
        load_gates(tmp_path / "nan")
    (tmp_path / "g" / "gates.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(ValueError, match=r"gates.safetensors' must have \d+ bytes, got 40"):
        load_gates(tmp_path / "g")
    with pytest.raises(ValueError, match="load_gates: .* cannot be opened"):
        load_gates(tmp_path / "g", verify=False)
    with pytest.raises(FileNotFoundError, match=r"gates\.json must be in the directory"):
        load_gates(tmp_path / "none")


def test_wrong_use_is_one_line(model, fast):
    other = Decoder(dataclasses.replace(CONFIG, width=64), rngs=nnx.Rngs(0))
    message = r"layers without a window, width and key heads must be \(2, 64, 2\), got \(2, 32, 2\)"
    with pytest.raises(ValueError, match=message):
        prefill.prefill_with_scores(other, ROWS, fast)
    with pytest.raises(
        ValueError, match="tokens must be more than recent and sinks, buffer at least 1, got tokens=36"
    ):
        running_budget.CacheBudget(gates=fast, tokens=36)
    hold = running_budget.CacheBudget(gates=fast, tokens=40)
    with pytest.raises(
        ValueError, match="must be an evicted one and nothing more, got 40 rows without scores"
    ):
        jl.generate(
            model, None, [[5]], cache=jl.CacheOptions(budget=hold, start=prefill.prefill(model, ROWS[:1]))
        )
    with pytest.raises(ValueError, match="rows must have more than prefix=32 tokens, got"):
        prefill.prefill_with_scores(model, ROWS, fast, prefix=32)
    with pytest.raises(
        ValueError, match="texts must be longer than the prefix, tokens, steps and batch positive"
    ):
        train_gates(model, ROWS, prefix=50)
