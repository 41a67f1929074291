"""Many inputs in processes with a limit of memory and time, begun again where one ends them."""

import collections
import math
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

MORE_MEMORY = 1 << 30  # bytes of addresses where an allocation fails, before the machine's memory is gone
PATIENCE = 30  # seconds until a process that does not even notice its own alarm is ended
SLOW = {"native": 0.2, "native_of_0_1_0": 0.1}  # whole models by Orbax, 0.1 s and more each
OUTCOMES = ("refused", "equal", "opened", "traceback", "silent", "hang", "memory", "crash")


def work(name: str, folder: str, seeds: range, failures: str, pipe) -> None:
    """Sends (seed, outcome, what was said) of each input of a format; runs in a process of its own."""
    from fuzz.formats import FORMATS
    from fuzz.outcome import GOOD, outcome

    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  what Orbax prints besides raising
    os.dup2(sys.stderr.fileno(), 2)
    sample = FORMATS[name](Path(folder))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, resource.RLIM_INFINITY))
    pipe.send((None, "", ""))
    for seed in seeds:
        sample.restore()
        kind, said = outcome(sample, seed)
        if kind not in GOOD:
            shutil.copytree(sample.folder, Path(failures) / f"{name}-{seed}", dirs_exist_ok=True)
        pipe.send((seed, kind, said))


class Worker:
    """A process that makes and opens inputs of one format; begun again behind one that ends it."""

    def __init__(self, name: str, seeds: range, failures: Path):
        self.name, self.seeds, self.failures = name, seeds, failures
        self.start(seeds)

    def start(self, seeds: range) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe(duplex=False)
        self.folder, self.left, self.ready = tempfile.mkdtemp(prefix="fuzz"), seeds, False
        args = (self.name, self.folder, seeds, str(self.failures), end)
        self.process = context.Process(target=work, args=args)
        self.process.start()
        end.close()
        self.heard = time.monotonic()

    def results(self):
        """(seed, outcome, what was said) of inputs that are done by now."""
        try:
            while self.pipe.poll(0.2):
                seed, kind, said = self.pipe.recv()
                self.heard = time.monotonic()
                if seed is None:
                    self.ready = True
                    continue
                self.left = self.left[1:]
                yield seed, kind, said
        except EOFError:
            self.process.join()
        silent = time.monotonic() - self.heard > (PATIENCE if self.ready else 20 * PATIENCE)
        if self.left and (silent or not self.process.is_alive()):
            assert self.ready, f"the sample of {self.name} cannot be made"
            kind = "hang" if silent else "crash"
            seed = self.left[0]
            self.end()
            shutil.copytree(self.folder, self.failures / f"{self.name}-{seed}", dirs_exist_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)
            yield seed, kind, f"exit {self.process.exitcode}"
            if len(self.left) > 1:
                self.start(self.left[1:])
            else:
                self.left = self.left[1:]

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def run(names: list[str], inputs: int, seed: int, workers: int, failures: Path) -> dict[str, dict[str, int]]:
    """How many inputs of each format came to what; each format gets as many, a slow one part of that."""
    parts = {name: SLOW.get(name, 1.0) for name in names}
    share = {name: math.ceil(inputs * part / sum(parts.values())) for name, part in parts.items()}
    waiting = [(name, range(seed, seed + count)) for name, count in share.items() if count]
    counts: dict[str, collections.Counter] = {name: collections.Counter() for name in names}
    running: list[Worker] = []
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(Worker(*waiting.pop(0), failures))
        for worker in list(running):
            for number, kind, said in worker.results():
                counts[worker.name][kind] += 1
                if kind not in OUTCOMES[:3]:
                    print(f"{worker.name} {number}: {kind}: {said[:300]!r}", flush=True)
            if not worker.left:
                worker.process.join()
                shutil.rmtree(worker.folder, ignore_errors=True)
                running.remove(worker)
                print(f"{worker.name}: {dict(counts[worker.name])}", flush=True)
    return {name: dict(count) for name, count in counts.items()}
