"""What a model's linear layers see on sample text, measured layer by layer and kept on disk.

    stats = calibrate(model, tokens, want={"hessian"})       # tokens [S, T], or rows of different lengths
    stats["layers.0.attention.q"].hessian                    # one layer's, read when asked for

Text goes through the model one block at a time (`stages.py`): all sequences through block 0, whose sums are
finished and written, then through block 1. So no more than one block's statistics are in memory, and what its
linears read and give of one batch, beside the model and the hidden states (S x T x width, on the host).
Statistics that need the loss ("guided_hessian",
"fisher") take one pass backwards before, block by block as well: of each linear's outputs only the mean
square of the gradient per token and group is kept (arXiv:2505.07004, Algorithm 1), and the squared gradients
of weights ("fisher") are summed in files. Linears that read the same input (q, k and v) share one copy of
what depends on it alone.

What each statistic is: `statistics.py`. Sums are float32 at highest matmul precision. Letters: S sequences, T
tokens, K inputs, N outputs, g groups of consecutive outputs.
"""

import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from tqdm import tqdm

from jaxllm.quant.gradients import gradients, weight_gradients
from jaxllm.quant.stages import LinearInfo, by_full_name, linears_by_block
from jaxllm.quant.statistics import STATISTICS, Stats
from jaxllm.quant.sums import OF_OUTPUT, StatsAccumulator, warn_of_few
from jaxllm.quant.text import Text
from jaxllm.storage import checksums, former_names
from jaxllm.storage.arrays import read_npz, write_npz
from jaxllm.storage.directory import one_line_for_a_full_disk
from jaxllm.storage.fingerprint import fingerprint, fingerprint_of_first_numbers
from jaxllm.storage.metadata import excerpt, is_file_name, one_line, read_meta, write_meta

META, FORMAT, VERSION = "calibration.json", "jaxllm calibration", 3  # with checksums
FINGERPRINTS = {1: fingerprint_of_first_numbers, 2: fingerprint, VERSION: fingerprint}  # by the version


class Calibration(Mapping[str, Stats]):
    """Statistics by the linear's name ("layers.0.attention.q"), in a directory; read one at a time."""

    def __init__(self, path: str | Path, *, temporary: bool = False):
        self.path = Path(path)
        meta = read_meta("calibration", self.path / META, FORMAT, *FINGERPRINTS, older=_names_of_today)
        self._version = meta["version"]
        self._checked = self._version >= VERSION or checksums.is_covered(self.path)
        if self._checked:
            checksums.verify_file("calibration", self.path, META)
        _check_entries(meta)
        self.want, self._fingerprint, self.text = frozenset(meta["want"]), meta["fingerprint"], meta["text"]
        self.output_groups, self._inputs, self._tokens = meta["output_groups"], meta["inputs"], meta["tokens"]
        if temporary:  # the directory goes with the handle
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def is_of(self, model) -> bool:
        """Whether this model was measured."""
        return self._fingerprint == FINGERPRINTS[self._version](model)

    def __getitem__(self, name: str) -> Stats:
        found: dict[str, Any] = {}
        tokens = self._tokens[name]
        listed = checksums.names("calibration", self.path) if self._checked else ()
        for file in (f"{self._inputs[name]}.in.npz", f"{name}.out.npz"):
            if file in listed or (self.path / file).is_file():
                if self._checked:
                    checksums.verify_file("calibration", self.path, file)
                try:
                    arrays = read_npz(self.path / file)
                except ValueError as error:
                    raise ValueError(f"calibration: {str(self.path)!r}: {one_line(error)}") from error
                found |= {key: jnp.asarray(arrays[key]) for key in arrays if key != "tokens"}
                tokens = int(arrays.get("tokens", tokens))  # an expert's
        if not found.keys() <= frozenset(STATISTICS):
            raise ValueError(f"calibration: files must hold statistics, got {', '.join(found)} of {name}")
        return Stats(**found, tokens=tokens)

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)


