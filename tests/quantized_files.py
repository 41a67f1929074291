"""Checkpoints of GPTQ, AWQ, compressed-tensors and Any-Precision, built bit by bit from their layouts.

tensors, rows = checkpoint(path, gptq, gptq_block())  # a directory; its tensors, and the rows they mean
"""

import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from checkpoints_convert.quantized.any_precision import from_cuda_planes

WIDTH, HIDDEN, KEYS, VOCAB = 64, 128, 32, 68
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
LINEARS = {  # name: (inputs, outputs)
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, KEYS),
    "self_attn.v_proj": (WIDTH, KEYS),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (WIDTH, HIDDEN),
    "mlp.up_proj": (WIDTH, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDTH),
}
PHI3 = {
    "self_attn.qkv_proj": (WIDTH, WIDTH + 2 * KEYS),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_up_proj": (WIDTH, 2 * HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDTH),
}
OURS = {
    "q_proj": "layers.0.attention.q.w",
    "k_proj": "layers.0.attention.k.w",
    "v_proj": "layers.0.attention.v.w",
    "o_proj": "layers.0.attention.o.w",
    "gate_proj": "layers.0.mlp.gate.w",
    "up_proj": "layers.0.mlp.up.w",
    "down_proj": "layers.0.mlp.down.w",
}


# The layouts, one code at a time.

KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int64": "I64"}


