"""Taps: what a reader is shown, when, and that an output may be replaced."""

import jax.numpy as jnp
from flax import nnx

from jaxllm.models.gpt import TINY, Gpt
from jaxllm.models.taps import layer_tap, linear_io, scoped


def test_a_reader_gets_what_it_names_in_its_order_once_a_layer_and_changes_nothing():
    model, tokens, read = Gpt(TINY, rngs=nnx.Rngs(0)), jnp.array([[1, 2, 3]]), []

    def reader(layer, keys, x):
        read.append((layer, keys.shape, x.shape))

    tap = layer_tap(reader, ("attention.keys", "attention.q.in"))
    plain, tapped = model(tokens)[0], model(tokens, tap=tap)[0]
    assert read == [(layer, (1, 3, 4, 8), (1, 3, 32)) for layer in (0, 1)]
    assert (plain == tapped).all()
    model(tokens, tap=layer_tap(reader, ("attention.keys", "attention.q.in"), [1]))
    assert [layer for layer, *_ in read[2:]] == [1]


def test_layers_of_an_encoder_are_others():
    read = []
    tap = scoped(layer_tap(lambda layer, x: read.append(layer), ("mlp.up.in",)), "encoder")
    assert tap is not None
    tap("layers.0.mlp.up.in", jnp.zeros(1))
    assert read == []


def test_linear_io_notes_inputs_and_passes_on_what_output_returns_for_linears_only():
    model, tokens, inputs, named = Gpt(TINY, rngs=nnx.Rngs(0)), jnp.array([[1, 2, 3]]), {}, []

    def output(name, y):
        named.append(name)
        return jnp.zeros_like(y) if name.endswith("down") else y

    model(tokens, tap=linear_io(inputs, output))
    linears = [f"attention.{name}" for name in "qkvo"] + ["mlp.up", "mlp.down"]
    assert named == list(inputs) == [f"layers.{i}.{name}" for i in (0, 1) for name in linears]
    changed = {}
    blind = model(tokens, tap=linear_io(changed))[0]
    assert (blind == model(tokens)[0]).all()
    assert (changed["layers.1.attention.q"] != inputs["layers.1.attention.q"]).any()
