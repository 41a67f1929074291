"""The public names, loaded when they are first used (`lazy_loader`)."""

import contextlib

from . import cache, eviction, precision
from .decoding.drafts import LookupDraft, first_layers
from .decoding.generate import Token, chat, generate, stream
from .decoding.options import CacheOptions, GenerationOptions
from .decoding.prefill import prefill, prefill_with_scores, prefill_within_budget
from .decoding.run import Completion, Timings
from .decoding.sampling import Sampler
from .decoding.speculation import Speculated, Speculation
from .files import load, save
from .measure import perplexity, report_bytes, score_choices
from .precision.attach import attach_precision
from .precision.dp_llm import DpLlm
from .quant.calibrate import Calibration, calibrate
from .quant.dec_dec_tuner import tune_dec_dec
from .quant.methods.any_precision import AnyPrecision
from .quant.methods.awq import Awq
from .quant.methods.dash_q import DashQ
from .quant.methods.dec_dec import DecDec
from .quant.methods.gptq import Gptq
from .quant.methods.lnq import Lnq
from .quant.methods.mixed_two_bit import MixedTwoBit
from .quant.methods.nested_fp import NestedFp
from .quant.methods.rotate import Rotate
from .quant.methods.rtn import Rtn
from .quant.methods.squeeze_llm import SqueezeLlm
from .quant.quantize import quantize
from .quant.sensitivity import allocate_bits, sensitivity
from .quant.text import text_sequences
from .sharding import make_mesh, shard
from .weights.planes.bit_planes import read_at

__version__: str

def kernels(implementation: str, *, interpret: bool = False) -> contextlib.AbstractContextManager[object]: ...

__all__ = [
    "AnyPrecision",
    "Awq",
    "CacheOptions",
    "Calibration",
    "Completion",
    "DashQ",
    "DecDec",
    "DpLlm",
    "GenerationOptions",
    "Gptq",
    "Lnq",
    "LookupDraft",
    "MixedTwoBit",
    "NestedFp",
    "Rotate",
    "Rtn",
    "Sampler",
    "Speculated",
    "Speculation",
    "SqueezeLlm",
    "Timings",
    "Token",
    "allocate_bits",
    "attach_precision",
    "cache",
    "calibrate",
    "chat",
    "eviction",
    "first_layers",
    "generate",
    "kernels",
    "load",
    "make_mesh",
    "perplexity",
    "precision",
    "prefill",
    "prefill_with_scores",
    "prefill_within_budget",
    "quantize",
    "read_at",
    "report_bytes",
    "save",
    "score_choices",
    "sensitivity",
    "shard",
    "stream",
    "text_sequences",
    "tune_dec_dec",
]
