"""The recipe from texts to a directory that ships, on a tiny budget."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_texts import write_texts
from safetensors import safe_open

import jaxllm as jl
from jaxllm.cli import train as train_command
from jaxllm.training.pico import recipe as pico


def run_command(*words: str):
    """`jaxllm train ...` in this process; errors come through."""
    return train_command.train.main(list(words), standalone_mode=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def train(data):
    """Runs the command with a tiny budget; gives the directory it wrote."""

    def run(out, *more):
        texts = ["--data", str(data), "--stories", str(data / "stories.txt"), "--member", "draft"]
        budget = ["--steps", "1", "--warmup", "0", "--length", "32", "--batch", "1"]
        run_command("pico", *texts, *budget, "--save-every", "1", "--out", str(out), *more)
        return out

    return run


@pytest.fixture(scope="module")
def draft(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return train(folder / "draft", "--checkpoint", str(folder / "draft.ckpt"))


def test_the_directory_holds_bfloat16_weights_a_tokenizer_and_a_card(draft):
    names = {path.name for path in draft.iterdir()}
    assert {"README.md", "config.json", "history.json", "loss.png", "tokenizer.json"} <= names
    assert not draft.with_name("draft.partial").exists()
    with safe_open(draft / "model.safetensors", framework="numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
    model, tokenizer = jl.load(draft)
    assert sum(x.size for x in jax.tree.leaves(model)) == 301_536
    assert model.config.stop_tokens == (tokenizer.eos_token_id,) == (1,)
    assert tokenizer("a b").input_ids[0] == 0


def test_the_card_tells_what_was_run_and_no_path_of_the_machine(draft, data):
    card = (draft / "README.md").read_text()
    for told in ["301,536", "wired as induction heads", "CC-BY-SA", "CDLA-Sharing", "seed 1", "1 steps"]:
        assert told in card
    assert str(data) not in card and str(draft.parent) not in card
    assert f"--data {data.name} --stories stories.txt" in card and "--out draft" in card
    (run,) = json.loads((draft / "history.json").read_text())["runs"]
    assert len(run["losses"]) == run["steps"] == 1
    assert (draft / "loss.png").stat().st_size < 60_000


def test_a_run_that_is_complete_writes_the_same_weights_again(train, draft):
    again = train(draft.with_name("again"), "--checkpoint", str(draft.with_name("draft.ckpt")))
    assert (again / "model.safetensors").read_bytes() == (draft / "model.safetensors").read_bytes()
    assert (again / "tokenizer.json").read_bytes() == (draft / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_a_run_can_start_from_a_directory_and_learn_from_a_teacher(train, draft):
    taught = train(draft.with_name("taught"), "--init", str(draft), "--teacher", str(draft),
                   "--steps", "3", "--stop", "1", "--note", "A word more.")  # fmt: skip
    before, after = (json.loads((f / "history.json").read_text())["runs"] for f in (draft, taught))
    assert len(after) == 2 and after[0] == before[0] and len(after[1]["losses"]) == 1
    assert 0 < after[0]["read"]["stories"] == after[1]["read"]["stories"] < 0.1
    assert (after[1]["start"], after[1]["teacher"]) == ("draft", "draft")
    card = (taught / "README.md").read_text()
    assert "wired as induction heads" in card and "1 steps of 3 planned" in card
    assert "\nA word more.\n" in card
    assert "next-token distribution of `draft`" in card
    old, new = (jl.load(folder)[0].layers[0].mlp.up.w for folder in (draft, taught))
    assert (old.get_value().rows != new.get_value().rows).any()


def test_only_a_model_of_the_member_can_be_started_from(draft, data, tmp_path):
    with pytest.raises(ValueError, match="init must be a companion"):
        run_command("pico", "--data", str(data), "--member", "companion", "--steps", "2", "--warmup", "1",
                    "--init", str(draft), "--out", str(tmp_path / "out"))  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_directory_that_exists_is_not_written_to(train, draft):
    with pytest.raises(FileExistsError, match="out must not exist"):
        train(draft)


def test_shards_stay_below_their_limit(draft, tmp_path, monkeypatch):
    monkeypatch.setattr(pico, "SHARD_BYTES", 250_000)
    tokenizer = pico.get_tokenizer(draft, [])
    model = pico.load_model(draft)
    pico.export(model, tokenizer, tmp_path / "out")
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and max(path.stat().st_size for path in shards) <= 250_000
    for a, b in zip(*(jax.tree.leaves(m) for m in (model, pico.load_model(tmp_path / "out"))), strict=True):
        assert (a == b).all()


@pytest.mark.parity
def test_transformers_computes_the_same_logits(draft, torch):
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(str(draft), dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(3, 1024, (2, 24)).astype(np.int32)
    logits, _ = jax.jit(jl.load(draft, dtype="float32")[0])(jnp.asarray(ids))
    with torch.no_grad():
        want = other(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    assert np.abs(np.asarray(logits) - want).max() < 1e-4 * np.abs(want).max()
    assert other.generation_config.eos_token_id == 1


def test_every_member_has_the_size_its_card_claims():
    from jaxllm.models.decoder import Decoder

    def count(config):
        return sum(x.size for x in jax.tree.leaves(Decoder(config, rngs=None)))

    sizes = {name: count(config) / 1e6 for name, config in pico.MEMBERS.items()}
    assert (
        3 <= sizes["target"] <= 5 and round(sizes["draft"], 1) == 0.3 and round(sizes["companion"], 1) == 0.5
    )
    assert sum(sizes.values()) * 2 < 11  # megabytes of bfloat16
