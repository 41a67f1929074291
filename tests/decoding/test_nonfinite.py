"""Logits that are no numbers end their own request, and the layer that was first is named."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tiny_llama import byte_tokenizer
from transformers import PreTrainedTokenizerFast

import jaxllm as jl
from jaxllm import cli
from jaxllm.measure.perplexity import score
from jaxllm.models import t5
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.models.nonfinite import first_nonfinite

FIRST = r"first layers\.1\.mlp\.up\.out, of a model in float16; other types reach farther: bfloat16, float32"


def scaled(param, factor: float) -> None:
    """Multiplies a weight, whose numbers may leave their type's range in between."""
    times = partial(jax.tree.map, lambda x: (x.astype(jnp.float32) * factor).astype(x.dtype))
    param.set_value(times(param.get_value()))


def overflowing(dtype) -> Decoder:
    """What stands between grows, what comes out of it does not: fine where a type reaches far."""
    model = Decoder(TINY, rngs=nnx.Rngs(0), dtype=dtype)
    scaled(model.layers[1].mlp.up.w, 6e4)
    scaled(model.layers[1].mlp.down.w, 1 / 6e4)
    return model


@pytest.fixture(scope="module")
def half():
    return overflowing(jnp.float16)


@pytest.fixture(scope="module")
def model():
    return Decoder(dataclasses.replace(TINY, vocab=264), rngs=nnx.Rngs(0))


def with_nan_at(model: Decoder, token: int) -> Decoder:
    """A copy that has no number for one token."""
    other = nnx.clone(model)
    table = other.embedding.table.get_value()
    other.embedding.table.set_value(type(table)(jax.tree.leaves(table)[0].at[token].set(jnp.nan)))
    return other


def test_a_half_that_overflows_ends_with_a_reason_and_draws_no_token(half):
    options = {"max_new_tokens": 4, "sampler": jl.Sampler(temperature=1.0), "logprobs": True}
    with pytest.warns(RuntimeWarning, match=FIRST):
        (out,) = jl.generate(half, None, [[1, 2, 3]], **options)
    assert (out.token_ids, out.logprobs, out.finish_reason) == ([], [], "nonfinite")
    assert "request 0 after 0 tokens" in out.error


def test_one_request_ends_and_the_others_go_on_as_ever(model):
    prompts = [[1, 2, 3], [7]]
    want = jl.generate(model, None, prompts, max_new_tokens=8)
    # so that only the first of them meets it
    end, token = next((i, t) for i, t in enumerate(want[0].token_ids, 1) if t not in want[1].token_ids)
    said = f"request 0 after {end} tokens: first embedding.*look at its weights"
    with pytest.warns(RuntimeWarning, match=said):
        outs = jl.generate(with_nan_at(model, token), None, prompts, max_new_tokens=8)
    assert outs[0].token_ids == want[0].token_ids[:end] and outs[0].finish_reason == "nonfinite"
    assert outs[1] == want[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_stream_raises_behind_its_last_good_token(model):
    want = [token.token_id for token in jl.stream(model, None, [1, 2, 3], max_new_tokens=8)]
    made = []
    with pytest.raises(FloatingPointError, match=f"request 0 after {want.index(want[3]) + 1} tokens"):
        for token in jl.stream(with_nan_at(model, want[3]), None, [1, 2, 3], max_new_tokens=8):
            made.append(token.token_id)
    assert made == want[: want.index(want[3]) + 1]


def test_what_is_measured_is_an_error_that_names_the_layer(half):
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    with pytest.raises(FloatingPointError, match="^perplexity: logits must be finite, .*" + FIRST):
        jl.perplexity(half, ids, context=8)
    with pytest.raises(FloatingPointError, match="^score: logits must be finite, .*" + FIRST):
        score(half, [ids])


@pytest.mark.slow
def test_the_first_layer_is_found_in_an_encoder():
    reads = t5.T5(t5.TINY, rngs=nnx.Rngs(0))
    assert first_nonfinite(reads, [0], source=[3, 4]) is None
    scaled(reads.encoder.layers[1].mlp.up.w, jnp.inf)
    assert first_nonfinite(reads, [0], source=[3, 4]) == "encoder.layers.1.mlp.up.out"


def test_the_first_layer_is_found_behind_a_cache_with_windows():
    model = Decoder(dataclasses.replace(TINY, windows=(4, None)), rngs=nnx.Rngs(0))
    bad, cache = with_nan_at(model, 5), jl.prefill(model, [[1] * 8])
    assert first_nonfinite(bad, [2, 3, 5], cache=cache) == "embedding"
    assert first_nonfinite(bad, [2, 3], cache=cache) is None


def test_commands_say_it_in_one_line_and_json_stays_json(model, tmp_path, monkeypatch, capfd):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer())
    bad = with_nan_at(model, tokenizer.encode("e")[0])
    monkeypatch.setattr(jl, "load", lambda *_, **__: (bad, tokenizer))
    (tmp_path / "text.txt").write_text("the end")
    for args in (("eval", "--text", str(tmp_path / "text.txt")), ("generate", "--prompt", "the end")):
        status = cli.status([*args, "--json"])
        out, err = capfd.readouterr()
        assert status == 2 and err.splitlines()[-1].startswith("jaxllm: "), err
        assert "first embedding" in err.splitlines()[-1] and "Traceback" not in err
        assert (json.loads(out)["prompts"][0]["finish_reason"] == "nonfinite") if out else args[0] == "eval"
