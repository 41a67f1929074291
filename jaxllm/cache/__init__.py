"""Keys and values kept between steps. A cache knows its own layout; models only append and attend.

cache = append(cache, layer, k, v, lengths)    rows of one layer, written in place when donated
out = attend(q, cache, layer, positions, ...)  queries against all that the layer holds
cache = advance(cache, lengths)                once a chunk, after its last layer
cache = truncate(cache, lengths)               forget the newest rows, per request
cache = select(cache, rows)                    other requests in another order (fork, beams, tree paths)
k, v = kept(cache, layer, k, v)                a chunk as it will be read back: for one that sees itself only
num_bytes(cache)                               bytes really held
"""

from jaxllm.cache import dense, quantized
from jaxllm.cache.dense import (
    DenseCache,
    advance,
    append,
    attend,
    kept,
    num_bytes,
    select,
    truncate,
)
from jaxllm.cache.quantized import CodedRows

__all__ = [
    "CodedRows",
    "DenseCache",
    "advance",
    "append",
    "attend",
    "dense",
    "kept",
    "num_bytes",
    "quantized",
    "select",
    "truncate",
]
