"""The quantization methods, by the names that the command line and recipes give them.

Methods see rows [N, K] and statistics, and nothing of a model.

    rtn              round to nearest, with a search of the range
    gptq             GPTQ: column by column with feedback; also guided
    awq              AWQ: inputs scaled by their activations
    squeeze_llm      SqueezeLLM: weighted k-means, a table an output
    any_precision    Any-Precision: bit planes read at any width
    lnq              LNQ and GuidedQuant: codebooks by descent on a Hessian
    dash_q           DASH-Q: weighted least squares by group
    mixed_two_bit    2/4/16-bit in one matrix
    two_bit_fit      its columns' zeros, steps and scales
    nested_fp        NestedFP: float16 whose upper byte is a float8
    dec_dec          DecDEC: a base, and residual rows from host memory
    rotate           inputs rotated, weights and activations in 4 or 8 bits
    outliers         weights that no table has to serve, kept apart
    curvature        what Hessians and Fisher information give a solver
    k_means          weighted k-means on a line
"""

import dataclasses

from jaxllm.quant.methods.any_precision import AnyPrecision
from jaxllm.quant.methods.awq import Awq
from jaxllm.quant.methods.dash_q import DashQ
from jaxllm.quant.methods.dec_dec import DecDec
from jaxllm.quant.methods.gptq import Gptq
from jaxllm.quant.methods.lnq import Lnq
from jaxllm.quant.methods.mixed_two_bit import MixedTwoBit
from jaxllm.quant.methods.nested_fp import NestedFp
from jaxllm.quant.methods.rotate import Rotate
from jaxllm.quant.methods.rtn import Rtn
from jaxllm.quant.methods.squeeze_llm import SqueezeLlm


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method, and what is said of it in a list."""

    make: type
    bits: str
    exactness: str
    about: str


METHODS = {
    "rtn": Entry(Rtn, "1-8", "lossy", "round to nearest between each group's ends"),
    "gptq": Entry(Gptq, "1-8", "lossy", "column by column, errors made good in later columns"),
    "awq": Entry(Awq, "1-8", "lossy", "inputs scaled by their activations, then rounded"),
    "squeeze-llm": Entry(SqueezeLlm, "1-8", "lossy", "Fisher-weighted k-means, a table an output"),
    "any-precision": Entry(AnyPrecision, "2-8 nested", "lossy", "one weight to be read at several widths"),
    "lnq": Entry(Lnq, "1-8", "lossy, its objective monotone", "tables and codes in turns on a Hessian"),
    "dash-q": Entry(DashQ, "1-8", "lossy", "weighted least squares by group, few samples"),
    "mixed-two-bit": Entry(MixedTwoBit, "2 and 4 mixed", "lossy", "2/4-bit columns, 16-bit outliers"),
    "nested-fp": Entry(NestedFp, "8 in 16", "lossless (fp16 mode)", "FP8 and FP16 from the same 16 bits"),
    "dec-dec": Entry(DecDec, "its base's", "lossy", "a base, and residual rows fetched for large inputs"),
    "rotate": Entry(Rotate, "its base's", "lossy", "a base in a rotated basis, activations of 4 or 8 bits"),
}
