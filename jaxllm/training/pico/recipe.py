"""The command that made the models that ship: the recipe of pico, target, draft and companion.

    python -m jaxllm.training.pico.recipe --data ../shared/data --stories stories.txt \\
        --out runs/target --checkpoint runs/target.ckpt --member target --steps 3000

Each member is a Llama-shaped decoder trained on plain text and on exercises (`exercises.py`), first on short
rows, then on longer ones, from weights that can already copy (`induction.py`). Blocks are trained by Muon
(Jordan et al., 2024, optax.contrib.muon), embeddings and norms by Adam. A draft or companion may learn from a
teacher as well (the Kullback-Leibler divergence to its next-token distribution, arXiv:1503.02531).

A killed run goes on from --checkpoint bit for bit. --out appears when the run ends: a Hugging Face
directory (bfloat16 safetensors in shards of at most 3.5 MB, tokenizer) with a model card, README.md,
written from what was really run.
"""

import argparse
import dataclasses
import datetime
import json
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxllm.models.decoder import Config, Decoder
from jaxllm.models.rope import Rope
from jaxllm.training import trainer
from jaxllm.training.pico import corpus, induction
from jaxllm.training.pico.card import HISTORY, card, earlier, times_read, told
from jaxllm.training.pico.corpus import Phase
from jaxllm.training.pico.exercises import Words
from jaxllm.training.pico.losses import cross_entropy, distil, student_only

SHARD_BYTES = 3_500_000
BASE = Config(
    layers=8,
    width=256,
    heads=8,
    kv_heads=2,
    head_dim=32,
    ffn=384,
    vocab=corpus.VOCAB,
    context=1024,
    tied=True,
    rope=Rope(theta=10_000.0),
)
MEMBERS = {
    "target": BASE,  # 3.9 M parameters
    "draft": dataclasses.replace(  # 0.30 M
        BASE, layers=2, width=96, heads=4, kv_heads=2, head_dim=24, ffn=256
    ),
    "companion": dataclasses.replace(  # 0.54 M
        BASE, layers=3, width=128, heads=4, kv_heads=2, head_dim=32, ffn=224
    ),
}

# Weights among texts; a text that is not there is left out.
TEXTS = {
    "tinyshakespeare": 0.18,
    "gsm8k": 0.25,
    "wikitext2": 0.3,
    "stories": 0.25,
    "tinystories": 0.02,
}


def mixture(text: float, names: Sequence[str], **kinds: float) -> dict[str, float]:
    """`text` shared among the texts at hand, and the kinds of exercises as given."""
    total = sum(TEXTS[n] for n in names)
    return {n: text * TEXTS[n] / total for n in names} | kinds


