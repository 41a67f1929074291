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

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxllm.models.decoder import Config, Decoder

CONSTANT = 3.0  # element 0 of an embedding, in units of the others' root mean square
SHARPNESS = 3.0 * np.array([1.0, 1.0, 0.7, 0.5])  # of the look back, by rotary plane, fastest first
SLOW = 0.012  # radians a token: planes below match tokens
WRITE, MATCH, PASS = 3.0, 2.0, 1.0  # scales of o in layer 0, of q and k, and of o in layer 1
REST = 0.3  # what is kept of the random values of wired q and k


def wire(model: Decoder, seed: int) -> Decoder:
    """The model with its first two layers wired; the model itself is left as it is."""
    c = model.config
    E, D, K, half = c.head_dim, c.width, c.kv_heads, c.head_dim // 2
    if c.layers < 2 or half < len(SHARPNESS) or (K + 1) * E >= D:
        raise ValueError(
            "induction.wire: two layers, heads of 8 and (kv_heads + 1) * head_dim < width must hold, "
            f"got {c.layers=}, {c.head_dim=}, {c.kv_heads=}, {c.width=}"
        )
    leaves = jax.tree_util.tree_leaves_with_path(model)
    values = {jax.tree_util.keystr(path): np.array(x, np.float32) for path, x in leaves}
    rng = np.random.default_rng(seed)

    for name, x in values.items():
        if ".attention.o." in name or ".mlp.down." in name:
            x[:] = 0
    table = values[".embedding.table.value.rows"]
    table[:, 1:] /= np.linalg.norm(table[:, 1:], axis=1, keepdims=True)
    table[:, 0] = CONSTANT * D**-0.5

    # orthonormal directions of the stream that avoid element 0: the code, then a place for each key head
    basis = np.zeros((D, (K + 1) * E), np.float32)
    basis[1:] = np.linalg.qr(rng.normal(size=(D - 1, (K + 1) * E)))[0]
    code, *places = np.split(basis.T, K + 1)

    first, second = (
        {w: values[f".layers[{i}].attention.{w}.w.value.rows"] for w in "qkvo"} for i in range(2)
    )
    _look_back(c, first, code, places)
    _find_and_pass(c, second, [code, *places], rng)
    return jax.tree.unflatten(
        jax.tree.structure(model),
        [jnp.asarray(x, leaf.dtype) for x, (_, leaf) in zip(values.values(), leaves, strict=True)],
    )


def _rows_of(c: Config, g: int) -> tuple[slice, slice]:
    """The rows of key head g, and of the first query head that reads it."""
    E, first = c.head_dim, g * (c.heads // c.kv_heads)
    return slice(g * E, (g + 1) * E), slice(first * E, (first + 1) * E)


def _look_back(
    c: Config,
    weights: dict[str, Float[np.ndarray, "N K"]],
    code: Float[np.ndarray, "E D"],
    places: Sequence[Float[np.ndarray, "E D"]],
) -> None:
    """Layer 0: key head g reads the code of the token g + 1 back and writes it to its place."""
    planes = c.rope.frequencies(c.head_dim)
    fast = np.zeros(len(planes))
    fast[: len(SHARPNESS)] = SHARPNESS
    for g, place in enumerate(places):
        key, query = _rows_of(c, g)
        weights["k"][key] *= REST
        weights["k"][key, 0] += np.append(fast, np.zeros(len(planes)))
        weights["q"][query] *= REST
        angle = -(g + 1) * planes
        weights["q"][query, 0] += np.append(fast * np.cos(angle), fast * np.sin(angle))
        weights["v"][key] = code
        weights["o"][:, query] = WRITE * c.width**-0.5 * place.T


def _find_and_pass(
    c: Config,
    weights: dict[str, Float[np.ndarray, "N K"]],
    codes: Sequence[Float[np.ndarray, "E D"]],
    rng: np.random.Generator,
) -> None:
    """Layer 1: key head g finds where what stood g + 1 back (`codes[g + 1]`) is what stands g back here."""
    slow = np.tile(c.rope.frequencies(c.head_dim) < SLOW, 2)[:, None]
    for g, (here, there) in enumerate(itertools.pairwise(codes)):
        key, query = _rows_of(c, g)
        weights["k"][key] = MATCH * slow * there + REST**2 * weights["k"][key]
        weights["q"][query] = MATCH * slow * here + REST**2 * weights["q"][query]
        weights["v"][key] = np.linalg.qr(rng.normal(size=(c.width, c.head_dim)))[0].T
        weights["o"][:, query] = PASS * weights["v"][key].T
