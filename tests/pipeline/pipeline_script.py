"""A run that never ends by itself, for tests that end its supervisor: python pipeline_script.py."""

from __future__ import annotations

import sys

from pipeline_fakes import Fake, config, factories

from asyncopd.pipeline import run_pipeline


def main(kind: str) -> None:
    fake = Fake()
    if kind == "long-decode":  # rollout workers sit in one decode step of an hour
        fake.faults = {"rollout-0": "hang"}
        fake.fault_after = 200
    print("started", flush=True)
    run_pipeline(
        config(steps=10**6, stall_timeout_s=600.0),
        **factories(fake),
        on_step=lambda metrics: print("step", metrics["step"], flush=True),
    )


if __name__ == "__main__":
    main(sys.argv[1])
