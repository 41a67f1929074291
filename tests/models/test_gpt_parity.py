"""GPT-2 and OPT give Hugging Face's logits, tokens and files, on checkpoints of transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert import huggingface
from checkpoints_convert.tensor_files import open_directory, write_file

pytestmark = pytest.mark.parity

V, T, STEPS, CONTEXT = 101, 24, 8, 96
SIZES = {"vocab_size": V, "bos_token_id": None, "eos_token_id": None}
OPT = SIZES | {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "ffn_dim": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": None,
}
CASES = {
    "gpt2": SIZES
    | {"n_positions": CONTEXT, "n_embd": 32, "n_layer": 3, "n_head": 4, "layer_norm_epsilon": 0.05},
    "opt": OPT,
    "opt-350m": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "opt-bare": OPT | {"layer_norm_elementwise_affine": False, "activation_function": "quick_gelu"},
}
# Each feature of a family and what its absence would be.
FEATURES = {
    "gpt2": [{"activation": "gelu"}, {"attention_scale": 1.0}, {"norm_eps": 1e-5}],
    "opt": [{"position_offset": 0}, {"activation": "gelu"}],
    "opt-350m": [{"position_offset": 0}, {"norm_first": True}],
    "opt-bare": [{"activation": "gelu"}],
}


def write(torch, name: str, seed: int, path):
    """A random checkpoint, weights of standard deviation 0.2, and Hugging Face's model of it."""
    import transformers

    if name == "gpt2":
        config = transformers.GPT2Config(**CASES[name])
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.OPTConfig(**CASES[name])
        model = transformers.OPTForCausalLM(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = parameter.ndim == 1 and key.endswith("weight")
            parameter.normal_(mean=1.0 if scale else 0.0, std=0.2)
    model.eval().set_attn_implementation("eager")
    model.save_pretrained(path)
    return model


@jax.jit
def step(model, tokens, cache, lengths):
    return model(tokens, cache, lengths=lengths)


@pytest.fixture(scope="module", params=CASES)
def case(request, torch, tmp_path_factory):
    """The family's name, the checkpoint, Hugging Face's model, ours."""
    path = tmp_path_factory.mktemp("checkpoints") / request.param
    theirs = write(torch, request.param, 0, path)
    ours, tokenizer = huggingface.load(path)
    assert tokenizer is None
    return request.param, path, theirs, ours


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, (3, T + STEPS))


def logits_of(torch, theirs, tokens) -> np.ndarray:
    with torch.no_grad():
        return theirs(torch.tensor(tokens)).logits.numpy()


