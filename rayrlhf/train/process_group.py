"""Backends of a trainer's process group. Imports nothing, as the driver only names them."""

# Gradients and weights go by NCCL where they are on GPUs; numbers and objects through host memory.
ON_GPUS = "cpu:gloo,cuda:nccl"
ON_CPUS = "gloo"
