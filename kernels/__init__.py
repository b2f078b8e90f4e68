"""Triton kernels, one family a file; installed and imported as `asyncopd.kernels`.

This version has none yet: on a GPU, ops run on another backend.
"""

import importlib.util


def unavailable_reason() -> str | None:
    """Why the `triton` backend cannot run an op here, as a sentence; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'asyncopd[triton]')"
    return "this version of asyncopd has no Triton kernels yet"
