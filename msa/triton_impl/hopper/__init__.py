"""The last rung of the lowering: kernels for Hopper GPUs, written in Gluon, Triton's lower level.

The same file names as beside this package. Here a kernel says which warps copy, which multiply and
who waits for whom; Triton decides that alone. Results are those of the portable kernels.
"""
