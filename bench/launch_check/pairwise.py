"""Tables of cases in which every pair of values of two options occurs, as far as the rules allow the pair.

Greedy and deterministic: each case begins with the first pair that is still missing, and is completed value by value
with those that add most missing pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

Case = dict[str, Any]
_Indexed = dict[str, int]  # option -> index of its value: values need not be hashable, and True is not 1
_Pair = tuple[str, int, str, int]


@dataclass(frozen=True, slots=True)
class Rule:
    """`allows(*values)` of these options; asked as soon as all of them have a value."""

    names: tuple[str, ...]
    allows: Callable[..., bool]


def table(options: Mapping[str, Sequence[Any]], rules: Sequence[Rule] = ()) -> list[Case]:
    """Cases with one value of each option; together they have every pair that some allowed case has."""
    missing: dict[_Pair, None] = {
        (a, i, b, j): None
        for a, b in combinations(options, 2)
        for i in range(len(options[a]))
        for j in range(len(options[b]))
    }
    cases = []
    while missing:
        a, i, b, j = first = next(iter(missing))
        case = _completed({a: i, b: j}, options, rules, missing)
        if case is None:  # no allowed case has this pair
            del missing[first]
            continue
        for x, y in combinations(options, 2):
            missing.pop((x, case[x], y, case[y]), None)
        cases.append({name: options[name][case[name]] for name in options})
    return cases


def _completed(
    case: _Indexed, options: Mapping[str, Sequence[Any]], rules: Sequence[Rule], missing: Mapping[_Pair, None]
) -> _Indexed | None:
    """The case with a value for every option, or None if the rules allow none."""
    if not all(_allowed(rule, case, options) for rule in rules):
        return None
    name = next((name for name in options if name not in case), None)
    if name is None:
        return case

    def gain(index: int) -> int:
        tried = {**case, name: index}
        pairs = combinations((option for option in options if option in tried), 2)
        return sum((x, tried[x], y, tried[y]) in missing for x, y in pairs)

    for index in sorted(range(len(options[name])), key=gain, reverse=True):
        if completed := _completed({**case, name: index}, options, rules, missing):
            return completed
    return None


def _allowed(rule: Rule, case: _Indexed, options: Mapping[str, Sequence[Any]]) -> bool:
    if any(name not in case for name in rule.names):
        return True
    return rule.allows(*(options[name][case[name]] for name in rule.names))
