"""What data sheets say of GPUs: for ahead-of-time compilation, and for the bounds that follow."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU. Rates are data-sheet peaks: bytes and dense multiply-adds (as two operations) a second."""

    name: str  # begins with a device kind that jax knows
    capability: tuple[int, int]
    arch: str  # what ptxas is told
    cores: int  # streaming multiprocessors
    clock: float  # Hz, boost
    bandwidth: float
    tensor16: float  # operations a second with 16-bit floats, float32 sums
    tensor8: float | None  # with 8-bit floats
    shared_per_core: int  # bytes
    shared_per_block: int  # bytes, with opt-in
    threads_per_core: int
    memory_gb: int
    l2_mb: int

    def target_config(self) -> str:
        """What XLA asks about a GPU before it compiles for one that is not there."""
        major, minor = self.capability
        return f"""
        gpu_device_info {{
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {self.threads_per_core}
          shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_per_core}
          shared_memory_per_block_optin: {self.shared_per_block}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          core_count: {self.cores} fpus_per_core: 128 clock_rate_ghz: {self.clock / 1e9}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.l2_mb << 20}
          device_memory_size: {self.memory_gb << 30}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
        }}
        platform_name: "CUDA" device_description_str: "{self.name}"
        dnn_version_info {{ major: 9 minor: 8 patch: 0 }} runtime_version {{ major: 13 minor: 0 patch: 0 }}
        """


HOPPER = Gpu(
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    arch="sm_90a",
    cores=132,
    clock=1.83e9,
    bandwidth=3.35e12,
    tensor16=989e12,
    tensor8=1979e12,
    shared_per_core=233472,
    shared_per_block=232448,
    threads_per_core=2048,
    memory_gb=80,
    l2_mb=50,
)
GPUS = {
    "h100": HOPPER,
    "h200": dataclasses.replace(HOPPER, name="NVIDIA H200", bandwidth=4.8e12, memory_gb=141),
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        arch="sm_80",
        cores=108,
        clock=1.41e9,
        bandwidth=2.039e12,
        tensor16=312e12,
        tensor8=None,
        shared_per_core=167936,
        shared_per_block=166912,
        threads_per_core=2048,
        memory_gb=80,
        l2_mb=40,
    ),
    "l4": Gpu(
        name="NVIDIA L4",
        capability=(8, 9),
        arch="sm_89",
        cores=58,
        clock=2.04e9,
        bandwidth=0.3e12,
        tensor16=121e12,
        tensor8=242e12,
        shared_per_core=102400,
        shared_per_block=101376,
        threads_per_core=1536,
        memory_gb=24,
        l2_mb=48,
    ),
    "b200": Gpu(
        name="NVIDIA B200",
        capability=(10, 0),
        arch="sm_100a",
        cores=148,
        clock=1.85e9,
        bandwidth=8.0e12,
        tensor16=2250e12,
        tensor8=4500e12,
        shared_per_core=233472,
        shared_per_block=232448,
        threads_per_core=2048,
        memory_gb=180,
        l2_mb=126,
    ),
}
