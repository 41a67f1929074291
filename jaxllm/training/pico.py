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
    save(half, folder, fast, to="huggingface", max_shard_bytes=SHARD_BYTES)


def load_model(folder: str | Path) -> Decoder:
    """A float32 model of a Hugging Face directory."""
    from jaxllm.load import load

    return load(str(folder), dtype=jnp.float32)[0]


def card(facts: Mapping[str, Any], texts: Sequence[corpus.Text], parts: Sequence[Phase]) -> str:
    """The model card, from what was run."""
    config, trained = facts["config"], facts["trained"]
    lines = [
        f"# pico {facts['member']}",
        "",
        f"A Llama-shaped decoder of {facts['parameters']:,} parameters: {config.layers} layers, width "
        f"{config.width}, {config.heads} query and {config.kv_heads} key heads of {config.head_dim}, "
        f"feed-forward {config.ffn}, vocabulary {config.vocab}, context {config.context}. Made by jaxllm "
        "from scratch; small enough to ship, able to repeat and to recall, and not useful as an assistant.",
        "",
        "Made by",
        "",
        f"    {facts['command']}",
        "",
        f"on {facts['date']}, seed {facts['seed']}, jax {jax.__version__} ({facts['device']}): "
        f"{len(trained.losses)} steps, {trained.tokens:,} tokens, {trained.seconds / 3600:.2f} hours; "
        f"last loss {np.mean(trained.losses[-50:]):.3f} nats a token (exercises included).",
        *([f"Started from {facts['init']}."] if facts["init"] else []),
        *(["Its first two layers were wired as induction heads before training."] if facts["wired"] else []),
        *([f"Also taught by {facts['teacher']}."] if facts["teacher"] else []),
        "",
        "![loss](loss.png)",
        "",
        "| phase | share of steps | tokens a row | rows | mixture |",
        "|---|---|---|---|---|",
    ]
    for i, p in enumerate(parts):
        mix = ", ".join(f"{n} {w:.3f}" for n, w in p.mixture.items())
        lines.append(f"| {i + 1} | {p.fraction:.2f} | {p.length} | {p.rows} | {mix} |")
    lines += ["", "| text | licence | bytes trained on | bytes held out |", "|---|---|---|---|"]
    for t in texts:
        sizes = [sum(len(d.encode()) for d in part) for part in (t.train, t.held_out)]
        lines.append(f"| {t.name} | {t.licence} | {sizes[0]:,} | {sizes[1]:,} |")
    lines += [
        "",
        "repeat, recite, lookup and sums are exercises made by `jaxllm/training/exercises.py`. "
        "The texts themselves are not part of this package.",
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
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    out = Path(args.out)
    if out.exists():
        raise FileExistsError(f"pico: out must not exist yet, got out={out}")
    config = MEMBERS[args.member]
    texts = corpus.read(args.data, args.stories)
    kept = args.tokenizer or args.init or args.checkpoint
    tokenizer = get_tokenizer(kept, texts)
    if args.checkpoint:
        corpus.save_tokenizer(tokenizer, args.checkpoint, context=config.context)
    streams = {t.name: corpus.encode(tokenizer, t.train) for t in texts}
    plan = phases(list(streams), args.length, args.batch)
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
    params: Any = model
    loss, trainable = cross_entropy, None
    if args.teacher:
        params = {"student": model, "teacher": load_model(args.teacher)}
        loss, trainable = distil, student_only
    trained = trainer.train(
        loss,
        params,
        batches,
        optimizer=make_optimizer(args.steps, muon=args.muon, adam=args.adam, warmup=args.warmup),
        steps=args.steps,
        accumulate=args.accumulate,
        checkpoint=Path(args.checkpoint) / "steps" if args.checkpoint else None,
        save_every=args.save_every,
        trainable=trainable,
    )
    model = trained.params["student"] if args.teacher else trained.params
    facts = {
        "member": args.member,
        "config": config,
        "parameters": sum(x.size for x in jax.tree.leaves(model)),
        "command": shlex.join(["python", "-m", "jaxllm.training.pico", *(argv or sys.argv[1:])]),
        "date": datetime.date.today().isoformat(),
        "seed": args.seed,
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "init": args.init,
        "wired": not (args.init or args.plain),
        "teacher": args.teacher,
        "trained": trained,
    }
    partial = out.with_name(out.name + ".partial")
    export(model, tokenizer, partial)
    trainer.plot_losses({args.member: trained.losses}, partial / "loss.png", title=f"pico {args.member}")
    trainer.save_history(trained, partial / "history.json")
    (partial / "README.md").write_text(card(facts, texts, plan))
    partial.rename(out)
    print(json.dumps({"out": str(out), "steps": args.steps, "tokens": trained.tokens}))


if __name__ == "__main__":
    main()
