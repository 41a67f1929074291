"""Who says, step by step, at how much precision a model runs: by load, by latency, by bits that were read.

A model has levels, 0 the most precise: NestedFP's fp16 and fp8 (`nested.py`), DP-LLM's targets from the
highest down. A policy is a frozen value with pure functions on the host, and a state that goes through them:

    state = policy.start()
    level, state = policy.choose(state, load)                # before each step
    state = policy.observe(state, load, level, seconds)      # behind it

    TokenThreshold      cheap above so many tokens a step: NestedFP's rule (arXiv:2506.02024, section 5.4)
    LatencyObjective    the most precise level that is expected to keep an objective, with hysteresis
    BitsObjective       the target that brings the average of the bits that were read to where it should be

None looks at what a token is, so requests do not depend on their neighbours but through the level.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable


@dataclasses.dataclass(frozen=True)
class Load:
    """What a step is about to do, and what waits for it."""

    tokens: int  # that go through the model, prompts' and decoded ones
    context: int = 0  # rows of keys and values that they read
    queued: int = 0  # tokens of prompts that wait beyond this step
    waited: float = 0.0  # seconds, of the request that has waited longest for its first token
    bits: float | None = None  # a weight, read on average in the step before


Cost = Callable[[int, Load], float]  # (level, load) -> seconds of a step


@runtime_checkable
class Policy(Protocol):
    """What chooses a level for each step."""

    def start(self) -> Any:
        """The state before the first step."""
        ...

    def choose(self, state: Any, load: Load) -> tuple[int, Any]:
        """The level of a step, and the state that knows of it."""
        ...

    def observe(self, state: Any, load: Load, level: int, seconds: float) -> Any:
        """The state once the step has taken so long."""
        ...


@dataclasses.dataclass(frozen=True)
class Always:
    """One level, whatever comes."""

    level: int = 0

    def start(self) -> None:
        """Nothing is remembered."""

    def choose(self, state: None, load: Load) -> tuple[int, None]:
        """The level."""
        return self.level, None

    def observe(self, state: None, load: Load, level: int, seconds: float) -> None:
        """Nothing is remembered."""


@dataclasses.dataclass(frozen=True)
class TokenThreshold:
    """Level 1 where a step has more than so many tokens, else 0."""

    tokens: int = 1024

    def start(self) -> None:
        """Nothing is remembered."""

    def choose(self, state: None, load: Load) -> tuple[int, None]:
        """By the tokens of this step alone."""
        return int(load.tokens > self.tokens), None

    def observe(self, state: None, load: Load, level: int, seconds: float) -> None:
        """Nothing is remembered."""


@dataclasses.dataclass(frozen=True)
class Held:
    """The state of `LatencyObjective`."""

    level: int = 0
    calm: int = 0  # steps in a row in which a more precise level would have done
    drift: tuple[float, ...] = ()  # measured over expected seconds of each level, smoothed


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatencyObjective:
    """The most precise level whose next step is expected to keep the objectives.

    step: seconds that a step may take, which bounds the time between tokens. first: seconds until a first
    token, of which the wait so far and the work that is queued are taken off. cost: expected seconds of a
    step at a level; what is measured corrects it. levels: how many there are. A cheaper level is taken at
    once; a more precise one after `hold` steps in which it would have kept `margin` of the objectives.

    Raises ValueError where no level keeps `step` for one token.
    """

    step: float
    first: float
    cost: Cost
    levels: int = 2
    margin: float = 0.9
    hold: int = 8
    smoothing: float = 0.1

    def __post_init__(self):
        if not (0 < self.margin <= 1 and self.hold >= 0 and self.levels >= 1 and 0 < self.smoothing <= 1):
            got = f"{self.margin=}, {self.hold=}, {self.levels=}, {self.smoothing=}"
            raise ValueError(f"LatencyObjective: margin and smoothing must lie in (0, 1], got {got}")
        least = self.cost(self.levels - 1, Load(tokens=1))
        if not least <= self.step:
            raise ValueError(
                f"LatencyObjective: some level must keep step={self.step:g} s for one token, "
                f"got {least:g} s at the cheapest"
            )

    def start(self) -> Held:
        """At the most precise level, the costs believed."""
        return Held(drift=(1.0,) * self.levels)

    def choose(self, state: Held, load: Load) -> tuple[int, Held]:
        """Down at once, up after a while."""
        needed = next((n for n in range(self.levels) if self._keeps(state, n, load, 1.0)), self.levels - 1)
        if needed >= state.level:
            return needed, dataclasses.replace(state, level=needed, calm=0)
        better = next(
            n for n in range(state.level + 1) if n == state.level or self._keeps(state, n, load, self.margin)
        )
        calm = state.calm + 1 if better < state.level else 0
        level = better if calm > self.hold else state.level
        return level, dataclasses.replace(state, level=level, calm=0 if level < state.level else calm)

    def observe(self, state: Held, load: Load, level: int, seconds: float) -> Held:
        """What was expected meets what was measured."""
        drift = list(state.drift)
        drift[level] += self.smoothing * (seconds / self.cost(level, load) - drift[level])
        return dataclasses.replace(state, drift=tuple(drift))

    def _keeps(self, state: Held, level: int, load: Load, margin: float) -> bool:
        """Whether a level is expected to keep `margin` of both objectives."""
        seconds = self.cost(level, load) * state.drift[level]
        left = load.queued / load.tokens * seconds if load.tokens else 0.0  # at this step's speed
        late = load.waited + seconds + left if load.queued or load.waited else 0.0
        return seconds <= margin * self.step and late <= margin * self.first


@dataclasses.dataclass(frozen=True)
class BitsHeld:
    """The state of `BitsObjective`."""

    owed: float = 0.0  # the sum of what steps read too few
    steps: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitsObjective:
    """The level whose bits, with what is owed from the steps before, come nearest to an average.

    bits: wanted a weight, on average over steps, anything between the targets. targets: bits of each level,
    level 0 the highest. gain: the share of what is owed that one step makes good.

    What a text reads drifts from the target that thresholds were set for; what was read (`Load.bits`) is
    summed up and paid back, so that the average over many steps is the one that is wanted.
    """

    bits: float
    targets: tuple[float, ...]
    gain: float = 0.5

    def __post_init__(self):
        if list(self.targets) != sorted(self.targets, reverse=True) or not self.targets:
            raise ValueError(f"BitsObjective: targets must descend, got {self.targets}")
        if not self.targets[-1] <= self.bits <= self.targets[0]:
            raise ValueError(
                f"BitsObjective: bits must lie within {self.targets[-1]:g} to {self.targets[0]:g}, "
                f"got {self.bits}"
            )
        if not 0 < self.gain <= 1:
            raise ValueError(f"BitsObjective: gain must lie in (0, 1], got {self.gain}")

    def start(self) -> BitsHeld:
        """Nothing is owed."""
        return BitsHeld()

    def choose(self, state: BitsHeld, load: Load) -> tuple[int, BitsHeld]:
        """The nearest target to what is wanted now."""
        if load.bits is not None:
            state = BitsHeld(state.owed + self.bits - load.bits, state.steps + 1)
        wanted = self.bits + self.gain * state.owed
        return min(range(len(self.targets)), key=lambda n: abs(self.targets[n] - wanted)), state

    def observe(self, state: BitsHeld, load: Load, level: int, seconds: float) -> BitsHeld:
        """Time says nothing about bits."""
        return state