def assert_close(got, want):
    """A largest difference of at most 1e-4 of the scale."""
    assert np.abs(np.asarray(got) - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize(
    "lengths",
    [pytest.param((T, T, T), id="whole", marks=pytest.mark.slow), pytest.param((5, T, 11), id="ragged")],
)
def test_prefill_and_steps_through_the_cache_give_their_logits(torch, case, tokens, lengths):
    _, _, theirs, ours = case
    want = logits_of(torch, theirs, tokens)
    request, at = np.arange(3), np.array(lengths)
    chunk = jnp.asarray(tokens[:, :T], jnp.int32)
    cache = ours.make_cache(3, CONTEXT)
    logits, cache = step(ours, chunk, cache, jnp.asarray(at, jnp.int32))
    for i, length in enumerate(lengths):
        assert_close(logits[i, :length], want[i, :length])
    for _ in range(STEPS):
        token = jnp.asarray(tokens[request, at][:, None], jnp.int32)
        logits, cache = step(ours, token, cache, jnp.ones(3, jnp.int32))
        assert_close(logits[:, 0], want[request, at])
        at += 1


def test_switching_a_feature_off_moves_the_logits(case, tokens):
    name, _, _, ours = case
    leaves = jax.tree.leaves(ours)

    def logits(changes):
        config = dataclasses.replace(ours.config, **changes)

        model = jax.tree.unflatten(jax.tree.structure(type(ours)(config, rngs=None)), leaves)
        return np.asarray(jax.jit(model)(jnp.asarray(tokens[:, :T], jnp.int32))[0])

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


def greedy(theirs, ours, torch, tokens, once: bool):
    """The next 64 tokens of each row, ours and theirs."""
    want = theirs.generate(torch.tensor(tokens[:, :T]), **settings(once))[:, T:].tolist()
    used = np.zeros((3, V), bool)
    used[np.arange(3)[:, None], tokens[:, :T]] = once
    cache = ours.make_cache(3, CONTEXT)
    chunk = jnp.asarray(tokens[:, :T], jnp.int32)
    logits, cache = step(ours, chunk, cache, jnp.full(3, T, jnp.int32))
    got = [pick(logits[:, -1], used)]
    while len(got) < 64:
        used[np.arange(3), got[-1]] = once
        token = jnp.asarray(got[-1][:, None], jnp.int32)
        logits, cache = step(ours, token, cache, jnp.ones(3, jnp.int32))
        got.append(pick(logits[:, 0], used))
    return np.stack(got, 1).tolist(), want


@pytest.mark.slow
@pytest.mark.parametrize("once", [False, True])
def test_greedy_tokens_are_theirs(torch, case, tokens, once):
    _, _, theirs, ours = case
    got, want = greedy(theirs, ours, torch, tokens, once)
    assert len(want[0]) >= 64 and got == want


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [1, 2])
def test_greedy_tokens_are_theirs_on_other_weights(torch, tmp_path, tokens, name, seed):
    theirs = write(torch, name, seed, tmp_path / name)
    ours, _ = huggingface.load(tmp_path / name)
    for once in (False, True):
        got, want = greedy(theirs, ours, torch, tokens, once)
        assert got == want


def test_saving_gives_the_tensors_back_byte_for_byte(torch, case, tmp_path, tokens):
    _, path, theirs, ours = case
    huggingface.save(ours, None, tmp_path / "out")
    before, after = open_directory(path), open_directory(tmp_path / "out")
    assert set(before) == set(after)
    for name in before:
        assert before[name].tobytes() == after[name].tobytes(), name
    again = type(theirs).from_pretrained(tmp_path / "out").eval()
    assert_close(logits_of(torch, again, tokens), logits_of(torch, theirs, tokens))


def test_files_with_other_prefixes_masks_and_a_copied_head_load(case, tmp_path):
    name, path, _, ours = case
    prefix, others = {"gpt2": ("transformer.", [""])}.get(name, ("model.decoder.", ["decoder.", ""]))
    for i, other in enumerate(others):
        tensors = {other + n.removeprefix(prefix): x for n, x in open_directory(path).items()}
        table = next(x for n, x in tensors.items() if x.shape[0] == V)
        tensors["lm_head.weight"] = table
        if name == "gpt2":
            tensors["h.0.attn.bias"] = np.ones((1, 1, CONTEXT, CONTEXT), np.float32)
            tensors["h.0.attn.masked_bias"] = np.full((1,), -1e4, np.float32)
        out = tmp_path / str(i)
        out.mkdir()
        (out / "config.json").write_text((path / "config.json").read_text("utf-8"))
        entries = [(n, x.shape, x.dtype, lambda x=x: x) for n, x in tensors.items()]
        write_file(out / "model.safetensors", entries)
        model, _ = huggingface.load(out)
        for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(ours), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_short_config_has_the_defaults_of_its_family(case):
    """Files on the hub leave out what transformers' class sets."""
    name, path, _, ours = case
    family, raw = huggingface.read_config(path)
    written = json.loads((path / "config.json").read_text("utf-8"))
    short = {key: value for key, value in written.items() if key in CASES[name]}
    config = family.config(family.defaults | short)
    assert dataclasses.replace(config, stop_tokens=ours.config.stop_tokens) == ours.config
