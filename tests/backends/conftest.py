"""The kernels' own tests run on every instruction set of this machine; where nothing was compiled there are none.

(tests/test_build.py fails there, so that a lost build cannot pass in silence.)
"""

import pytest

from asyncopd.backends import native

collect_ignore_glob = ["test_cpu_*.py"] if native.unavailable_reason() else []


@pytest.fixture(params=() if native._C is None else native._C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> int:
    """An instruction-set level, by its number."""
    return native._C.cpu_isas().index(request.param)
