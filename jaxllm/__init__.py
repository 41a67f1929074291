"""Fifteen published systems for running large models cheaply, as functions on JAX pytrees.

import jaxllm as jl

model, tokenizer = jl.load()
print(jl.generate(model, tokenizer, ["Once upon a time"])[0].text)
"""

from jaxllm.decoding.generate import Completion, Token, chat, generate, stream
from jaxllm.decoding.sampling import Sampler

__all__ = ["Completion", "Sampler", "Token", "chat", "generate", "stream"]
