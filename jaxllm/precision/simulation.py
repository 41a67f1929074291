"""A trace of requests through a simulated engine, to see what a policy of precision does to latency.

    result = replay(requests, policy, cost)         # cost(level, load): seconds of a step

The engine batches continuously: a step has one token of every request that decodes, up to `batch` of them,
and pieces of prompts, oldest first, up to `tokens` in all. Nothing is computed: what a step costs is said
by `cost`. A request is within its objectives when its first token came within `first` seconds of its
arrival and the mean time between its tokens was at most `step`.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxllm.precision.policy import Cost, Load, Policy


class Request(NamedTuple):
    """One line of a trace."""

    arrival: float  # seconds
    prompt: int  # tokens
    new: int


@dataclasses.dataclass(frozen=True)
class Replayed:
    """What became of a trace."""

    first: np.ndarray  # seconds from arrival to the first token, of each request
    between: np.ndarray  # mean seconds between its tokens, 0 where it has one
    levels: np.ndarray  # how many steps ran at each level
    tokens: np.ndarray  # how many tokens they had
    seconds: float  # when the last request ended

    def within(self, *, first: float, step: float) -> float:
        """The share of requests within both objectives."""
        return float(((self.first <= first) & (self.between <= step)).mean())


@dataclasses.dataclass
class _Running:
    """A request in the engine."""

    index: int
    left: int  # tokens of its prompt that are not read
    context: int
    made: int = 0
    began: float = 0.0  # when its first token came


def replay(
    requests: Sequence[Request],
    policy: Policy,
    cost: Cost,
    *,
    levels: int = 2,
    batch: int = 256,
    tokens: int = 2048,
) -> Replayed:
    """What becomes of requests, in the order of their arrival.

    batch: requests in the engine at once. tokens: of a step, at most.
    """
    if list(requests) != sorted(requests, key=lambda r: r.arrival) or not requests:
        raise ValueError(
            f"replay: requests must be in the order of arrival, at least one, got {len(requests)}"
        )
    if min(min(r.prompt, r.new) for r in requests) < 1 or not 1 <= batch <= tokens:
        raise ValueError(f"replay: prompts and outputs must have a token, 1 <= batch <= tokens, got {batch=}")
    first, between = np.zeros(len(requests)), np.zeros(len(requests))
    steps, moved = np.zeros(levels, np.int64), np.zeros(levels, np.int64)
    waiting: collections.deque[int] = collections.deque()
    running: list[_Running] = []
    now, coming, queued, state = 0.0, 0, 0, policy.start()
    while coming < len(requests) or waiting or running:
        # 1. Who has come by now, and who is let in.
        if not waiting and not running:
            now = max(now, requests[coming].arrival)
        while coming < len(requests) and requests[coming].arrival <= now:
            waiting.append(coming)
            queued += requests[coming].prompt
            coming += 1
        while waiting and len(running) < batch:
            index = waiting.popleft()
            running.append(_Running(index, requests[index].prompt, 0))
        # 2. A token of each that decodes, then pieces of prompts.
        decoding = [r for r in running if not r.left]
        room, pieces = tokens - len(decoding), []
        for r in (r for r in running if r.left):
            piece = min(room, r.left)
            if not piece:
                break
            pieces.append((r, piece))
            room -= piece
        size, read = tokens - room, sum(piece for _, piece in pieces)
        behind = [r.index for r in running if r.left] or list(waiting)[:1]
        oldest = requests[behind[0]].arrival if behind else now
        context = sum(r.context for r in decoding) + sum(r.context + piece for r, piece in pieces)
        load = Load(tokens=size, context=context, queued=queued - read, waited=now - oldest)
        # 3. The step, at the level that the policy chooses.
        level, state = policy.choose(state, load)
        seconds = cost(level, load)
        state = policy.observe(state, load, level, seconds)
        now, queued = now + seconds, queued - read
        steps[level] += 1
        moved[level] += size
        # 4. What it gave: a token to each that decodes, and to each whose prompt is read.
        for r, piece in pieces:
            r.left -= piece
            r.context += piece
        for r in (*decoding, *(r for r, _ in pieces if not r.left)):
            r.made += 1
            r.context += 1
            if r.made == 1:
                r.began, first[r.index] = now, now - requests[r.index].arrival
        for r in (r for r in running if r.made == requests[r.index].new and r.made > 1):
            between[r.index] = (now - r.began) / (r.made - 1)
        running = [r for r in running if r.made < requests[r.index].new]
    return Replayed(first, between, steps, moved, now)