def phases(names: Sequence[str], length: int, batch: int) -> list[Phase]:
    """The curriculum: every step has `batch * length` tokens, whatever the length of its rows."""
    early = mixture(0.3, names, repeat=0.35, lookup=0.3, sums=0.05)
    late = mixture(0.62, names, repeat=0.13, recite=0.05, lookup=0.16, sums=0.04)
    plan = [
        (0.05, length // 2, early),
        (0.50, length, late),
        (0.30, length * 2, late),
        (0.15, length * 4, late),
    ]
    return [Phase(share, T, max(1, batch * length // T), mix) for share, T, mix in plan]


def long_phases(names: Sequence[str], length: int, batch: int) -> list[Phase]:
    """A second run, from weights of the first: long rows, more to repeat, so that long passages hold too."""
    mix = mixture(0.45, names, repeat=0.38, recite=0.06, lookup=0.09, sums=0.02)
    plan = [(0.75, length * 2), (0.25, length * 4)]
    return [Phase(share, T, max(1, batch * length // T), mix) for share, T in plan]


def repeat_phases(names: Sequence[str], length: int, batch: int) -> list[Phase]:
    """A last run: mostly passages to repeat, whose rare slips (an early end, a wrong one of two equal tokens)
    text would drown."""
    mix = mixture(0.32, names, repeat=0.52, recite=0.06, lookup=0.08, sums=0.02)
    return [Phase(1.0, length * 2, max(1, batch // 2), mix)]


def recite_phases(names: Sequence[str], length: int, batch: int) -> list[Phase]:
    """Passages of text to repeat beside random ones: what could be guessed must be read."""
    mix = mixture(0.30, names, repeat=0.28, recite=0.32, lookup=0.08, sums=0.02)
    return [Phase(1.0, length * 2, max(1, batch // 2), mix)]


PLANS = {"main": phases, "long": long_phases, "repeat": repeat_phases, "recite": recite_phases}


def initial(config: Config, seed: int, *, wired: bool = True) -> Decoder:
    """A new decoder; `wired`: with induction heads from the start (`induction.py`)."""
    model = Decoder(config, rngs=nnx.Rngs(seed))
    return induction.wire(model, seed) if wired else model


def make_optimizer(
    steps: int, *, muon: float, adam: float, warmup: int, floor: float = 0.05, decay: float = 0.05
) -> optax.GradientTransformation:
    """Muon on the blocks' linear weights, Adam on the rest; warm-up, cosine, clipping at norm 1."""
    if steps <= warmup:
        raise ValueError(f"pico: steps must be more than the warm-up's, got {steps=}, {warmup=}")

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, peak * floor)

    rows = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)  # [N, K]

    def linear(params: Mapping[str, Any]) -> dict[str, Any]:
        return {n: rows if "layers[" in n and n.endswith(".rows") else None for n in params}

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule(muon),
            adam_learning_rate=schedule(adam),
            weight_decay=decay,
            adam_b2=0.98,
            muon_weight_dimension_numbers=linear,
        ),
    )


def get_tokenizer(folder: str | Path | None, texts: Sequence[corpus.Text]) -> Any:
    """The tokenizer of a directory, or a new one trained on the texts' training parts."""
    from tokenizers import Tokenizer

    if folder is not None and (Path(folder) / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    limit = 1_500_000  # bytes of each text, so that none decides alone
    documents = []
    for text in texts:
        size = 0
        for document in text.train:
            documents.append(document)
            size += len(document.encode())
            if size > limit:
                break
    return corpus.train_tokenizer(documents)


def export(model: Decoder, tokenizer: Any, folder: Path) -> None:
    """Writes a Hugging Face directory, weights in bfloat16; `folder` must not exist."""
    from transformers import AutoTokenizer

    from jaxllm.files import save

    with tempfile.TemporaryDirectory() as place:
        corpus.save_tokenizer(tokenizer, place, context=model.config.context)
        fast = AutoTokenizer.from_pretrained(place)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    half.config = dataclasses.replace(model.config, stop_tokens=(fast.eos_token_id,))
    save(half, folder, fast, to="huggingface", max_shard_bytes=SHARD_BYTES)


def load_model(folder: str | Path) -> Decoder:
    """A float32 model of a Hugging Face directory."""
    from jaxllm.files import load

    return load(str(folder), dtype=jnp.float32)[0]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jaxllm.training.pico.recipe", description=__doc__)
    add = parser.add_argument
    add("--data", required=True, help="directory of the texts (tinyshakespeare, gsm8k, ...)")
    add("--stories", help="file of stories, each followed by a line <|endoftext|>")
    add("--out", required=True, help="directory to write; must not exist yet")
    add("--member", choices=list(MEMBERS), default="target")
    add("--steps", type=int, required=True)
    add("--stop", type=int, help="end after so many of the steps, with the weights of that time")
    add("--plan", choices=list(PLANS), default="main", help="phases: a whole run, or one on long rows")
    add("--length", type=int, default=256, help="tokens a row in the main phase")
    add("--batch", type=int, default=16, help="rows a step in the main phase")
    add("--accumulate", type=int, default=1, help="microbatches a step")
    add("--muon", type=float, default=0.006, help="peak rate of Muon")
    add("--adam", type=float, default=0.0015, help="peak rate of Adam")
    add("--warmup", type=int, default=50, help="steps")
    add("--seed", type=int, default=1)
    add("--checkpoint", help="directory of checkpoints; a run found there goes on")
    add("--save-every", type=int, default=100, help="steps")
    add("--tokenizer", help="directory of a tokenizer.json to use; trained anew when left out")
    add("--init", help="Hugging Face directory to start from")
    add("--plain", action="store_true", help="start from plain random weights, not wired to copy")
    add("--teacher", help="Hugging Face directory of a model to learn from")
    add("--note", help="a sentence that the card should say as well")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    out = Path(args.out)
    if out.exists():
        raise FileExistsError(f"pico: out must not exist yet, got out={out}")
    config = MEMBERS[args.member]
    texts = corpus.read(args.data, args.stories)
    kept = args.tokenizer or args.init or args.teacher or args.checkpoint
    tokenizer = get_tokenizer(kept, texts)
    if args.checkpoint:
        corpus.save_tokenizer(tokenizer, args.checkpoint, context=config.context)
    streams = {t.name: corpus.encode(tokenizer, t.train) for t in texts}
    plan = PLANS[args.plan](list(streams), args.length, args.batch)
    batches = corpus.Batches(
        streams,
        Words.of(tokenizer),
        plan,
        steps=args.steps,
        seed=args.seed,
        pad=tokenizer.token_to_id(corpus.PAD),
    )
    sizes = ", ".join(f"{n} {len(s):,}" for n, s in streams.items())
    print(f"pico {args.member}: {sizes} tokens of text; {batches.tokens_before(args.steps):,} to train")
    model = load_model(args.init) if args.init else initial(config, args.seed, wired=not args.plain)
    if dataclasses.replace(model.config, stop_tokens=()) != config:
        raise ValueError(f"pico: init must be a {args.member}, got config={model.config}")
    params: Any = model
    loss: trainer.Loss = cross_entropy
    trainable = None
    if args.teacher:
        params = {"student": model, "teacher": load_model(args.teacher)}
        loss, trainable = distil, student_only
    trained = trainer.train(
        loss,
        params,
        batches,
        optimizer=make_optimizer(args.steps, muon=args.muon, adam=args.adam, warmup=args.warmup),
        steps=min(args.stop or args.steps, args.steps),
        accumulate=args.accumulate,
        checkpoint=Path(args.checkpoint) / "steps" if args.checkpoint else None,
        save_every=args.save_every,
        trainable=trainable,
    )
    model = trained.params["student"] if args.teacher else trained.params
    before = earlier(args.init)
    start = Path(args.init).name if args.init else "random" if args.plain else "wired"
    run = {
        "command": told(argv if argv is not None else sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "start": start,
        "teacher": Path(args.teacher).name if args.teacher else None,
        "note": args.note,
        "seed": args.seed,
        "steps": len(trained.losses),
        "planned": args.steps,
        "tokens": trained.tokens,
        "seconds": round(trained.seconds, 1),
        "loss": float(np.mean(trained.losses[-50:])),
        "read": times_read(batches, len(trained.losses)),
        "losses": [round(float(x), 4) for x in trained.losses],
    }
    facts = {
        "member": args.member,
        "config": config,
        "parameters": sum(x.size for x in jax.tree.leaves(model)),
        "runs": [*before, run],
    }
    partial = out.with_name(out.name + ".partial")
    export(model, tokenizer, partial)
    losses = np.concatenate([r["losses"] for r in facts["runs"]])
    trainer.plot_losses({args.member: losses}, partial / "loss.png", title=f"pico {args.member}")
    (partial / HISTORY).write_text(json.dumps({"runs": facts["runs"]}) + "\n")
    (partial / "README.md").write_text(card(facts, texts, plan))
    partial.rename(out)
    print(json.dumps({"out": str(out), "steps": len(trained.losses), "tokens": trained.tokens}))


if __name__ == "__main__":
    main()
