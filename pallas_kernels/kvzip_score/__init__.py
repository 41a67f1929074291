"""How much attention keys receive from many queries: the score of KVzip, without a matrix of weights.

Kim et al., arXiv:2505.23416, section 3: a key's score is the greatest softmax weight that any query of its
chunk's repetition gives it. A kernel goes over the scores twice: first for the greatest score and the sum of
each query, then for the greatest weight (or the sum of weights) of each key. Weights [H, T, S] are never in
memory, only tiles of them in registers.

    reference   what it means, in jnp
    triton      two kernels for sm_80 and up
    mosaic_gpu  two for Hopper
    cases       real shapes

Letters: B requests, T queries, H query heads, K key heads, G = H / K, J = B K, S keys, E head size.
"""

import functools
from typing import Any, Literal

from jaxtyping import Array, Bool, Float

from pallas_kernels import choice
from pallas_kernels.choice import Implementation, Kernel
from pallas_kernels.kvzip_score import mosaic_gpu, reference, triton


def attention_per_key(
    q: Float[Array, "B T H E"],
    k: Float[Array, "J S E"],
    seen: Bool[Array, "B T S"],
    sinks: Float[Array, " H"] | None = None,
    share: Float[Array, "B T"] | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    reduce: Literal["max", "sum"] = "max",
    implementation: Implementation | None = None,
) -> Float[Array, "B K G S"]:
    """The greatest weight, or the sum of weights, that each key is given by any query, in float32.

    seen: which keys a query sees; the last T keys are the queries' own, of which later ones must be hidden.
      A query that sees none gives nothing.
    sinks: a score of each query head that takes its share of the weights. softcap: scores are bent to it by
      cap * tanh(score / cap). share: weights of each query count so much (1 if None).

    Raises ValueError where shapes do not go together.
    """
    (B, T, H, _), (J, S, _) = q.shape, k.shape
    if J % B or H * B % J or S < T:
        raise ValueError(
            "attention_per_key: J = B K blocks of S >= T keys must serve H heads, got "
            f"{B=}, {T=}, {H=}, {J=}, {S=}"
        )
    rule: dict[str, Any] = {"scale": scale, "softcap": softcap, "reduce": reduce}
    return choice.run(
        "attention_per_key",
        (q, k, seen, sinks, share),
        reference=functools.partial(reference.attention_per_key, **rule),
        backends=(
            Kernel("triton", functools.partial(triton.attention_per_key, **rule), triton.why_not),
            Kernel(
                "mosaic_gpu",
                functools.partial(mosaic_gpu.attention_per_key, **rule),
                mosaic_gpu.why_not,
                capability=(9, 0),
                below=(10, 0),
            ),
        ),
        implementation=implementation,
    )
