"""Published systems for running large models cheaply, as functions on JAX pytrees.

import jaxllm as jl

model, tokenizer = jl.load()
print(jl.generate(model, tokenizer, ["Once upon a time"])[0].text)
"""

from jaxllm import cache
from jaxllm.decoding.generate import Completion, Token, chat, generate, stream
from jaxllm.decoding.sampling import Sampler
from jaxllm.load import load, save
from jaxllm.measure import perplexity, report_bytes, score_choices
from jaxllm.sharding import make_mesh, shard

__version__ = "0.1.0"

__all__ = [
    "Completion",
    "Sampler",
    "Token",
    "cache",
    "chat",
    "generate",
    "load",
    "make_mesh",
    "perplexity",
    "report_bytes",
    "save",
    "score_choices",
    "shard",
    "stream",
]
