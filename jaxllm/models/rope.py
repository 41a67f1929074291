"""Rotary position embedding and its published ways of reaching past the trained length.

A head's vector is turned in planes (i, i + rotary/2) by position * frequency_i (Su et al., arXiv:2104.09864;
the pairing of halves is Hugging Face's; llama2.c's neighbouring pairs are permuted when converting).

    default    frequency_i = theta^(-2i / rotary)
    linear     all frequencies divided by `factor` (Chen et al., arXiv:2306.15595)
    llama3     low frequencies divided by `factor`, high ones kept, a ramp between (Llama 3.1's config)
    yarn       a ramp by number of turns, and attention scaled (Peng et al., arXiv:2309.00071)
    longrope   one divisor a plane, a short list and a long one (Ding et al., arXiv:2402.13753)

Which list of longrope's is chosen for each request of a batch, and once for all of its rows in a cache: by
how many tokens it may come to have. That is the end of the text where there is no cache, and what a cache was
prepared for where there is (`prefill(extent=)`, by default the model's context). `generate` without a given
cache chooses by the text so far and reads it again where it passes `original_context`, as Hugging Face does;
behind a given cache, or within a budget, there is no text to be read again, and the choice stays.

Letters: B batch, T tokens, R = rotary / 2 planes, H heads, E head size.
"""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """One rotation: base, which part of a head it turns, and how it is stretched."""

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    fraction: float = 1.0  # of the head size that is turned; the rest passes unchanged
    factor: float = 1.0
    original_context: int = 0  # the trained length: llama3, yarn, longrope
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: turns within the trained length above which a plane is kept
    beta_slow: float = 1.0  # yarn: turns below which it is interpolated
    truncate: bool = True  # yarn: round the ramp's ends to whole planes
    short_factors: tuple[float, ...] = ()  # longrope
    long_factors: tuple[float, ...] = ()  # longrope
    attention_factor: float = 1.0  # multiplies cos and sin: yarn, longrope

    def rotary(self, head_dim: int) -> int:
        """How many elements of a head are turned."""
        return int(head_dim * self.fraction)

    def check(self, head_dim: int) -> None:
        """Raises ValueError unless a head of this size can be turned so."""
        rotary = self.rotary(head_dim)
        if rotary < 2 or rotary % 2:
            raise ValueError(
                f"rope: an even part of a head must be turned, got {rotary} of {head_dim=}, {self.fraction=}"
            )
        if self.kind == "longrope":
            for factors in (self.short_factors, self.long_factors):
                if len(factors) != rotary // 2:
                    raise ValueError(
                        f"rope: longrope needs one factor a plane, got {len(factors)} for {rotary=}"
                    )

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians a position for each plane, [R], or [2, R] (short, long) for longrope; float64."""
        self.check(head_dim)
        rotary = self.rotary(head_dim)
        plane = np.arange(0, rotary, 2, dtype=np.float64)
        base = self.theta ** (-plane / rotary)
        match self.kind:
            case "default":
                return base
            case "linear":
                return base / self.factor
            case "llama3":
                turns = self.original_context * base / (2 * math.pi)
                kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
                kept = np.clip(kept, 0.0, 1.0)
                return base * (kept + (1 - kept) / self.factor)
            case "yarn":
                low, high = self._plane(self.beta_fast, rotary), self._plane(self.beta_slow, rotary)
                if self.truncate:
                    low, high = math.floor(low), math.ceil(high)
                low, high = max(low, 0), min(high, rotary - 1)
                ramp = np.arange(rotary // 2, dtype=np.float64) - low
                ramp = np.clip(ramp / max(high - low, 1e-3), 0.0, 1.0)
                return base * (1 - ramp + ramp / self.factor)
            case "longrope":
                return base / np.asarray([self.short_factors, self.long_factors], dtype=np.float64)
        raise ValueError(f"rope: unknown kind, got {self.kind=}")

    @property
    def switch(self) -> int | None:
        """The extent past which other factors turn all positions, also those before it; None: none is."""
        return self.original_context if self.kind == "longrope" else None

    def _plane(self, turns: float, rotary: int) -> float:
        """The plane (not rounded) that makes `turns` turns within the trained length."""
        span = math.log(self.original_context / (turns * 2 * math.pi))
        return rotary * span / (2 * math.log(self.theta))

    def angles(
        self, head_dim: int, positions: Int[Array, "B T"], extents: Int[Array, " B"]
    ) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
        """Cosines and sines for each position, float32, already scaled.

        extents: how many tokens each request may come to have; longrope reads its long list past
          `original_context`.
        """
        frequencies = jnp.asarray(self.frequencies(head_dim), jnp.float32)
        if self.kind == "longrope":
            frequencies = frequencies[(extents > self.original_context).astype(jnp.int32)]  # [B, R]
            frequencies = frequencies[:, None, :]
        else:
            frequencies = frequencies[None, None, :]
        angle = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angle) * self.attention_factor, jnp.sin(angle) * self.attention_factor


def ropes(config: Any) -> list[Rope]:
    """The rotations of a model's config; none where positions are not rotated."""
    found = [getattr(config, name, None) for name in ("rope", "local_rope")]
    return [rope for rope in found if rope is not None]


def rotate(
    x: Float[Array, "B T H E"], cos: Float[Array, "B T R"], sin: Float[Array, "B T R"]
) -> Float[Array, "B T H E"]:
    """`x` with its first 2R elements turned, computed in float32 and returned in `x`'s type."""
    half = cos.shape[-1]
    a = x[..., :half].astype(jnp.float32)
    b = x[..., half : 2 * half].astype(jnp.float32)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    if 2 * half == x.shape[-1]:
        return turned
    return jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)
