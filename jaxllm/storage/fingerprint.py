"""A hash that tells a model from another."""

import hashlib

import jax
import numpy as np


def fingerprint(model) -> str:
    """Tells a model from another: shapes, types and some numbers of every weight."""
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_flatten_with_path(model)[0]:
        digest.update(f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype}".encode())
        digest.update(np.asarray(x.ravel()[:16]).tobytes())
    return digest.hexdigest()
