"""The GPU kernels of the operation, in Triton."""
