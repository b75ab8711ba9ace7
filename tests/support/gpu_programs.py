"""Programs that are lowered for GPUs or compiled for an H100."""

import jax

from ot_attention import SinkhornSpec, sinkhorn_attention

KERNEL = "__gpu$xla.gpu.triton"


H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535  block_dim_limit_z: 65535  memory_bandwidth: 3352320000000  l2_cache_size: 52428800
  clock_rate_ghz: 1.98  device_memory_size: 84929347584  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
runtime_version { major: 12 minor: 8 }  platform_name: "CUDA"  dnn_version_info { major: 9 minor: 7 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def forward_and_backward(spec: SinkhornSpec):
    """Attend, and pull back cotangents of output and potentials to q, k, v and the dustbin scores."""

    def run(q, k, v, score, lengths, *cotangents):
        def attend(q, k, v, score):
            score = None if spec.dustbin == "none" else score
            out, info = sinkhorn_attention(q, k, v, spec, *lengths, score, "pallas_gpu")
            return out, info.f, info.g

        results, pull_back = jax.vjp(attend, q, k, v, score)
        return results, pull_back(cotangents)

    return run


def arguments(batch: int, length: int, heads: int, width: int, dustbin: str, dtype: str) -> tuple:
    x = jax.ShapeDtypeStruct((batch, length, heads, width), dtype)
    potential = jax.ShapeDtypeStruct((batch, heads, length + (dustbin != "none")), "float32")
    lengths = (jax.ShapeDtypeStruct((batch,), "int32"),) * 2
    return x, x, x, jax.ShapeDtypeStruct((heads,), "float32"), lengths, x, potential, potential
