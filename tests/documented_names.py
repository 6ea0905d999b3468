"""Names of docs/tracking.md and docs/evaluation.md, to compare with what runs have left."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from tests.running_services import ROOT, STAGES

PAGE = ROOT / "docs" / "tracking.md"
EVALUATION = ROOT / "docs" / "evaluation.md"
MEANS = ("loss", "accuracy", "i2v_loss", "i2v_accuracy", "async_loss", "async_accuracy")
PLACEHOLDERS = {
    "stage": STAGES,
    "mean": MEANS,
    "split": ("train", "validation"),
}
NUMBERS = {
    "t": r"0\.\d+",
    "frame": r"\d+",
    "step": r"\d+",
    "number": r"\d+",
    "clip": r"[\w-]+",
    "scorer": r"[a-z-]+",
    "score": r"[\d.]+",
    "N": r"\d+",
    "measure": r"[\w./-]+",
}


class Documented(NamedTuple):
    """Names of a section, as expressions: of every run, and of some."""

    always: tuple[str, ...]
    sometimes: tuple[str, ...]

    def check(self, found: set[str]) -> None:
        """Fail unless these names, and no others, were found."""
        assert not self.unknown(found), f"without a row in {PAGE}"
        gone = [one for one in self.always if not any(re.fullmatch(one, name) for name in found)]
        assert not gone, f"in {PAGE}, but the run has none"

    def unknown(self, found: set[str]) -> set[str]:
        """Return the names that no row has."""
        known = (*self.always, *self.sometimes)
        return {name for name in found if not any(re.fullmatch(one, name) for one in known)}


def section(title: str, page: Path = PAGE) -> str:
    text = page.read_text("utf-8")
    return re.split(r"^## ", text.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def expressions(name: str) -> list[str]:
    """Return the names that a name with placeholders stands for, as regular expressions."""
    for key, values in PLACEHOLDERS.items():
        if f"<{key}>" in name:
            return [
                one for value in values for one in expressions(name.replace(f"<{key}>", value, 1))
            ]
    parts = re.split(r"<(\w+)>", name)
    return ["".join(NUMBERS[p] if i % 2 else re.escape(p) for i, p in enumerate(parts))]


def names(text: str, column: int = 1) -> tuple[str, ...]:
    """Return the names in one column of all tables of a text."""
    cells = [line.split("|")[column] for line in text.splitlines() if line.startswith("| ")]
    found = [name for cell in cells for name in re.findall("`([^`]+)`", cell)]
    assert len(found) == len(set(found)), "a name has two rows"
    return tuple(one for name in found for one in expressions(name))


def documented(title: str) -> Documented:
    always, _, sometimes = section(title).partition("Only in some runs:")
    beside = re.findall("`([^`]+)`", sometimes.splitlines()[0]) if sometimes else []
    more = [one for name in beside for one in expressions(name)]
    return Documented(names(always), (*names(sometimes), *more))


def documented_metrics() -> Documented:
    """Return the names of metrics, those that have a page of their own among them."""
    always, sometimes = documented("Metrics")
    measured = [f"eval/{one}" for one in names(section("Metrics", EVALUATION))]
    ends = [f"{one}_(low|high)" for one in measured]
    return Documented((*always, *measured), (*sometimes, *ends))


def metric_names(runs: dict[str, dict[str, Any]]) -> set[str]:
    """Return the names of all metrics of some runs."""
    return {item["key"] for run in runs.values() for item in run["data"].get("metrics", [])}
