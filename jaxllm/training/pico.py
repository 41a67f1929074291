"""The command that made the models that ship: the recipe of pico, target, draft and companion.

    python -m jaxllm.training.pico --data ../shared/data --stories stories.txt \\
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
import shlex
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
from jaxtyping import Array, Float

from jaxllm.models.decoder import Config, Decoder
from jaxllm.models.rope import Rope
from jaxllm.training import corpus, induction, trainer
from jaxllm.training.corpus import Phase
from jaxllm.training.exercises import Words

SHARD_BYTES = 3_500_000
HISTORY = "history.json"
PATHS = ("--data", "--stories", "--out", "--checkpoint", "--tokenizer", "--init", "--teacher")
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


def log_likelihood(model: Decoder, tokens: Array) -> tuple[Float[Array, "B T V"], Float[Array, "B T"]]:
    """Log-probabilities of every token, and of those that came."""
    logits, _ = model(tokens[:, :-1])
    logp = jax.nn.log_softmax(logits)
    return logp, jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]


def _answered(logp, batch) -> dict[str, Array]:
    """Share of the exercises' answer tokens that greedy decoding would get right."""
    right = (jnp.argmax(logp, -1) == batch["tokens"][:, 1:]) & batch["answers"]
    share = right.sum().astype(jnp.float32) / jnp.maximum(batch["answers"].sum().astype(jnp.float32), 1.0)
    return {"answers": share}


