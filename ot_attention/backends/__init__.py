"""The implementations behind `sinkhorn_attention`: XLA, Triton kernels for GPUs, Mosaic kernels for TPUs."""
