"""Every GPU kernel compiled ahead of time, and held to what can be known of it without a GPU: `make check-gpu`.

machine_code    what a compiled kernel needs and does, read with cuobjdump
kernel          one kernel on one architecture, and the gate
triton_kernels  the compile cases of kernels/*.py
cuda_sources    csrc/cuda/*.cu, with the register budgets written in them
check           the command: compile, table, JSON lines, exit status
"""
