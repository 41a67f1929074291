"""Where statistics come from: nowhere, a finished calibration, or text.

    source = CalibrationStream(model, {"layers.0.mlp.up": frozenset({"hessian"}), ...}, tokens)
    for block, stats in source.blocks(): ...                    # stats: {"layers.0.mlp.up": Stats, ...}

Text goes through the blocks as they come, so only one block's statistics are in memory at a time.
"""

import dataclasses
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxllm.models.linears import block_of, replace_weights
from jaxllm.quant import calibrate as measure
from jaxllm.quant import gradients
from jaxllm.quant.calibrate import Calibration
from jaxllm.quant.stages import by_full_name, linears_by_block
from jaxllm.quant.statistics import Stats
from jaxllm.quant.sums import OF_OUTPUT, StatsAccumulator, warn_of_few
from jaxllm.quant.text import Text


class CalibrationStream:
    """Statistics by block, of linears and what is wanted of each.

    wanted: by the linear's name, an expert's own, names in `statistics.STATISTICS`, or none.
    output_groups: of guided Hessians. desc: what the bar says.
    sequences, sequential, batch, sample, progress: as for `quantize`.
    Raises ValueError for statistics that are missing, impossible, or another model's.
    """

    def __init__(
        self,
        model,
        wanted: Mapping[str, frozenset[str]],
        sequences: Any,
        *,
        output_groups: int = 1,
        sequential: bool = False,
        batch: int = 8,
        sample: int = 512,
        progress: bool = True,
        desc: str = "quantize",
    ):
        self.model, self.names, self.sequential, self.sample = model, list(wanted), sequential, sample
        self.want, self.output_groups = frozenset[str]().union(*wanted.values()), output_groups
        bar = partial(tqdm, disable=not progress, file=sys.stderr)
        self.bar = partial(bar, desc=desc, unit="block")
        self.given = sequences if isinstance(sequences, Calibration) else None
        self.text: Text | None = None
        self.folder = Path()
        if not self.want:
            return
        calibrated = [name for name, names in wanted.items() if names]
        self.linears = linears_by_block(model)
        linears = by_full_name(self.linears)
        outside = [name for name in calibrated if name not in linears]
        if outside:
            raise ValueError(f"quantize: only linears of blocks are calibrated, got {outside[0]}")
        if sequences is None:
            raise ValueError(f"quantize: {', '.join(sorted(self.want))} need calibration text, got none")
        if self.given is not None:
            self._check(self.given)
            return
        self.text = Text.from_sequences(model, sequences, batch)
        asked_of = {name: linears[name] for name in calibrated}
        measure.check(asked_of, self.want, self.output_groups, self.text)
        self.folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        if self.want & OF_OUTPUT:
            gradients.gradients(
                model,
                self.linears,
                self.text,
                self.folder,
                output_groups=self.output_groups,
                want=self.want,
                bar=bar,
            )

    def identity(self) -> list[Any]:
        """What tells these statistics from another text's: the text, and how it goes through."""
        text = None if self.text is None else self.text.digest()
        given = None if self.given is None else self.given.text
        return [text, given, self.sequential, self.sample]

    def _check(self, given: Calibration) -> None:
        missing = self.want - given.want
        if missing:
            raise ValueError(f"quantize: the calibration must hold {', '.join(sorted(missing))}")
        if not given.is_of(self.model):
            raise ValueError("quantize: the calibration must be of this model, got another's")
        if "guided_hessian" in self.want and given.output_groups != self.output_groups:
            raise ValueError(
                f"quantize: output_groups must be the calibration's {given.output_groups}, "
                f"got {self.output_groups}"
            )
        if self.sequential:
            raise ValueError("quantize: sequential needs text, got a finished calibration")

    def blocks(
        self, done: Mapping[str, Any] | None = None, skip: Callable[[str], bool] = lambda block: False
    ) -> Iterator[tuple[str, dict[str, Stats]]]:
        """Each block's name and the statistics of its linears, in the model's order.

        done: where the consumer puts each block's new weights by name, before it asks for the next block;
          a sequential source lets the text go on through them. skip: blocks that need no statistics.
        """
        prefixes = list(dict.fromkeys(map(block_of, self.names)))
        if self.text is None:
            for prefix in self.bar(prefixes):
                yield prefix, {name: self._known(name) for name in self.names if block_of(name) == prefix}
            return
        chain = self.model.stages()
        for prefix in prefixes:  # embeddings and the head, which nothing is measured for
            if all(prefix != stage.name for stage in chain):
                yield prefix, {}
        states = self.text.initial_states()
        few: dict[str, tuple[int, int]] = {}
        for stage in self.bar(chain):
            prefix, after = stage.name, states
            if not prefix:
                states = self.text.run(stage, states)
                continue
            stage = stage.loaded()
            if skip(prefix):
                if not self.sequential:
                    after = self.text.run(stage, states)
                yield prefix, {}
            else:
                sums = StatsAccumulator(self.linears[prefix], self.want, self.sample)
                after = sums.update(stage, self.text, states, self.folder)
                few |= {f"{prefix}.{n}": c for n, c in sums.few().items()}
                yield prefix, sums.stats(prefix, self.folder)
                del sums
            if self.sequential:
                new = done or {}
                own = {n.removeprefix(prefix + "."): w for n, w in new.items() if block_of(n) == prefix}
                quantized = dataclasses.replace(stage, block=replace_weights(stage.block, own))
                after = self.text.run(quantized, states)
            states = after
        warn_of_few(few)

    def _known(self, name: str) -> Stats:
        return Stats() if self.given is None or name not in self.given else self.given[name]
