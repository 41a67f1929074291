"""Families of models there and back, byte for byte as transformers writes, and which one writes a model."""

import pytest
from flax import nnx
from their_models import FAMILIES, SMALL, their_directory

from checkpoints_convert import huggingface, tensor_files
from checkpoints_convert.tensor_files import same
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder


@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back_byte_for_byte_and_transformers_loads_it(torch, name, tmp_path):
    kind, settings = FAMILIES[name]
    dtype = torch.bfloat16 if name in ("llama", "gemma2", "gpt2") else torch.float32
    theirs, auto = their_directory(tmp_path / "a", kind, settings, dtype, torch)
    model, tokenizer = huggingface.load(tmp_path / "a")
    assert tokenizer is None and model.config.stop_tokens == (5,)
    huggingface.save(model, None, tmp_path / "b", model_type=kind, max_shard_bytes=4000)
    before = tensor_files.open_directory(tmp_path / "a")
    after = tensor_files.open_directory(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all(same(before[key], after[key]) for key in before)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    again, info = auto.from_pretrained(tmp_path / "b", output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.dtype == dtype
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in theirs.state_dict().items())
    tokens = {"bos_token_id", "pad_token_id"}  # a tokenizer's, of which there is none here
    for key in (set(theirs.config.to_dict()) & {*SMALL, "layer_types", "sliding_window"}) - tokens:
        assert getattr(again.config, key) == getattr(theirs.config, key), key


@pytest.mark.parametrize(
    ("features", "kind"),
    [
        ({}, "llama"),
        ({"windows": (8, 8)}, "mistral"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qkv_bias": True, "windows": (None, 8)}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
    ],
)
def test_a_model_is_written_as_the_first_family_that_can_say_it(features, kind):
    config = decoder.Config(**(vars(decoder.TINY) | features))
    model = Decoder(config, rngs=None)
    assert huggingface.family_of(model).model_type == kind


def test_what_no_family_can_say_is_refused(tmp_path):
    config = decoder.Config(**(vars(decoder.TINY) | {"windows": (4, 8)}))
    model = Decoder(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no family can describe this config: tried llama, mistral"):
        huggingface.save(model, None, tmp_path / "out")
    with pytest.raises(ValueError, match="tried qwen3"):
        plain = Decoder(decoder.TINY, rngs=nnx.Rngs(0))
        huggingface.save(plain, None, tmp_path / "out", model_type="qwen3")
    assert list(tmp_path.iterdir()) == []
