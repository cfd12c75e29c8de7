"""The GPU form of the operation: Triton kernels."""