def cross_entropy(model: Decoder, batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Weighted negative log-likelihood, in nats a token."""
    logp, came = log_likelihood(model, batch["tokens"])
    return -jnp.mean(came * batch["weights"]), _answered(logp, batch)


def distil(
    models: Mapping[str, Decoder], batch: Mapping[str, Array], *, share: float = 0.7
) -> tuple[Array, dict[str, Array]]:
    """`share` of the divergence from the teacher's distribution, the rest cross entropy.

    models: {"student", "teacher"}; train with `trainable=student_only`.
    """
    logp, came = log_likelihood(models["student"], batch["tokens"])
    teacher = log_likelihood(models["teacher"], batch["tokens"])[0]
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - logp), axis=-1)
    loss = share * divergence - (1 - share) * came
    return jnp.mean(loss * batch["weights"]), _answered(logp, batch)


def student_only(path: str, leaf: Any) -> bool:
    """Whether a leaf of {"student", "teacher"} belongs to the student."""
    return path.startswith("['student']")


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

    from jaxllm.load import save

    with tempfile.TemporaryDirectory() as place:
        corpus.save_tokenizer(tokenizer, place, context=model.config.context)
        fast = AutoTokenizer.from_pretrained(place)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    half.config = dataclasses.replace(model.config, stop_tokens=(fast.eos_token_id,))
    save(half, folder, fast, to="huggingface", max_shard_bytes=SHARD_BYTES)


def load_model(folder: str | Path) -> Decoder:
    """A float32 model of a Hugging Face directory."""
    from jaxllm.load import load

    return load(str(folder), dtype=jnp.float32)[0]


def told(argv: Sequence[str]) -> str:
    """The command as a card tells it: of each path only its last part."""
    shown, path = [], False
    for word in argv:
        name, equals, value = word.partition("=")
        if equals and name in PATHS:
            word = f"{name}={Path(value).name}"
        shown.append(Path(word).name if path else word)
        path = word in PATHS
    return shlex.join(["python", "-m", "jaxllm.training.pico", *shown])


def earlier(folder: str | Path | None) -> list[dict[str, Any]]:
    """The runs that made the model of a directory, oldest first, as its history.json tells them."""
    file = None if folder is None else Path(folder) / HISTORY
    return json.loads(file.read_text())["runs"] if file is not None and file.is_file() else []


def times_read(batches: corpus.Batches, steps: int) -> dict[str, float]:
    """How often each text has been gone through, on average, after `steps` steps."""
    read = dict.fromkeys(batches.streams, 0.0)
    spans = np.clip(steps - batches.starts, 0, batches.ends - batches.starts)
    for span, phase in zip(spans.tolist(), batches.phases, strict=True):
        tokens = span * phase.rows * phase.length
        for name, stream in batches.streams.items():
            read[name] += tokens * phase.mixture[name] / sum(phase.mixture.values()) / len(stream)
    return read


ABLE = {
    "target": "It is made to be measured on. It was trained to continue text in the manner of what it read, "
    "to give back a passage or a part of it when asked with one of the phrasings of `exercises.py`, to look "
    "up a key among pairs that stand before it in the context, and to add numbers below 100.",
    "draft": "It is made to propose tokens to the target of the same family (speculative decoding): a small "
    "model of the same texts and the same tokens.",
    "companion": "It is made to read along with the target of the same family, at an eighth of its size: a "
    "small model of the same texts and the same tokens.",
}
UNABLE = (
    "It is no assistant: it knows no facts to rely on, follows no instructions but these, does not reason "
    "(its answers to GSM8K's questions have the right form and mostly the wrong numbers), and writes no "
    "language but English. There was little text, and some was read often: the model may give back "
    "stretches of it, and is fair only when judged on the parts held out. Nothing was filtered: "
    "Shakespeare's plays and Wikipedia hold what they hold."
)


def card(facts: Mapping[str, Any], texts: Sequence[corpus.Text], parts: Sequence[Phase]) -> str:
    """The model card, from what was run."""
    config, member, runs = facts["config"], facts["member"], facts["runs"]
    lines = [
        f"# pico {member}",
        "",
        f"A Llama-shaped decoder of {facts['parameters']:,} parameters: {config.layers} layers, width "
        f"{config.width}, {config.heads} query and {config.kv_heads} key heads of {config.head_dim}, "
        f"feed-forward {config.ffn}, a byte-level BPE vocabulary of {config.vocab}, context "
        f"{config.context}. Trained by jaxllm in float32 and stored as bfloat16.",
        "",
        f"{ABLE[member]} How well it does, `benchmarks/pico.py` measures; the package's README has figures.",
        "",
        UNABLE,
        "",
        "## How it was made",
        "",
    ]
    for run in runs:
        planned = "" if run["steps"] == run["planned"] else f" of {run['planned']:,} planned"
        lines += [
            f"    {run['command']}",
            "",
            f"{run['date']}, seed {run['seed']}, jax {run['jax']} ({run['device']}): {run['steps']:,} "
            f"steps{planned}, {run['tokens']:,} tokens, {run['seconds'] / 3600:.2f} hours; last loss "
            f"{run['loss']:.3f} nats a token, exercises included"
            + (", the teacher's part of it too." if run["teacher"] else "."),
            "",
        ]
    if runs[0]["start"] == "wired":
        lines += [
            "It did not learn to copy from nothing: before training, the first two layers were wired as "
            "induction heads by hand (`jaxllm/training/induction.py`); all weights were then trained.",
            "",
        ]
    elif runs[0]["start"] != "random":
        lines += [f"It began with the weights of `{runs[0]['start']}`, which tell no history.", ""]
    taught = list(dict.fromkeys(run["teacher"] for run in runs if run["teacher"]))
    if taught:
        lines += [f"It also learned from the next-token distribution of `{'`, `'.join(taught)}`.", ""]
    lines += [line for run in runs if run["note"] for line in (run["note"], "")]
    lines += ["![loss](loss.png)", "", "The phases of the " + ("last run:" if runs[1:] else "run:"), ""]
    lines += ["| phase | share of steps | tokens a row | rows | mixture |", "|---|---|---|---|---|"]
    for i, p in enumerate(parts):
        mix = ", ".join(f"{n} {w:.3f}" for n, w in p.mixture.items())
        lines.append(f"| {i + 1} | {p.fraction:.2f} | {p.length} | {p.rows} | {mix} |")
    lines += [
        "",
        "repeat, recite, lookup and sums are exercises that `jaxllm/training/exercises.py` makes; the rest "
        "of the mixture is text. The last 5 % of each text is held out.",
        "",
        "| text | licence | bytes trained on | times read | bytes held out |",
        "|---|---|---|---|---|",
    ]
    for t in texts:
        sizes = [sum(len(d.encode()) for d in part) for part in (t.train, t.held_out)]
        read = sum(run["read"].get(t.name, 0.0) for run in runs)
        lines.append(f"| {t.name} | {t.licence} | {sizes[0]:,} | {read:.1f} | {sizes[1]:,} |")
    lines += [
        "",
        "The texts are not part of this package; each stays under its own licence, and whoever passes the "
        "weights on should name them. The weights come under the package's licence.",
        "",
    ]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jaxllm.training.pico", description=__doc__)
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
