"""Every op as Triton kernels: for GPUs, and for the CPU in Triton's interpreter, which the tests use.

A file an op, imported at its first call. Kernels compile at their first launch; sizes are arguments, so that a new
shape compiles nothing. Nothing here waits for the device, and partial sums meet in a fixed order, never by atomics.
"""
