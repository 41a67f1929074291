"""Logits and greedy tokens of `Decoder` equal Hugging Face's on random tiny checkpoints.

The checkpoints are written by transformers itself and read by `checkpoints_convert`. They are made
so that every
feature matters: weights of standard deviation 0.2, soft caps of 3, windows and trained lengths of
  ropes shorter than
the text; the last test switches features off one at a time.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert import huggingface
from checkpoints_convert.materialize import materialize, named_leaves
from jaxllm.decoding.generate import generate
from jaxllm.models.decoder import Decoder
from jaxllm.models.rope import Rope

pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
HEAD = {"head_dim": 16}  # not width / heads
ORIGINAL = 16  # trained length of stretched ropes
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 8.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
GEMMA = HEAD | {
    "query_pre_attn_scalar": 9,
    "sliding_window": 6,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}
EXPERTS = HEAD | {"num_experts_per_tok": 2, "num_local_experts": 5}
QWEN_MOE = HEAD | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5_000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}


def longrope(planes: int, original: int) -> dict:
    """A longrope whose two lists differ widely."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(planes)],
        "long_factor": [3.0 + 2.0 * i for i in range(planes)],
        "original_max_position_embeddings": original,
    }


# name: (family of transformers, what differs from SIZES)
CHECKPOINTS = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", HEAD | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "linear": ("llama", {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True}),
    "yarn": ("llama", HEAD | {"rope_parameters": YARN}),
    "mistral": ("mistral", HEAD | {"sliding_window": 5, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", HEAD),
    "gemma2": ("gemma2", GEMMA),
    # transformers ignores Gemma 3's soft cap on scores; no published checkpoint has one
    "gemma3": ("gemma3_text", GEMMA | {"num_hidden_layers": 7, "rope_parameters": ROPES,
               "attn_logit_softcapping": None}),
    "phi3": ("phi3", {"sliding_window": 7}),
    "phi3_partial": ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.5,
                     "rope_theta": 100.0, "rope_type": "default"}}),
    "mixtral": ("mixtral", EXPERTS | {"sliding_window": 7, "num_hidden_layers": 1}),
    "qwen3_moe": ("qwen3_moe", QWEN_MOE | {"mlp_only_layers": [0]}),
    "gpt_oss": ("gpt_oss", EXPERTS | {"sliding_window": 5, "swiglu_limit": 0.5,
                "rope_parameters": YARN | {"truncate": False}}),
    # 24 tokens: with 64 always the short list, with 8 always the long, with 16 the length decides
    "phi3_short": ("phi3", {"rope_parameters": longrope(4, 96)}),
    "phi3_long": ("phi3", {"rope_parameters": longrope(4, 8)}),
    "phi3_between": ("phi3", {"rope_parameters": longrope(4, 16)}),
}  # fmt: skip
# variants of others that stay: checkpoints, and single features of them
SLOW = {
    "llama2",
    "mistral",
    "gemma2",
    "phi3",
    "linear",
    "yarn",
    "qwen2",
    "phi3_partial",
    "phi3_short",
    "phi3_long",
    "phi3_between",
    "qwen3_moe",
    ("gpt_oss", "glu_limit"),
    ("gpt_oss", "attention_sinks"),
}


def quick(rows):
    """Parameters, the slow ones marked so; a checkpoint by its name, or a feature of one."""
    rows = [(row,) if isinstance(row, str) else row for row in rows]
    return [pytest.param(*row, marks=pytest.mark.slow if SLOW & {row[0], row[:2]} else ()) for row in rows]


def their_model(torch, name: str, seed: int):
    """A random model of transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, changes = CHECKPOINTS[name]
    settings = SIZES | changes
    stretched = settings.get("rope_parameters", {})
    if stretched.get("rope_type") == "longrope":
        settings["original_max_position_embeddings"] = stretched["original_max_position_embeddings"]
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.normal_(0.0, 0.2, generator=rng)
            if "norm" in key and "gemma" not in kind:
                value.add_(1.0)
    return model


@pytest.fixture(scope="module")
def made(torch, tmp_path_factory):
    """(name, seed) -> their model, and ours, which read the files that theirs wrote."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    kept = {}

    def make(name, seed=0):
        if (name, seed) not in kept:
            theirs = their_model(torch, name, seed)
            path = tmp_path_factory.mktemp("parity") / name
            theirs.save_pretrained(path)
            ours, tokenizer = huggingface.load(path)
            assert tokenizer is None
            kept[name, seed] = theirs, ours
        return kept[name, seed]

    return make


LENGTHS = (24, 17, 9)
STEPS = 8


def texts() -> np.ndarray:
    """Three rows of 32 tokens: prompts of LENGTHS, then what is fed step by step."""
    return np.random.default_rng(7).integers(0, SIZES["vocab_size"], (3, 24 + STEPS))


def their_logits(torch, model, row: np.ndarray, length: int) -> np.ndarray:
    """Logits of a prompt, then of each step through their cache: [length + STEPS, V]."""
    tokens = torch.tensor(row[None, : length + STEPS])
    out = model(tokens[:, :length], use_cache=True)
    logits = [out.logits[0]]
    for i in range(length, length + STEPS):
        out = model(tokens[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0])
    return torch.cat(logits).detach().numpy()


