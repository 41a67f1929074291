"""Published systems for running large models cheaply, as functions on JAX pytrees.

import jaxllm as jl

model, tokenizer = jl.load()
print(jl.generate(model, tokenizer, ["Once upon a time"])[0].text)
"""

import lazy_loader

__version__ = "0.1.0"

# Names are imported when they are first used: `import jaxllm.models.decoder` loads no method. The list of
# them is the stub, `__init__.pyi`, which type checkers read too.
_lazily, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = [*__all__, "kernels"]


def __getattr__(name: str):
    """A public name, when it is first used."""
    if name == "kernels":  # of a package beside this one, of which a stub cannot speak
        from pallas_kernels import kernels

        return kernels
    return _lazily(name)


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
