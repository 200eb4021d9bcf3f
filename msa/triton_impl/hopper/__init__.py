"""The last rung of the lowering: kernels for Hopper GPUs, written in Gluon, Triton's lower level.

In Triton the compiler decides which warps copy, which multiply and which wait for one another. In
Gluon a kernel says so itself. The files have the names of their portable counterparts in
`msa.triton_impl`, and give the same results. `plan.py` is the host's part and `ring.py` has what
kernels share. `msa.kernel_choice` decides which calls come here. Importing a module of this package
needs triton 3.6 or newer.
"""
