"""T5 v1.0 and v1.1 give Hugging Face's logits, tokens and files, on checkpoints of transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert import huggingface
from checkpoints_convert.tensor_files import open_directory, write_file
from jaxllm.models.relative_bias import bucket_of_distance

pytestmark = pytest.mark.parity

V, S, T, STEPS, ROWS = 101, 20, 24, 8, 96
LENGTHS = (S, 7, 13)
SIZES = {
    "vocab_size": V,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,  # shorter than sources and targets
    "layer_norm_epsilon": 0.05,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": None,
}
CASES = {
    "v1.0": SIZES,
    "v1.1": SIZES | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
# Each feature of a version and what its absence would be.
FEATURES = {
    "v1.0": [{"head_scale": 1.0}, {"activation": "gelu_tanh"}],
    "v1.1": [{"activation": "gelu"}, {"max_distance": 24}, {"norm_eps": 1e-6}],
}


def write(torch, name: str, seed: int, path):
    """A random checkpoint, weights of standard deviation 0.2, and Hugging Face's model of it."""
    import transformers

    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**CASES[name]))
    if name == "v1.1":  # transformers 5 makes the head of both versions the embedding
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(V, 32))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    model.eval().set_attn_implementation("eager")
    model.save_pretrained(path)
    return model


@jax.jit
def encode(model, sources, lengths):
    return model.encode(sources, lengths)


@jax.jit
def step(model, tokens, cache, memory, lengths):
    return model(tokens, cache, memory=memory, lengths=lengths)


@pytest.fixture(scope="module", params=CASES)
def case(request, torch, tmp_path_factory):
    """The version, the checkpoint, Hugging Face's model, ours."""
    path = tmp_path_factory.mktemp("checkpoints") / request.param
    theirs = write(torch, request.param, 0, path)
    ours, _ = huggingface.load(path)
    return request.param, path, theirs, ours


@pytest.fixture(scope="module")
def tokens() -> tuple[np.ndarray, np.ndarray]:
    """Sources and targets."""
    rng = np.random.default_rng(0)
    return rng.integers(0, V, (3, S)), rng.integers(0, V, (3, T + STEPS))


def logits_of(torch, theirs, sources, targets) -> np.ndarray:
    """Row by row, so that nothing depends on their padding."""
    with torch.no_grad():
        rows = [
            theirs(
                input_ids=torch.tensor(source[None, :length]),
                decoder_input_ids=torch.tensor(target[None]),
            ).logits[0]
            for source, length, target in zip(sources, LENGTHS, targets, strict=True)
        ]
    return np.stack([row.numpy() for row in rows])


def memory_of(ours, sources):
    return encode(ours, jnp.asarray(sources, jnp.int32), jnp.asarray(LENGTHS, jnp.int32))


