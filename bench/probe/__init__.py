"""Measurements that decide designs of kernels, for a GPU; about 80 s for all: python -m bench.probe [PART...]

    host    what a launch, a custom op and a small call cost the CPU
    rows    LSE + top-K by one kernel a row, beside the three kernels that there are     candidate: row_topk.py
    pack    exponentials kept in 12 bits, beside a copy of the products                  candidate: pack12.py
    sparse  the sampled loss by the width of its slices
    exact   the exact loss by the width of its blocks, and with nothing multiplied twice
    gemm    products of a block of the vocabulary by its width; last, since it heats

Rates depend on the clock, which depends on the last 100 ms. So calls are timed in rounds that go round all of them, the
bare products among them, and the median clock is written beside each. The candidates are no part of the package: what
is measured here decides whether they will be.

--dry-run compiles the kernels and launches them into nothing (bench.launch_check): no times, but it needs no GPU.
"""
