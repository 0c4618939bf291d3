"""Two reports beside each other: ratios of medians with intervals, and whether a difference is more than chance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from ming_trt.bench.load import Load
from ming_trt.bench.metrics import Metric, Slo, metrics
from ming_trt.bench.run import KIND, SCHEMA
from ming_trt.bench.samples import Sample
from ming_trt.bench.stats import holm, mann_whitney, ratio_of_medians
from ming_trt.errors import InputError

# A difference is called one if chance alone would show it, anywhere in the table, at most this often.
ALPHA = 0.05
# Fewer requests than this on a side cannot tell anything.
LEAST = 5
REPORT = "report.json"
# A gap is one of many of its request: requests are what is independent, so their means are compared by `itl`.
_COMPARED = ("ttft", "itl", "e2e", "prompt_tokens_per_s", "ttfa", "rtf", "image")


@dataclass(frozen=True, slots=True)
class Change:
    """One metric at one load: medians, B / A with its interval, the corrected p-value, and the verdict ("faster",
    "slower", "no difference", "too few requests")."""

    scenario: str
    load: str
    metric: str
    unit: str
    a: float
    b: float
    ratio: float
    low: float
    high: float
    p: float
    verdict: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """All changes; errors of each side by scenario and load; what stands in one report only."""

    changes: tuple[Change, ...]
    errors: tuple[Mapping[str, Any], ...]
    unmatched: tuple[str, ...]
    differences: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def read_report(path: Path) -> dict[str, Any]:
    """A report by its file or folder. Raises `InputError` if it is none."""
    file = path / REPORT if path.is_dir() else path
    try:
        report = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"'{file}' cannot be read ({error.strerror}): give a report of `ming-trt bench -o`") from None
    except ValueError:
        raise InputError(f"'{file}' is not JSON: give the {REPORT} of `ming-trt bench -o`") from None
    if not isinstance(report, dict) or report.get("kind") != KIND:
        raise InputError(f"'{file}' is no report of `ming-trt bench`: give the {REPORT} that it wrote")
    if report.get("schema") != SCHEMA:
        raise InputError(f"'{file}' has schema {report.get('schema')}, and this ming-trt reads {SCHEMA}: measure again")
    return report


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    """Report `b` against report `a`, load by load. Rates that were chosen by throughput match by their order.

    Raises `InputError` if they have no load in common.
    """
    one, two = _by_load(a), _by_load(b)
    common = [key for key in one if key in two]
    if not common:
        raise InputError("the two reports have no scenario and load in common: measure both with the same options")
    drafts, errors = [], []
    for key in common:
        counted = [len([s for s in side[key]["samples"] if s["error"]]) for side in (one, two)]
        if any(counted):
            errors.append({"scenario": key[0], "load": key[1], "a": counted[0], "b": counted[1]})
        drafts += _changes(key, one[key], two[key])
    told = _that_can_tell(drafts)
    corrected = dict(zip(told, holm([drafts[i].p for i in told]), strict=True))
    changes = [_judged(draft, corrected.get(i)) for i, draft in enumerate(drafts)]
    unmatched = [f"{name}, {load}: only in {side}" for side, own, other in (("A", one, two), ("B", two, one))
                 for name, load in own if (name, load) not in other]  # fmt: skip
    return Comparison(tuple(changes), tuple(errors), tuple(unmatched), tuple(_differences(a, b)))


_FEW = "too few requests"
_Key = tuple[str, str]


def _by_load(report: Mapping[str, Any]) -> dict[_Key, Mapping[str, Any]]:
    found: dict[_Key, Mapping[str, Any]] = {}
    auto = report["options"]["rates"] == "auto"
    rates: dict[str, int] = {}
    for point in report["points"]:
        name, load = point["scenario"], Load(**point["load"])
        label = str(load)
        if load.kind == "rate" and auto:
            rates[name] = rates.get(name, 0) + 1
            label = f"rate {rates[name]}"
        found[name, label] = point
    return found


@dataclass(frozen=True, slots=True)
class _Draft:
    """A change before its p-value is corrected: `p`, and the `least` that as many requests can have at all."""

    change: Change
    p: float
    least: float


def _that_can_tell(drafts: Sequence[_Draft]) -> list[int]:
    """Those with requests enough to show a difference among so many comparisons, if there was one."""
    told = [i for i, draft in enumerate(drafts) if draft.least < ALPHA]
    while any(drafts[i].least * len(told) >= ALPHA for i in told):
        told = [i for i in told if drafts[i].least * len(told) < ALPHA]
    return told


def _changes(key: _Key, one: Mapping[str, Any], two: Mapping[str, Any]) -> list[_Draft]:
    found = []
    sides = [[Sample.from_dict(s) for s in point["samples"] if not s["error"]] for point in (one, two)]
    chosen: list[Metric] = [metric for metric in metrics(Slo()) if metric.name in _COMPARED]
    for metric in chosen:
        a, b = ([value for sample in side for value in metric.of(sample)] for side in sides)
        if not (a and b):
            continue
        ratio = ratio_of_medians(a, b)
        few = min(len(a), len(b)) < LEAST
        verdict = "faster" if (ratio.value < 1) == metric.lower_is_better else "slower"
        scenario, load = key
        numbers = (ratio.value, ratio.low, ratio.high, 1.0)
        change = Change(scenario, load, metric.name, metric.unit, median(a), median(b), *numbers, verdict)
        # no sample of these sizes differs more than one that lies above all of the other
        least = 1.0 if few else mann_whitney(range(len(a)), range(len(a), len(a) + len(b)))
        found.append(_Draft(change, mann_whitney(a, b), least))
    return found


def _judged(draft: _Draft, p: float | None) -> Change:
    if p is None:
        return replace(draft.change, verdict=_FEW)
    return replace(draft.change, p=p, verdict=draft.change.verdict if p < ALPHA else "no difference")


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What else was not the same."""
    found = []
    for section, key, label in (
        ("environment", "processor", "processor"),
        ("environment", "cores", "cores"),
        ("server", "version", "server"),
        ("options", "max_tokens", "tokens of an answer"),
        ("options", "steps", "steps of a picture"),
        ("options", "seed", "seed"),
        ("options", "media", "media"),
        ("manifest", "sha256", "manifest"),
    ):
        one, two = ((report[section] or {}).get(key, "unknown") for report in (a, b))
        if one != two:
            found.append(f"{label}: {one} and {two}")
    return found
