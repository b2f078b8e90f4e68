"""The command: see the package."""

import importlib
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from asyncopd import backends
from bench import lines
from bench.measure import release_memory
from bench.probe.setting import Setting
from bench.run import in_short

# In this order: cold caches do not matter to the host's times, and what follows gemm would find a slower clock.
PARTS = ("host", "rows", "pack", "sparse", "exact", "gemm")


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(PARTS)}; left out: all")] = None,
    path: Annotated[Path | None, typer.Option("--results", help="lines of JSON are appended here")] = None,
    budget_s: Annotated[float, typer.Option(help="no part is begun after this many seconds")] = 90.0,
    dry_run: Annotated[bool, typer.Option(help="compile and call everything, without a GPU and without times")] = False,
) -> None:
    """Measure what decides designs of kernels. A part that is in the file already is left out."""
    wanted = parts or PARTS
    for part in wanted:
        if part not in PARTS:
            raise typer.BadParameter(f"got {part!r}, expected one of {', '.join(PARTS)}", param_hint="PART")
    if dry_run:
        from bench.launch_check.driver import stand_in

        context: AbstractContextManager[Any] = stand_in(clear_memory=True)
    else:
        if reason := backends.unavailable_reason("triton"):
            raise typer.BadParameter(f"the triton backend cannot run here: {reason}", param_hint="--dry-run")
        context = nullcontext()
    have = {line["part"] for line in lines.read(path) if line.get("complete")}
    begin, broken = time.perf_counter(), False
    with context:
        setting = Setting.of(torch.device("cpu" if dry_run else "cuda"), dry=dry_run, path=path)
        for part in wanted:
            if part in have:
                continue
            if time.perf_counter() - begin > budget_s:
                print(f"{budget_s:g} s are over before {part}; run again to go on")
                raise typer.Exit(3)
            broken |= not measured(part, setting)
    if broken:
        raise typer.Exit(1)


def measured(part: str, setting: Setting) -> bool:
    """Whether it went well; one part that cannot run does not keep the others from it."""
    module = importlib.import_module(f"bench.probe.{part}")
    begin = time.perf_counter()
    print(f"## {part}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
    setting.part = part
    try:
        module.run(setting)
    except Exception as failure:
        print(f"  {part} broke: {in_short(failure)}", flush=True)
        if setting.dry:
            raise
        return False
    finally:
        release_memory()
    print(f"  {time.perf_counter() - begin:.1f} s", flush=True)
    lines.append(setting.path, {"part": part, "complete": True})
    return True


if __name__ == "__main__":
    typer.run(main)