def calibrate(
    model,
    sequences: Any,
    *,
    want: Iterable[str],
    path: str | Path | None = None,
    output_groups: int = 1,
    batch: int = 8,
    sample: int = 512,
    progress: bool = True,
) -> Calibration:
    """Measures what `want` names (`statistics.STATISTICS`) for every linear of the model's blocks.

    sequences: token ids, [S, T] or rows of different lengths, each at most the model's context; for a T5,
      pairs of a source's and a target's, as it is trained on (`T5` puts `decoder_start` in front itself).
    path: a directory for the results, kept; a run that was stopped goes on after the last finished block
      when called again with the same arguments. None: a temporary one that goes with the handle.
    output_groups: of consecutive outputs, for "guided_hessian"; must divide every linear's N.
    batch: sequences that go through the model at once. sample: rows kept for "sample".

    Of a linear of experts each has its own: "layers.0.mlp.up.3" is of the tokens that went to expert 3. One
    that none went to has the statistics of all experts together.

    Warns where fewer tokens were seen than a Hessian has columns, and names experts that saw so few. Raises
    ValueError for no text, or for a directory that another model, text or wish has begun; OSError in one line
    when the disk is full.
    """
    want = frozenset(want)
    if not want or want - frozenset(STATISTICS):
        raise ValueError(f"calibrate: want must name some of {', '.join(STATISTICS)}, got {sorted(want)}")
    text = Text.from_sequences(model, sequences, batch)
    blocks = linears_by_block(model)
    linears = by_full_name(blocks)
    check(linears, want, output_groups, text)
    meta = {
        "text": text.digest(),
        "want": sorted(want),
        "output_groups": output_groups,
        "sample": sample,
        "tokens": {name: text.counts[linear.side] for name, linear in linears.items()},
        "inputs": {name: linear.source for name, linear in linears.items()},
    }
    bar = partial(tqdm, disable=not progress, file=sys.stderr)
    if path is not None:
        with one_line_for_a_full_disk("calibrate", Path(path)):
            _fill(Path(path), model, blocks, text, meta, bar)
        return Calibration(path)
    folder = Path(tempfile.mkdtemp())
    try:
        with one_line_for_a_full_disk("calibrate", folder):
            _fill(folder, model, blocks, text, meta, bar)
        return Calibration(folder, temporary=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _fill(
    folder: Path,
    model,
    blocks: dict[str, dict[str, LinearInfo]],
    text: Text,
    meta: dict[str, Any],
    bar,
) -> None:
    """Measures block by block what the directory does not hold yet."""
    version = _claim(folder, meta, model)
    if version is None:
        return
    checked = version >= VERSION
    want = frozenset(meta["want"])
    if want & OF_OUTPUT:
        gradients(model, blocks, text, folder, output_groups=meta["output_groups"], want=want, bar=bar)
    states = text.initial_states()
    few: dict[str, tuple[int, int]] = {}
    for stage in bar(model.stages(), desc="calibrate", unit="block"):
        prefix = stage.name
        if not prefix or (folder / f"{prefix}.done").is_file():
            states = text.run(stage, states)
            continue
        sums = StatsAccumulator(blocks[prefix], want, meta["sample"])
        states = sums.update(stage.loaded(), text, states, folder)
        few |= {f"{prefix}.{name}": count for name, count in sums.few().items()}
        for name, linear in blocks[prefix].items():
            arrays = sums.arrays(name, linear) | weight_gradients(folder, f"{prefix}.{name}")
            for end, keys in (("in", arrays.keys() - OF_OUTPUT), ("out", arrays.keys() & OF_OUTPUT)):
                if keys:
                    some = {key: arrays[key] for key in keys}
                    write_npz(folder, f"{prefix}.{name}.{end}.npz", some, checked=checked)
        (folder / f"{prefix}.done").touch()
    warn_of_few(few)
    for file in folder.glob("*.done"):
        file.unlink()
    shutil.rmtree(folder / "gradients", ignore_errors=True)
    if checked:
        checksums.add(folder, folder / f"{META}.begun", META)
    (folder / f"{META}.begun").replace(folder / META)


def check(linears: dict[str, LinearInfo], want: frozenset[str], output_groups: int, text: Text) -> None:
    """Raises ValueError for groups that do not divide, warns of too little text."""
    uneven = [name for name, linear in linears.items() if output_groups < 1 or linear.N % output_groups]
    if "guided_hessian" in want and uneven:
        N = linears[uneven[0]].N
        raise ValueError(
            f"calibrate: output_groups must divide the outputs of {uneven[0]}, got {output_groups=}, {N=}"
        )
    short = [n for n, one in linears.items() if one.expert is None and text.counts[one.side] < one.K]
    if short and want & {"hessian", "guided_hessian"}:
        names = ", ".join(short[:3]) + (", ..." if short[3:] else "")
        tokens = text.counts[linears[short[0]].side]
        warnings.warn(
            f"calibrate: a Hessian should see more tokens than it has columns, got {tokens} for {names}",
            stacklevel=3,
        )


def _claim(folder: Path, meta: dict[str, Any], model) -> int | None:
    """The version that the directory was begun as, None when it is complete.

    Raises ValueError when it belongs to another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (META, f"{META}.begun"):
        if (folder / name).is_file():
            begun = read_meta("calibrate", folder / name, FORMAT, *FINGERPRINTS, older=_names_of_today)
            version = begun["version"]
            whole = {"format": FORMAT, "version": version, "fingerprint": FINGERPRINTS[version](model)} | meta
            if begun != whole:
                raise ValueError(
                    "calibrate: path must be new or hold the same model, text and wishes, "
                    f"got path={str(folder)!r}"
                )
            return None if name == META else version
    if any(folder.iterdir()):
        raise ValueError(f"calibrate: path must be new or empty, got path={str(folder)!r}")
    write_meta(folder / f"{META}.begun", FORMAT, VERSION, {"fingerprint": fingerprint(model)} | meta)
    return VERSION


def _check_entries(meta: dict[str, Any]) -> None:
    """Raises ValueError unless calibration.json has the entries that are read, each of its type."""
    kinds = {"fingerprint": str, "text": str, "want": list, "output_groups": int}
    for name, kind in (kinds | {"inputs": dict, "tokens": dict}).items():
        if type(meta.get(name)) is not kind:
            raise ValueError(f"calibration: {META} must have {name}, a JSON {kind.__name__}")
    if not all(isinstance(name, str) for name in meta["want"]):
        got = excerpt(meta["want"])
        raise ValueError(f"calibration: {META} must name what was measured, got want={got}")
    for name, source in meta["inputs"].items():
        if not (is_file_name(name) and is_file_name(source)) or type(meta["tokens"].get(name)) is not int:
            raise ValueError(f"calibration: {META} must say inputs and tokens, not so of {excerpt(name)}")


def _names_of_today(meta: Any) -> Any:
    """What an earlier version wrote: 0.1.0 neither format nor version, and both other names of options."""
    if not isinstance(meta, dict):
        return meta
    meta = meta if "version" in meta else {"format": FORMAT, "version": 1} | meta
    return former_names.options(meta.items())
