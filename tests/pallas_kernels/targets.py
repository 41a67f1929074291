"""Lowering for GPUs that are not there (check B): no plugin, no device, under a second."""

import contextlib

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

KINDS = {
    "h100": AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"),
    "a100": AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu"),
}
TRITON_ASKS_FOR_THE_GPU = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 11)


def lowered_text(function, *arrays, gpu: str = "h100") -> str:
    """The program that `function` is lowered to for CUDA.

    Triton is told the GPU, from jax 0.11 on; Mosaic takes a Hopper for granted and on 0.10 fails in a mesh.
    """
    mesh = AbstractMesh((), (), abstract_device=KINDS[gpu])
    where = use_abstract_mesh(mesh) if TRITON_ASKS_FOR_THE_GPU else contextlib.nullcontext()
    with where:
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
