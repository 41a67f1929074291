"""Small Llamas in GGUF files, written by the `gguf` package alone, for tests that read them.

write_gguf(tmp_path / "model.gguf", kind="Q4_K")     # all its matrices of one type
"""

import gguf
import numpy as np
from tiny_llama import byte_tokenizer

SIZES = {"layers": 1, "width": 256, "ffn": 256, "heads": 4, "kv_heads": 2, "vocab": 264}
# where float16 numbers lie in a block
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)} | {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)
}  # fmt: skip


def random_blocks(rng: np.random.Generator, kind: str, rows: int, inputs: int) -> np.ndarray:
    """Rows of blocks uint8 [rows, bytes] of any bytes, their float16 numbers small and finite."""
    size, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (rows * inputs // size, num_bytes), dtype=np.uint8)
    for at in HALVES[kind]:
        numbers = rng.normal(0, 0.002, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = numbers[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)


def write_gguf(path, *, kind: str = "F32", seed: int = 0, keys=None, **sizes: int) -> dict[str, np.ndarray]:
    """Writes the file; returns what each tensor's numbers are, by the package's own `dequantize`.

    keys: metadata in place of or beside the usual. sizes: other `SIZES`.
    """
    rng, s = np.random.default_rng(seed), SIZES | sizes
    width, head_dim = s["width"], s["width"] // s["heads"]
    writer = gguf.GGUFWriter(path, "llama")
    whole = {"context_length": 64, "embedding_length": width, "block_count": s["layers"]}
    whole |= {"feed_forward_length": s["ffn"], "attention.head_count": s["heads"]}
    whole |= {"attention.head_count_kv": s["kv_heads"], "rope.dimension_count": head_dim}
    for name, value in whole.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    model = byte_tokenizer()
    vocab = sorted(model.get_vocab(), key=model.get_vocab().get)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "gpt-2")
    writer.add_array("tokenizer.ggml.tokens", vocab)
    writer.add_array("tokenizer.ggml.token_type", [1] * 262 + [3, 3])
    writer.add_array("tokenizer.ggml.merges", ["t h", "th e", "Ġ the", "i n", "a n", "an d"])
    writer.add_uint32("tokenizer.ggml.bos_token_id", 262)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 263)
    for name, value in (keys or {}).items():
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    found = {}
    matrices = {"token_embd": (s["vocab"], width), "output": (s["vocab"], width)}
    for i in range(s["layers"]):
        keys_width = s["kv_heads"] * head_dim
        for name, shape in {
            "attn_q": (width, width), "attn_k": (keys_width, width), "attn_v": (keys_width, width),
            "attn_output": (width, width), "ffn_gate": (s["ffn"], width), "ffn_up": (s["ffn"], width),
            "ffn_down": (width, s["ffn"]),
        }.items():  # fmt: skip
            matrices[f"blk.{i}.{name}"] = shape
        for name in ("attn_norm", "ffn_norm"):
            found[f"blk.{i}.{name}.weight"] = rng.normal(1, 0.1, width).astype(np.float32)
    found["output_norm.weight"] = rng.normal(1, 0.1, width).astype(np.float32)
    for name, value in found.items():
        writer.add_tensor(name, value)
    for name, (rows, inputs) in matrices.items():
        if kind in ("F32", "F16"):
            data = rng.normal(0, 0.1, (rows, inputs)).astype({"F32": np.float32, "F16": np.float16}[kind])
            writer.add_tensor(f"{name}.weight", data)
            found[f"{name}.weight"] = data.astype(np.float32)
        else:
            data, type_ = random_blocks(rng, kind, rows, inputs), gguf.GGMLQuantizationType[kind]
            writer.add_tensor(f"{name}.weight", data, raw_dtype=type_)
            found[f"{name}.weight"] = gguf.quants.dequantize(data, type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found