def write(path, config, tensors):
    """A directory: config.json and a safetensors file, its header and numbers put together by hand."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    header, body = {}, b""
    for name, value in tensors.items():
        data = np.ascontiguousarray(value).tobytes()
        offsets = [len(body), len(body) + len(data)]
        kind = KINDS[value.dtype.name]
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": offsets}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def int32(numbers):
    """Words of 32 bits, given as whole numbers of any size, as a file has them."""
    return np.array([n % 2**32 for n in numbers], np.uint32).view(np.int32)


def word_row(codes, bits):
    """Codes in words, the first lowest; at 3 bits, 32 codes in 3 words by AutoGPTQ's rule."""
    codes = [int(code) for code in codes]
    words = []
    if bits != 3:
        for at in range(0, len(codes), 32 // bits):
            word = 0
            for i, code in enumerate(codes[at : at + 32 // bits]):
                word |= code << (bits * i)
            words.append(word)
        return int32(words)
    for at in range(0, len(codes), 32):
        c = codes[at : at + 32]
        first = sum(c[j] << (3 * j) for j in range(10)) | (c[10] & 3) << 30
        second = c[10] >> 2 | sum(c[11 + j] << (3 * j + 1) for j in range(10)) | (c[21] & 1) << 31
        third = c[21] >> 1 | sum(c[22 + j] << (3 * j + 2) for j in range(10))
        words += [first, second, third]
    return int32(words)


def grid(rng, K, N, bits, group_size, *, symmetric, scale=np.float16, act_order=False):
    """Random codes [N, K], zeros [G, N], scales [G, N], the group of each input, and the rows they mean."""
    group_size = K if group_size == -1 else group_size
    G = -(-K // group_size)
    codes = rng.integers(0, 2**bits, (N, K))
    zeros = np.full((G, N), 2 ** (bits - 1)) if symmetric else rng.integers(1, 2**bits, (G, N))
    scales = (rng.random((G, N)) * 0.05 + 0.01).astype(scale)
    g_idx = np.arange(K) // group_size
    if act_order:
        g_idx = rng.permutation(g_idx)
    rows = np.empty((N, K), np.float32)
    for k in range(K):
        g = g_idx[k]
        rows[:, k] = (codes[:, k] - zeros[g]).astype(np.float32) * scales[g].astype(np.float32)
    return codes, zeros, scales, g_idx, rows


def gptq(rng, K, N, *, bits=4, group_size=32, symmetric=True, act_order=False, version=1):
    codes, zeros, scales, g_idx, rows = grid(
        rng, K, N, bits, group_size, symmetric=symmetric, act_order=act_order
    )
    stored = zeros - 1 if version == 1 else zeros
    tensors = {
        "qweight": np.stack([word_row(codes[n], bits) for n in range(N)], axis=1),
        "qzeros": np.stack([word_row(row, bits) for row in stored]),
        "scales": scales,
        "g_idx": g_idx.astype(np.int32),
    }
    return tensors, rows


def awq(rng, K, N, *, group_size=32):
    codes, zeros, scales, _, rows = grid(rng, K, N, 4, group_size, symmetric=False)

    def along_outputs(line):
        words = []
        for at in range(0, N, 8):
            places = (0, 2, 4, 6, 1, 3, 5, 7)
            words.append(sum(int(line[at + o]) << (4 * i) for i, o in enumerate(places)))
        return int32(words)

    tensors = {
        "qweight": np.stack([along_outputs(codes[:, k]) for k in range(K)]),
        "qzeros": np.stack([along_outputs(row) for row in zeros]),
        "scales": scales,
    }
    return tensors, rows


def compressed(
    rng, K, N, *, bits=4, group_size=32, symmetric=True, act_order=False, scale=ml_dtypes.bfloat16
):
    codes, zeros, scales, g_idx, rows = grid(
        rng, K, N, bits, group_size, symmetric=symmetric, act_order=act_order, scale=scale
    )
    tensors = {
        "weight_packed": np.stack([word_row(codes[n], bits) for n in range(N)]),
        "weight_scale": scales.T,
        "weight_shape": np.array([N, K], np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = np.stack([word_row(row, bits) for row in zeros], axis=1)
    if act_order:
        tensors["weight_g_idx"] = g_idx.astype(np.int32)
    return tensors, rows


def any_precision(rng, K, N, *, seed=2, parent=4):
    codes = rng.integers(0, 2**parent, (N, K))
    qweight = np.zeros((parent, N, K // 32), np.uint32)
    for k in range(K):  # where the kernel has column k: section 3.2 of the notes on the paper
        tile, r = divmod(k, 1024)
        T = min(32, (K - 1024 * tile) // 32)
        j, rest = divmod(r, 8 * T)
        t, i = divmod(rest, 8)
        for plane in range(parent):
            bit = (codes[:, k] >> (parent - 1 - plane)) & 1
            qweight[plane, :, 32 * tile + t] |= (bit << (31 - 8 * j - i)).astype(np.uint32)
    tensors = {"qweight": qweight.view(np.int32)}
    for b in range(seed, parent + 1):
        tensors[f"lut{b}"] = np.sort(rng.normal(0, 0.1, (N, 2**b)), axis=1).astype(np.float16)
    rows = np.take_along_axis(tensors[f"lut{parent}"], codes, axis=1).astype(np.float32)
    return tensors, rows


def dense(rng, linears=LINEARS, kind=np.float32):
    """What is not quantized."""

    def one(*shape):
        return rng.normal(0, 0.1, shape).astype(kind)

    return {
        "model.embed_tokens.weight": one(VOCAB, WIDTH),
        "model.norm.weight": one(WIDTH) + kind(1),
        "lm_head.weight": one(VOCAB, WIDTH),
        "model.layers.0.input_layernorm.weight": one(WIDTH) + kind(1),
        "model.layers.0.post_attention_layernorm.weight": one(WIDTH) + kind(1),
    }


def checkpoint(path, make, block, *, config=LLAMA, linears=LINEARS, kind=np.float32, **options):
    """A quantized directory at `path`, and the same model with dense weights at `path`-dense."""
    rng = np.random.default_rng(0)
    tensors = dense(rng, kind=kind)
    plain, rows = dict(tensors), {}
    for name, (K, N) in linears.items():
        parts, rows[name] = make(rng, K, N, **options)
        tensors |= {f"model.layers.0.{name}.{last}": value for last, value in parts.items()}
        plain[f"model.layers.0.{name}.weight"] = rows[name]
    write(path, config | block, tensors)
    write(path.with_name(path.name + "-dense"), config, plain)
    return tensors, rows


def gptq_block(**options):
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    return {"quantization_config": settings | options}


def awq_block(**options):
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    return {"quantization_config": settings | options}


def compressed_block(format="pack-quantized", **options):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights | options, "input_activations": None}
    settings = {"quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head"]}
    return {"quantization_config": settings | {"config_groups": {"group_0": group}}}


ANY = {"anyprec": {"seed_precision": 2, "parent_precision": 4, "arch_config": {}}}

# name: (what makes a linear, what config.json says, its options)
CASES = {
    "gptq": (gptq, gptq_block(), {}),
    "gptq, one group": (gptq, gptq_block(group_size=-1), {"group_size": -1}),
    "gptq, zeros": (gptq, gptq_block(sym=False), {"symmetric": False}),
    "gptq, zeros of version 2": (
        gptq,
        gptq_block(sym=False, checkpoint_format="gptq_v2"),
        {"symmetric": False, "version": 2},
    ),
    "gptq, act-order": (gptq, gptq_block(desc_act=True), {"act_order": True}),
    "gptq, 2 bits": (gptq, gptq_block(bits=2, sym=False), {"bits": 2, "symmetric": False}),
    "gptq, 3 bits": (gptq, gptq_block(bits=3, sym=False), {"bits": 3, "symmetric": False}),
    "gptq, 3 bits, act-order": (
        gptq,
        gptq_block(bits=3, desc_act=True, group_size=16),
        {"bits": 3, "act_order": True, "group_size": 16},
    ),
    "gptq, 8 bits": (gptq, gptq_block(bits=8, sym=False), {"bits": 8, "symmetric": False}),
    "awq": (awq, awq_block(), {}),
    "awq, first keys": (
        awq,
        {"quantization_config": {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}},
        {"group_size": 64},
    ),
    "compressed": (compressed, compressed_block(), {}),
    "compressed, zeros": (compressed, compressed_block(symmetric=False), {"symmetric": False}),
    "compressed, act-order": (compressed, compressed_block(actorder="group"), {"act_order": True}),
    "compressed, 8 bits a row": (
        compressed,
        compressed_block(num_bits=8, strategy="channel", group_size=None),
        {"bits": 8, "group_size": -1},
    ),
    "any-precision": (any_precision, ANY, {}),
}
SYMMETRIC = {name for name, (make, _, options) in CASES.items()
             if make in (gptq, compressed) and options.get("symmetric", True)}  # fmt: skip


def with_sparse_rows(rng, K, N):
    """A linear of the authors' files with single weights, in their compressed rows."""
    tensors, _ = any_precision(rng, K, N)
    mask = rng.random((N, K)) < 0.02
    mask[3] = False
    values = rng.normal(size=(N, K)).astype(np.float16)
    tensors |= {
        "rows": np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32),
        "cols": np.nonzero(mask)[1].astype(np.int32),
        "vals": values[mask],
    }
    bits = from_cuda_planes(tensors["qweight"], K)[..., None] >> np.arange(32) & 1
    codes = (bits.reshape(4, N, K) << np.arange(4)[::-1, None, None]).sum(0)
    add = np.where(mask, values, 0).astype(np.float32)
    return tensors, {
        b: np.take_along_axis(tensors[f"lut{b}"].astype(np.float32), codes >> 4 - b, axis=1) + add
        for b in (2, 3, 4)
    }


def sparse_checkpoint(path, change=lambda name, tensors: tensors):
    """Any-Precision's files whose linears have single weights; the up projection has none and no entry."""
    rng, meant, counts = np.random.default_rng(4), {}, {}
    tensors = dense(rng, kind=np.float16)
    for name, (K, N) in LINEARS.items():
        linear = f"model.layers.0.{name}"
        parts, meant[name] = with_sparse_rows(rng, K, N)
        if name != "mlp.up_proj":
            counts[linear] = parts["vals"].size
        else:
            parts, rows = any_precision(rng, K, N)
            meant[name] = {4: rows}
        tensors |= {f"{linear}.{last}": value for last, value in change(name, parts).items()}
    block = ANY["anyprec"] | {"sparse_numvals": counts}
    write(path, LLAMA | {"anyprec": block}, tensors)
    return tensors, meant, counts


_logits = jax.jit(lambda model, tokens: model(tokens)[0])


def logits(model):
    return np.asarray(_logits(model, jnp.arange(10, dtype=jnp.int32).reshape(2, 5)))


def same_model(a, b):
    a, b = nnx.state(a), nnx.state(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
