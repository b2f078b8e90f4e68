"""How far from the limit everybody is, as a picture."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
mpl.rcParams["svg.hashsalt"] = "asyncopd"  # the same results give the same file
from matplotlib import pyplot as plt  # noqa: E402

from bench.families import FAMILIES, LIMIT, OURS  # noqa: E402
from bench.report import by_case, environments, what  # noqa: E402
from bench.results import Result  # noqa: E402


def save_plot(results: Sequence[Result], path: Path) -> None:
    """Headline cases, one group of bars each: time over the limit's time, on a logarithmic axis."""
    cases = by_case(r for r in results if r.headline and r.share_of_limit and r.provider != LIMIT)
    names = list(dict.fromkeys(name for providers in cases.values() for name in providers))
    colours = {name: f"C{i}" for i, name in enumerate([OURS, *(n for n in names if n != OURS)])}
    height = sum(len(providers) + 1.5 for providers in cases.values())
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.22 * height), layout="constrained")
    y, labelled = 0.0, set()
    for providers in cases.values():
        first = next(iter(providers.values()))
        axes.text(1.0, y, f" {FAMILIES[first.family].title}: {what(first)}", fontsize=8, va="center")
        for name, result in providers.items():
            y += 1
            assert result.share_of_limit is not None
            label = None if name in labelled else name
            labelled.add(name)
            axes.barh(y, 1 / result.share_of_limit - 1, left=1, height=0.9, color=colours[name], label=label)
            axes.text(1 / result.share_of_limit, y, f" {1 / result.share_of_limit:.3g}", fontsize=7, va="center")
        y += 1.5
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_xlabel("time, in multiples of the limit measured in the same rounds (1 = at the limit)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    if labelled:
        figure.legend(fontsize=8, loc="outside lower center", ncols=len(labelled))
    axes.set_title("\n".join(environments(results)), fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
