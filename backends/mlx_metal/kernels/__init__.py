"""Metal kernels through ``mx.fast.metal_kernel``, one operation a file."""
