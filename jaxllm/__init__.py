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
from jaxllm.quant.any_precision import AnyPrecision, read_at
from jaxllm.quant.awq import Awq
from jaxllm.quant.calibrate import Calibration, calibrate
from jaxllm.quant.dash_q import DashQ
from jaxllm.quant.dec_dec import DecDec
from jaxllm.quant.gptq import Gptq
from jaxllm.quant.lnq import Lnq
from jaxllm.quant.mixed_two_bit import MixedTwoBit
from jaxllm.quant.nested_fp import NestedFp
from jaxllm.quant.quantize import quantize
from jaxllm.quant.rotate import Rotate
from jaxllm.quant.rtn import Rtn
from jaxllm.quant.sensitivity import sensitivity, spend
from jaxllm.quant.squeeze_llm import SqueezeLlm
from jaxllm.quant.stages import text_sequences
from jaxllm.sharding import make_mesh, shard

__version__ = "0.1.0"

__all__ = [
    "AnyPrecision",
    "Awq",
    "Calibration",
    "Completion",
    "DashQ",
    "DecDec",
    "Gptq",
    "Lnq",
    "MixedTwoBit",
    "NestedFp",
    "Rotate",
    "Rtn",
    "Sampler",
    "SqueezeLlm",
    "Token",
    "cache",
    "calibrate",
    "chat",
    "generate",
    "load",
    "make_mesh",
    "perplexity",
    "quantize",
    "read_at",
    "report_bytes",
    "save",
    "score_choices",
    "sensitivity",
    "shard",
    "spend",
    "stream",
    "text_sequences",
]
