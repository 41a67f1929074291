"""Other tools' quantized checkpoints, as our formats and back: nothing is dequantized, nothing is rounded.

    model, tokenizer = huggingface.load("path/to/Llama-GPTQ")           # its linears are `Affine`
    huggingface.save(model, tokenizer, "out", scheme="awq")             # as other tools serve them

config.json picks a scheme. A linear is quantized where the files have the scheme's tensors in place of its
`weight`; all else (embeddings, norms, biases, linears left out) is dense. For a linear of K inputs and N
outputs at b bits, with G groups of inputs (codes lie in int32 words, the first in the lowest bits):

    gptq                qweight [K b/32, N], qzeros [G, N b/32], scales [G, N], g_idx [K]       b = 2, 3, 4, 8
    awq                 qweight [K, N/8], qzeros [G, N/8], scales [G, N]                        b = 4
    compressed-tensors  weight_packed [N, K b/32], weight_scale [N, G], weight_shape [2],       b = 4, 8
                        weight_zero_point [N b/32, G], weight_g_idx [K]
    mxfp4               blocks [N, K/32, 16], scales [N, K/32], of each expert                b = 4
    any-precision       qweight [B, N, K/32], lut{b} [N, 2**b], rows [N + 1], cols, vals [n]    b <= B <= 8

The first three mean (code - zero_point) * scale and become `Affine`: a zero point that is the middle code
everywhere is None, scales keep the file's float type. Act-order (`g_idx`: the group of each input) becomes
`Permuted`. MXFP4 becomes `Affine` of 5 bits (`mxfp4.py`). The last becomes `BitPlanes`, where
single weights are added to it (`sparse_rows.py`) a `DenseAndSparse`; a `Codebook` is
written so, too, as a table of one width. The layouts are those that AutoGPTQ and GPTQModel, AutoAWQ,
compressed-tensors, GPT-OSS and SNU-ARC/any-precision-llm on GitHub write. GPTQ is written as its second
version, MXFP4 is not written.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from checkpoints_convert.quantized.any_precision import AnyPrecision, BySparse
from checkpoints_convert.quantized.awq import Awq
from checkpoints_convert.quantized.compressed_tensors import ByTarget, CompressedTensors
from checkpoints_convert.quantized.config import json_object, unsupported
from checkpoints_convert.quantized.gptq import ByModule, Gptq
from checkpoints_convert.quantized.mxfp4 import Mxfp4
from checkpoints_convert.quantized.words import Shapes, Tensors
from jaxllm.weights.matmul import AnyWeight
from jaxllm.weights.weight import Weight


@runtime_checkable
class Linear(Protocol):
    """A linear of the files, in host memory."""

    def part(self, start: int, stop: int, dtype) -> AnyWeight:
        """Our weight of some outputs: several of ours may be stacked in one of theirs."""


@runtime_checkable
class Scheme(Protocol):
    """How linears are stored: what tensors each has, and how these are read.

    name: in errors. main: the tensor that tells a quantized linear. transposes: matrices that
      are [in, out] in dense files are stored like all others here.
    """

    name: ClassVar[str]
    main: ClassVar[str]
    transposes: ClassVar[bool]

    @property
    def optional(self) -> tuple[str, ...]:
        """The last names of tensors that may be absent."""

    def shapes(self, K: int, N: int) -> Shapes:
        """The shape and the types that each tensor of a [K, N] linear must have, by its last name."""

    def read(self, tensors: Tensors, K: int, N: int) -> Linear:
        """The linear of these tensors, whose shapes are right. Raises ValueError for numbers that are not."""


@runtime_checkable
class WritableScheme(Scheme, Protocol):
    """One whose files are written, too.

    Each has class methods that make it: `from_config` of what files say, `holding` of weights, `to_config` of
    all linears, `round` of a weight that it cannot hold.
    """

    @property
    def written(self) -> tuple[str, ...]:
        """The last names of the tensors that each linear is written as."""

    def write(self, parts: Sequence[Weight], last: str) -> np.ndarray:
        """One tensor of the linear in which our weights are stacked along the outputs."""


SCHEMES: dict[str, type[Gptq] | type[Awq] | type[CompressedTensors] | type[AnyPrecision]] = {
    scheme.name: scheme for scheme in (Gptq, Awq, CompressedTensors, AnyPrecision)
}


def scheme_of(raw: dict[str, Any]) -> Scheme | ByModule | ByTarget | BySparse | None:
    """What a config.json says of all linears, None for plain weights."""
    planes, given = raw.get("anyprec"), raw.get("quantization_config")
    if planes:
        return AnyPrecision.from_config(json_object(planes, "anyprec"))
    if not given:
        return None
    given = json_object(given, "quantization_config")
    match given.get("quant_method") or given.get("quant_algo") or "unknown":
        case Mxfp4.name:
            return Mxfp4()
        case Gptq.name | Awq.name | CompressedTensors.name as name:
            return SCHEMES[name].from_config(given)
        case other:
            raise unsupported(other)
