"""Benchmarks against the limit of the machine.

    cases       the shapes, with the bytes and FLOPs that each needs at least
    inputs      seeded tensors for a case
    families/   what is compared on a case: the limit, torch, other published methods, asyncopd; and the fp64 oracle
    measure     interleaved timing, peak extra memory
    run         one case from inputs to results
    results     JSON lines
    report      tables and plots, made from the JSON lines alone
    gates       ratios that must not be lost

`make bench` runs test_suite.py and prints the report; `make gates` runs test_gates.py, as continuous integration does.
Everything but the gates takes a device: on a GPU, `run.measure(case, ..., device=...)` for the cases of size "gpu".
"""