def assert_close(got, want):
    """A largest difference of at most 1e-4 of the scale."""
    assert np.abs(np.asarray(got) - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize(
    "lengths",
    [pytest.param((T, T, T), id="whole", marks=pytest.mark.slow), pytest.param((5, T, 11), id="ragged")],
)
def test_prefill_and_steps_through_the_cache_give_their_logits(torch, case, tokens, lengths):
    _, _, theirs, ours = case
    sources, targets = tokens
    want = logits_of(torch, theirs, sources, targets)
    memory = memory_of(ours, sources)
    request, at = np.arange(3), np.array(lengths)
    chunk = jnp.asarray(targets[:, :T], jnp.int32)
    cache = ours.make_cache(3, ROWS)
    logits, cache = step(ours, chunk, cache, memory, jnp.asarray(at, jnp.int32))
    for i, length in enumerate(lengths):
        assert_close(logits[i, :length], want[i, :length])
    for _ in range(STEPS):
        token = jnp.asarray(targets[request, at][:, None], jnp.int32)
        logits, cache = step(ours, token, cache, memory, jnp.ones(3, jnp.int32))
        assert_close(logits[:, 0], want[request, at])
        at += 1


@pytest.mark.slow
def test_switching_a_feature_off_moves_the_logits(case, tokens):
    name, _, _, ours = case
    sources, targets = (jnp.asarray(x, jnp.int32) for x in tokens)
    leaves = jax.tree.leaves(ours)

    def logits(changes):
        config = dataclasses.replace(ours.config, **changes)

        model = jax.tree.unflatten(jax.tree.structure(type(ours)(config, rngs=None)), leaves)
        forward = jax.jit(lambda s, t: model(t, memory=model.encode(s))[0])
        return np.asarray(forward(sources, targets))

    want = logits({})
    for changes in FEATURES[name]:
        # the two forms of GELU differ by 5e-4 at most: here it is twice what parity forgives
        forms = changes == {"activation": "gelu"} and ours.config.activation == "gelu_tanh"
        least = 2e-4 * np.abs(want).max() if forms else 1e-2
        assert np.abs(logits(changes) - want).max() > least, changes


def pick(logits, used) -> np.ndarray:
    """The best token of each row that is not in `used` [3, V]."""
    return np.argmax(np.where(used, -np.inf, np.asarray(logits)), -1)


def settings(once: bool) -> dict:
    """Of their greedy decoding; `once`: no token twice, so that texts do not settle on a word."""
    more = {"do_sample": False, "max_new_tokens": 64, "min_new_tokens": 64}
    return more | ({"no_repeat_ngram_size": 1} if once else {})


def greedy(theirs, ours, torch, sources, once: bool):
    """The first 64 tokens of each target, ours and theirs."""
    mask = torch.tensor(np.arange(S)[None] < np.array(LENGTHS)[:, None]).long()
    want = theirs.generate(torch.tensor(sources), attention_mask=mask, **settings(once))
    memory = memory_of(ours, sources)
    cache = ours.make_cache(3, ROWS)
    got = [np.full(3, ours.config.decoder_start)]
    used = np.zeros((3, V), bool)
    while len(got) <= 64:
        used[np.arange(3), got[-1]] = once
        token = jnp.asarray(got[-1][:, None], jnp.int32)
        logits, cache = step(ours, token, cache, memory, jnp.ones(3, jnp.int32))
        got.append(pick(logits[:, 0], used))
    return np.stack(got, 1).tolist(), want.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("once", [False, True])
def test_greedy_tokens_are_theirs(torch, case, tokens, once):
    _, _, theirs, ours = case
    got, want = greedy(theirs, ours, torch, tokens[0], once)
    assert len(want[0]) >= 64 and got == want


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [1, 2])
def test_greedy_tokens_are_theirs_on_other_weights(torch, tmp_path, tokens, name, seed):
    theirs = write(torch, name, seed, tmp_path / name)
    ours, _ = huggingface.load(tmp_path / name)
    for once in (False, True):
        got, want = greedy(theirs, ours, torch, tokens[0], once)
        assert got == want


def test_saving_gives_the_tensors_back_byte_for_byte(torch, case, tmp_path, tokens):
    _, path, theirs, ours = case
    huggingface.save(ours, None, tmp_path / "out")
    before, after = open_directory(path), open_directory(tmp_path / "out")
    assert set(before) == set(after)
    for name in before:
        assert before[name].tobytes() == after[name].tobytes(), name
    again = type(theirs).from_pretrained(tmp_path / "out").eval()
    assert_close(logits_of(torch, again, *tokens), logits_of(torch, theirs, *tokens))
    assert huggingface.load(tmp_path / "out")[0].config == ours.config


def load_with(case, folder, tensors, changes):
    """Our model of a checkpoint with other tensors and with changes to its config."""
    folder.mkdir()
    raw = json.loads((case[1] / "config.json").read_text("utf-8")) | changes
    raw = {key: value for key, value in raw.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(raw))
    entries = [(n, x.shape, x.dtype, lambda x=x: x) for n, x in tensors.items()]
    write_file(folder / "model.safetensors", entries)
    return huggingface.load(folder)[0]


def test_configs_and_copies_of_files_on_the_hub_are_understood(case, tmp_path):
    """Written before transformers 5: no `scale_decoder_outputs`, the embedding three times."""
    name, path, _, ours = case
    tensors = open_directory(path)
    for part in ("encoder", "decoder"):
        tensors[f"{part}.embed_tokens.weight"] = tensors["shared.weight"]
    old = {"scale_decoder_outputs": "absent", "tie_word_embeddings": name == "v1.0"}
    same = load_with(case, tmp_path / "copies", tensors, old)
    assert same.config == ours.config
    del tensors["shared.weight"], tensors["encoder.embed_tokens.weight"]
    other = load_with(case, tmp_path / "renamed", tensors, old)
    for model in (same, other):
        for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(ours), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_are_theirs(torch, causal):
    from transformers.models.t5.modeling_t5 import T5Attention

    for count in (8, 16, 32, 64):
        for far in (33, 64, 100, 128, 1000):
            distance = np.arange(-far - 9, far + 10)
            got = bucket_of_distance(count, far, causal=causal)[np.clip(distance, -far, far) + far]
            want = T5Attention._relative_position_bucket(torch.tensor(distance), not causal, count, far)
            np.testing.assert_array_equal(got, want.numpy())
