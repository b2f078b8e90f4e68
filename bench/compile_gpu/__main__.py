"""python -m bench.compile_gpu; a module of its own, which the processes that compile need not import."""

import typer

from bench.compile_gpu.check import main

typer.run(main)
