"""What made the models that ship: the recipe of pico, target, draft and companion.

    jaxllm train pico --data ../shared/data --stories stories.txt \\
        --out runs/target --checkpoint runs/target.ckpt --member target --steps 3000

Each member is a Llama-shaped decoder trained on plain text and on exercises (`exercises.py`), first on short
rows, then on longer ones, from weights that can already copy (`induction.py`). Blocks are trained by Muon
(Jordan et al., 2024, optax.contrib.muon), embeddings and norms by Adam. A draft or companion may learn from a
teacher as well (the Kullback-Leibler divergence to its next-token distribution, arXiv:1503.02531).

A killed run goes on from --checkpoint bit for bit. --out appears when the run ends: a Hugging Face
directory (bfloat16 safetensors in shards of at most 3.5 MB, tokenizer) with a model card, README.md,
written from what was really run.
"""

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
from jaxllm.training.pico.card import HISTORY, Run, card, command_line, history, times_read
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is told; each is an option of `jaxllm train pico` and means what its help says."""

    data: Path
    stories: Path | None = None
    out: Path
    checkpoint: Path | None = None
    member: str = "target"
    steps: int
    stop: int | None = None
    plan: str = "main"
    length: int = 256
    batch: int = 16
    accumulate: int = 1
    muon: float = 0.006
    adam: float = 0.0015
    warmup: int = 50
    seed: int = 1
    save_every: int = 100
    tokenizer: Path | None = None
    init: Path | None = None
    plain: bool = False
    teacher: Path | None = None
    note: str | None = None


def train_member(s: Settings, *, progress: bool = True) -> Run:
    """Trains a member and writes its directory `s.out`, whole or not at all; what was run.

    progress: draws a bar on stderr.

    Raises FileExistsError where `out` exists, ValueError where `init` is not of the member.
    """
    if s.out.exists():
        raise FileExistsError(f"pico: out must not exist yet, got out={s.out}")
    # 1 texts, tokenizer, batches
    config = MEMBERS[s.member]
    texts = corpus.read(s.data, s.stories)
    tokenizer = get_tokenizer(s.tokenizer or s.init or s.teacher or s.checkpoint, texts)
    if s.checkpoint:
        corpus.save_tokenizer(tokenizer, s.checkpoint, context=config.context)
    streams = {text.name: corpus.encode(tokenizer, text.train) for text in texts}
    plan = PLANS[s.plan](list(streams), s.length, s.batch)
    pad = tokenizer.token_to_id(corpus.PAD)
    words = Words.from_tokenizer(tokenizer)
    batches = corpus.Batches(streams, words, plan, steps=s.steps, seed=s.seed, pad=pad)
    sizes = ", ".join(f"{name} {len(stream):,}" for name, stream in streams.items())
    total = batches.tokens_before(s.steps)
    print(f"pico {s.member}: {sizes} tokens of text; {total:,} to train", file=sys.stderr)
    # 2 the model, and who teaches it
    model = load_model(s.init) if s.init else initial(config, s.seed, wired=not s.plain)
    if dataclasses.replace(model.config, stop_tokens=()) != config:
        raise ValueError(f"pico: init must be a {s.member}, got config={model.config}")
    params: Any = {"student": model, "teacher": load_model(s.teacher)} if s.teacher else model
    # 3 training
    trained = trainer.train(
        distil if s.teacher else cross_entropy,
        params,
        batches,
        optimizer=make_optimizer(s.steps, muon=s.muon, adam=s.adam, warmup=s.warmup),
        steps=min(s.stop or s.steps, s.steps),
        accumulate=s.accumulate,
        checkpoint=s.checkpoint / "steps" if s.checkpoint else None,
        save_every=s.save_every,
        trainable=student_only if s.teacher else None,
        progress=progress,
    )
    # 4 what was run, and the directory
    run = Run(
        command=command_line(s),
        date=datetime.date.today().isoformat(),
        jax=jax.__version__,
        device=f"{jax.devices()[0].device_kind}, {platform.machine()}",
        start=s.init.name if s.init else "random" if s.plain else "wired",
        teacher=s.teacher.name if s.teacher else None,
        note=s.note,
        seed=s.seed,
        steps=len(trained.losses),
        planned=s.steps,
        tokens=trained.tokens,
        seconds=round(trained.seconds, 1),
        loss=float(np.mean(trained.losses[-50:])),
        read=times_read(batches, len(trained.losses)),
        losses=[round(float(x), 4) for x in trained.losses],
    )
    runs = [*history(s.init), run]
    model = trained.params["student"] if s.teacher else trained.params
    s.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=s.out.parent, prefix=f"{s.out.name}.") as place:
        unfinished = Path(place) / s.out.name
        export(model, tokenizer, unfinished)
        losses = np.concatenate([r.losses for r in runs])
        trainer.plot_losses({s.member: losses}, unfinished / "loss.png", title=f"pico {s.member}")
        (unfinished / HISTORY).write_text(json.dumps({"runs": [dataclasses.asdict(r) for r in runs]}) + "\n")
        parameters = sum(x.size for x in jax.tree.leaves(model))
        (unfinished / "README.md").write_text(card(s.member, config, parameters, runs, texts, plan))
        unfinished.rename(s.out)
    return run
