"""Benchmarks against the limit of the machine.

    cases       the shapes, with the bytes and FLOPs that each needs at least
    inputs      seeded tensors for a case
    families/   what is compared on a case: the limit, torch, other published methods, asyncopd; and the fp64 oracle
    ceilings    what the device does at most: a copy, a matrix product
    measure     interleaved timing, peak extra memory
    clocks      a GPU's clock while something was measured
    run         one case from inputs to results
    suite       all cases of a size on a device, resumable: what bench/gpu.sh runs
    smoke       every op once on every backend, beside the reference
    probe       measurements that decide designs, and candidates for kernels
    profile_kernels   the headline cases kernel by kernel
    results, lines   JSON lines: of the suite; of the others, appended one by one
    report      tables and plots, made from the JSON lines alone
    gates       ratios that must not be lost
    compile_gpu every GPU kernel compiled ahead of time, and gated

`make bench` runs test_suite.py and prints the report. `make gates` runs test_gates.py, test_small_gates.py and
test_host_gates.py, and `make check-gpu` runs compile_gpu, as continuous integration does. On a machine with a GPU,
bench/gpu.sh builds, tests and measures.
"""
