"""Checkpoints that other tools quantized, as our formats: nothing is dequantized and nothing is rounded.

    model, tokenizer = huggingface.load("path/to/Llama-GPTQ")           # its linears are `Affine`

config.json picks a scheme. A linear is quantized where the files have the scheme's tensors in place of its
`weight`; all else (embeddings, norms, biases, linears left out) is dense. For a linear of K inputs and N
outputs at b bits, with G groups of inputs (codes lie in int32 words, the first in the lowest bits):

    gptq                qweight [K b/32, N], qzeros [G, N b/32], scales [G, N], g_idx [K]       b = 2, 3, 4, 8
    awq                 qweight [K, N/8], qzeros [G, N/8], scales [G, N]                        b = 4
    compressed-tensors  weight_packed [N, K b/32], weight_scale [N, G], weight_shape [2],       b = 4, 8
                        weight_zero_point [N b/32, G], weight_g_idx [K]
    any-precision       qweight [B, N, K/32], lut{b} [N, 2**b]                                  b <= B <= 8

The first three mean (code - zero_point) * scale and become `Affine`: a zero point that is the middle code
everywhere is None, scales keep the file's float type. Act-order (`g_idx`: the group of each input) becomes
`Permuted`. The last becomes `BitPlanes`, and is what can be written, too. The layouts are those that AutoGPTQ
and GPTQModel, AutoAWQ, compressed-tensors and SNU-ARC/any-precision-llm on GitHub write.
"""

from typing import Any

from checkpoints_convert.quantized.affine import (
    Awq,
    ByTarget,
    CompressedTensors,
    Gptq,
    _awq,
    _compressed_tensors,
    _gptq,
    _mapping,
    refused,
)
from checkpoints_convert.quantized.any_precision import AnyPrecision, _any_precision

# A scheme says what tensors a linear has (`shapes`) and reads them as something of which `part(start, stop,
# dtype)` is our weight of some outputs: several of ours may be stacked in one of theirs. `main` is the tensor
# that tells a quantized linear, `optional` are those that may be absent; `transposes`: matrices that are
# [in, out] in dense files are stored like all others.


# What config.json says.


def scheme_of(raw: dict[str, Any]) -> "Scheme | None":
    """The scheme a config.json names, None for plain weights."""
    planes, given = raw.get("anyprec"), raw.get("quantization_config")
    if planes:
        return _any_precision(_mapping(planes, "anyprec"))
    if not given:
        return None
    given = _mapping(given, "quantization_config")
    match given.get("quant_method") or given.get("quant_algo") or "unknown":
        case "gptq":
            return _gptq(given)
        case "awq":
            return _awq(given)
        case "compressed-tensors":
            return _compressed_tensors(given)
        case other:
            raise refused(other)


# The schemes.


OneWay = Gptq | Awq | CompressedTensors | AnyPrecision
Scheme = OneWay | ByTarget


# Codes in words.


# Linears among the tensors of a checkpoint.


# Writing Any-Precision's files.
