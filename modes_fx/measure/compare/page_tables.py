"""The tables of a comparison's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modes_fx.measure.page.markup import ABSENT, between, paragraph, percent, short, table, target, times

_PARTS = {
    "threshold": "threshold only",
    "gmlg": "GMLG",
    "dmt": "DMT",
    "modes": "GMLG + DMT, γ = 1",
    "tempered": "tempered GMLG + DMT",
}
_MEANT = (
    "GMLG scales a layer's routing weights by its importance α; DMT gives text and visual tokens thresholds of their own; "
    "tempering raises α to a power γ that the search chooses."
)


def name_of(row: Mapping[str, Any]) -> str:
    """Return a rule's name in a sentence."""
    return _PARTS.get(row["rule"], str(row["title"]))


def decoded(facts: Mapping[str, Any]) -> bool:
    """Return whether decode steps were compared, by the experts that they read."""
    return any(model.get("phase") == "decode" for model in facts["models"].values())


def counted(facts: Mapping[str, Any]) -> str:
    """Return what is skipped or not."""
    return "experts read in decode steps" if decoded(facts) else "expert calls"


def ablation(facts: Mapping[str, Any]) -> list[str]:
    """Return the KL divergence and what is retained for each part of the method, by target."""
    rows, targets = facts["rows"], list(dict.fromkeys(row["target"] for row in facts["rows"]))
    present = [rule for rule in _PARTS if any(row["rule"] == rule for row in rows)]
    if len(present) < 2:
        return [paragraph(f"Needs the rules {', '.join(_PARTS)}: --rules {' '.join(_PARTS)}.", "missing")]
    by_key = {(row["rule"], row["target"]): row for row in rows}
    cells, best = [], []
    for column, at in enumerate(targets):
        found = {rule: by_key[rule, at]["metrics"] for rule in present}
        if any(found.values()):
            least = min((rule for rule in present if found[rule]), key=lambda rule: found[rule]["kl"])
            best.append((present.index(least), 2 * column))
        kept = {rule: metrics["retained"] for rule, metrics in found.items() if "retained" in metrics}
        best += [(present.index(rule), 2 * column + 1) for rule in kept if kept[rule] == max(kept.values())]
    for rule in present:
        values = (value for at in targets for value in _short_cells(by_key[rule, at]))
        cells.append((_PARTS[rule], *values))
    groups = [("", ()), *((target(at), ("KL", "retained")) for at in targets)]
    return [paragraph(_MEANT), table("What each part adds", groups, cells, best)]


def everything(facts: Mapping[str, Any]) -> list[str]:
    """Return all rows, by target; the least KL divergence of each stands out."""
    rows = facts["rows"]
    timed = any(row["speed"] for row in rows)
    ratios: tuple[str, ...] = ("all", "text", "vision", "prefill", "decode") if timed else ("all", "text", "vision")
    if decoded(facts):
        ratios = ("all", "decode")  # of experts, and of pairs
    own = next(iter(facts["models"].values()))["own"]
    cells: list[Sequence[str]] = []
    best, strong = [], []
    for at in dict.fromkeys(row["target"] for row in rows):
        cells.append((f"Target {target(at)}",))
        here = [row for row in rows if row["target"] == at]
        least = min((row["metrics"]["kl"] for row in here if row["metrics"]), default=None)
        for row in here:
            if row["rule"] == own:
                strong.append(len(cells))
            if row["metrics"] and row["metrics"]["kl"] == least:
                best.append((len(cells), len(ratios)))
            cells.append(_cells(row, ratios, timed))
    groups = [
        ("Rule", ()),
        ("Experts unread", ("", "pairs skipped")) if decoded(facts) else ("Expert calls skipped", ratios),
        ("KL, nats", ("", "interval")),
        ("Flips", ()),
        ("Score", ()),
        ("Retained, %", ("", "interval")),
        *([("Speed", ("prefill", "decode"))] if timed else []),
        ("Thresholds", ("γ", "τ text", "τ vision")),
    ]
    said = "Prefill and decode: of the timed prompts. " if timed else ""
    said += "Flips: answer tokens whose most likely token changes."
    if any(row["status"] == "overshot" for row in rows):
        said += " Marked ↑: the rule has no setting nearer above its target."
    return [table("All rules", groups, cells, best, strong), paragraph(said, "quiet")]


def thresholds(chosen: Sequence[Mapping[str, Any]]) -> str:
    """Return the points in use; their thresholds are those of the search, scaled down to the target."""
    rows = [
        (
            target(point["target"]), *(short(point[name]) for name in ("gamma", "tau_text", "tau_vision")),
            *(percent(point["skipped"].get(name)) for name in ("calibration", "all")), short(point["metrics"]["kl"]),
        )
        for point in chosen
    ]  # fmt: skip
    groups = [("Target", ()), ("In use", ("γ", "τ text", "τ vision")), ("Skipped", ("calibration", "test")), ("KL, test", ())]
    return table("Points in use", groups, rows)


def _cells(row: Mapping[str, Any], names: Sequence[str], timed: bool) -> tuple[str, ...]:
    width = len(names) + 6 + 2 * timed + 3
    if not row["metrics"]:
        return (str(row["title"]), f"at most {percent(row['largest'])}", *[""] * (width - 1))
    skipped, metrics, ends, point = row["skipped"], row["metrics"], row["intervals"], row["point"]
    ratios = [percent(skipped.get(name)) for name in names]
    if row["status"] == "overshot":
        ratios[0] += " ↑"
    kl = ends.get("kl")
    said = [
        *ratios, short(metrics["kl"]), f"{short(kl[0])}–{short(kl[1])}" if kl else "", percent(metrics["flips"]),
        percent(metrics["score"]), percent(metrics.get("retained")).rstrip("%"), between(ends.get("retained")),
    ]  # fmt: skip
    said += [times(row["speed"].get(phase)) for phase in ("prefill", "decode")] if timed else []
    said += [short(point[name]) if name in point else ABSENT for name in ("gamma", "tau_text", "tau_vision")]
    return (str(row["title"]), *said)


def _short_cells(row: Mapping[str, Any]) -> tuple[str, str]:
    if not row["metrics"]:
        return f"≤ {percent(row['largest'], 0)}", ABSENT
    return short(row["metrics"]["kl"]), percent(row["metrics"].get("retained"))
