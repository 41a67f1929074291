"""A start from which a decoder can already copy: two of its layers are wired as induction heads.

Models learn to copy late and abruptly, when one head that looks one token back meets another that looks for
it (Olsson et al., arXiv:2209.11895). Here that meeting is arranged before training instead of waited for;
every weight stays trainable, and nothing but the initial values differs from any other decoder.

    embedding    element 0 is one constant for all tokens, the rest has norm 1
    layer 0      key head g looks g + 1 tokens back: q and k read the constant, turned so that the rotary
                 scores peak at that distance; v reads a code of the token there, o writes it elsewhere
    layer 1      key head 0 finds the place whose token before is this token    (a b ... a -> b)
                 key head 1 finds the place whose token two before is that before this (a = b ... a = -> b)
                 matching the codes on planes that rotary positions turn slowly; v, o pass the token on
    elsewhere    what a block adds to the stream (o, down) starts at zero
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.models.decoder import Decoder

CONSTANT = 3.0  # element 0 of an embedding, in units of the others' root mean square
SHARPNESS = 3.0 * np.array([1.0, 1.0, 0.7, 0.5])  # of the look back, by rotary plane, fastest first
SLOW = 0.012  # radians a token: planes below match tokens
WRITE, MATCH, PASS = 3.0, 2.0, 1.0  # scales of o in layer 0, of q and k, and of o in layer 1
REST = 0.3  # what is kept of the random values of wired q and k


def wire(model: Decoder, seed: int) -> Decoder:
    """The model with its first two layers wired; the model itself is left as it is."""
    c = model.config
    E, D, K, G, half = c.head_dim, c.width, c.kv_heads, c.heads // c.kv_heads, c.head_dim // 2
    if c.layers < 2 or half < len(SHARPNESS) or (K + 1) * E >= D:
        raise ValueError(
            "induction.wire: two layers, heads of 8 and (kv_heads + 1) * head_dim < width must hold, "
            f"got {c.layers=}, {c.head_dim=}, {c.kv_heads=}, {c.width=}"
        )
    leaves = jax.tree_util.tree_leaves_with_path(model)
    values = {jax.tree_util.keystr(path): np.array(x, np.float32) for path, x in leaves}
    rng = np.random.default_rng(seed)
    planes = c.rope.frequencies(E)

    for name, x in values.items():
        if ".attention.o." in name or ".mlp.down." in name:
            x[:] = 0
    table = values[".embedding.table.value.rows"]
    table[:, 1:] /= np.linalg.norm(table[:, 1:], axis=1, keepdims=True)
    table[:, 0] = CONSTANT * D**-0.5

    # orthonormal directions of the stream that avoid element 0: the code, then a place for each key head
    basis = np.zeros((D, (K + 1) * E), np.float32)
    basis[1:] = np.linalg.qr(rng.normal(size=(D - 1, (K + 1) * E)))[0]
    code = basis[:, :E].T
    place = [basis[:, (1 + g) * E : (2 + g) * E] for g in range(K)]

    def layer(i):
        return [values[f".layers[{i}].attention.{w}.w.value.rows"] for w in "qkvo"]

    fast = np.zeros(half)
    fast[: len(SHARPNESS)] = SHARPNESS
    q, k, v, o = layer(0)
    for g in range(K):
        key, query = slice(g * E, (g + 1) * E), slice(g * G * E, (g * G + 1) * E)
        k[key] *= REST
        k[key, 0] += np.append(fast, np.zeros(half))
        q[query] *= REST
        angle = -(g + 1) * planes
        q[query, 0] += np.append(fast * np.cos(angle), fast * np.sin(angle))
        v[key] = code
        o[:, query] = WRITE * D**-0.5 * place[g]

    slow = np.tile(planes < SLOW, 2)[:, None]
    q, k, v, o = layer(1)
    for g in range(K):
        key, query = slice(g * E, (g + 1) * E), slice(g * G * E, (g * G + 1) * E)
        asked = code if g == 0 else place[g - 1].T
        k[key] = MATCH * slow * place[g].T + REST**2 * k[key]
        q[query] = MATCH * slow * asked + REST**2 * q[query]
        v[key] = np.linalg.qr(rng.normal(size=(D, E)))[0].T
        o[:, query] = PASS * v[key].T
    dtypes = [x.dtype for _, x in leaves]
    return jax.tree.unflatten(
        jax.tree.structure(model),
        [jnp.asarray(x, dtype) for x, dtype in zip(values.values(), dtypes, strict=True)],
    )