@jax.jit
def forward(model, tokens, cache, lengths):
    return model(tokens, cache, lengths=lengths)


@pytest.mark.parametrize("name", quick(CHECKPOINTS))
def test_logits_equal_theirs_in_prefill_and_decode_of_a_ragged_batch(torch, made, name):
    theirs, ours = made(name)
    rows = texts()
    want = [their_logits(torch, theirs, row, n) for row, n in zip(rows, LENGTHS, strict=True)]
    lengths = jnp.array(LENGTHS, jnp.int32)
    cache = ours.make_cache(3, capacity=40)
    logits, cache = forward(ours, jnp.asarray(rows[:, :24], jnp.int32), cache, lengths)
    got = [[np.asarray(logits[b, :n])] for b, n in enumerate(LENGTHS)]
    for step in range(STEPS):
        token = rows[np.arange(3), np.array(LENGTHS) + step][:, None]
        one = jnp.ones((3,), jnp.int32)
        logits, cache = forward(ours, jnp.asarray(token, jnp.int32), cache, one)
        for b in range(3):
            got[b].append(np.asarray(logits[b]))
    for b, n in enumerate(LENGTHS):
        ours_b, theirs_b = np.concatenate(got[b]), want[b]
        scale = np.abs(theirs_b).max()
        assert scale > 0.5
        difference = np.abs(ours_b - theirs_b).max(-1)
        assert difference[:n].max() <= 1e-4 * scale, (name, b, difference[:n].max(), scale)
        if name == "phi3_between" and n <= ORIGINAL:  # past it, theirs turns keys of one text by two lists
            difference = difference[:ORIGINAL]
        assert difference[n:].max() <= 1e-4 * scale, (name, b, difference[n:].max(), scale)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_generation_equals_theirs_over_64_tokens_on_three_seeds(torch, made, name):
    """Also where a text outgrows the trained length (`phi3_between`): both read it again there."""
    for seed in range(3):
        theirs, ours = made(name, seed)
        prompt = texts()[seed, :12]
        out = theirs.generate(
            torch.tensor(prompt[None]),
            attention_mask=torch.ones((1, 12), dtype=torch.long),
            max_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
        )
        (ours_out,) = generate(ours, None, [prompt.tolist()], max_new_tokens=64)
        assert ours_out.token_ids == out[0, 12:].tolist()


def changed(model: Decoder, **changes) -> Decoder:
    """The same weights under another config; what that config has no use for is left out."""
    config = dataclasses.replace(model.config, **changes)
    leaves = named_leaves(model)
    return materialize(Decoder(config, rngs=None), lambda name, shape: np.asarray(leaves[name]))


@jax.jit  # one program a checkpoint, not one a feature
def logits(model, tokens):
    return model(tokens)[0]


# (checkpoint, field of the config, its value when off; a function takes the rope as it is)
FEATURES = [
    ("llama3", "rope", Rope(theta=500.0)),
    ("linear", "rope", Rope(theta=10_000.0)),
    ("linear", "qkv_bias", False),
    ("linear", "out_bias", False),
    ("linear", "mlp_bias", False),
    ("yarn", "rope", Rope(theta=500.0)),
    ("yarn", "rope", lambda rope: dataclasses.replace(rope, attention_factor=1.0)),
    ("mistral", "windows", ()),
    ("qwen2", "qkv_bias", False),
    ("qwen2", "windows", ()),
    ("qwen3", "qk_norm", False),
    ("gemma2", "attention_softcap", None),
    ("gemma2", "logit_softcap", None),
    ("gemma2", "attention_scale", None),
    ("gemma2", "embedding_scale", 1.0),
    ("gemma2", "post_norms", False),
    ("gemma2", "norm_offset", 0.0),
    ("gemma2", "windows", ()),
    ("gemma2", "activation", "silu"),
    ("gemma3", "local_rope", None),
    ("gemma3", "qk_norm", False),
    ("gemma3", "windows", ()),
    ("phi3", "windows", ()),
    ("qwen3_moe", "renormalize", True),
    ("gpt_oss", "glu_limit", None),
    ("gpt_oss", "attention_sinks", False),
    ("phi3_partial", "rope", lambda rope: dataclasses.replace(rope, fraction=1.0)),
    ("phi3_long", "rope", lambda rope: dataclasses.replace(rope, original_context=64)),
    ("phi3_long", "rope", lambda rope: dataclasses.replace(rope, attention_factor=1.0)),
    ("phi3_short", "rope", lambda rope: dataclasses.replace(rope, original_context=8)),
]


@pytest.mark.parametrize(("name", "field", "off"), quick(FEATURES))
def test_switching_a_feature_off_moves_logits(made, name, field, off):
    _, ours = made(name)
    assert getattr(ours.config, field) != off
    off = off(ours.config.rope) if callable(off) else off
    tokens = jnp.asarray(texts()[:1, :24], jnp.int32)
    with_it, without = (logits(model, tokens) for model in (ours, changed(ours, **{field: off})))
    assert np.abs(np.asarray(with_it) - np.asarray(without)).max() > 1e-2
