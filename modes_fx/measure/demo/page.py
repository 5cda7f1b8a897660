"""The demo's report as a page, from what its ``report.json`` holds and a close look at its largest target."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from modes_fx.measure.page import charts
from modes_fx.measure.page.closeup import Closeup
from modes_fx.measure.page.document import section, write_page
from modes_fx.measure.page.figures import Drawing, figures
from modes_fx.measure.page.lines import Line, draw_lines, logarithmic, retained
from modes_fx.measure.page.markup import ABSENT, cards, columns_of_facts, lines, paragraph, percent, short, table, target, times
from modes_fx.measure.page.tokens import pictures

_RULE = (
    "A token's expert is skipped where α^γ · weight < τ: its routing weight, scaled by the layer's importance α for text or "
    "for visual tokens, is below that modality's threshold. Thresholds and γ were chosen on calibration data."
)


def write_demo_page(report: Mapping[str, Any], closeup: Closeup | None, path: Path) -> Path:
    """Write the demo's report as a self-contained HTML file.

    Args:
        report: What the demo measured, as in its ``report.json``.
        closeup: Of the largest target; None leaves it out.
        path: The file to write.

    Returns:
        The path written.
    """
    model = report["model"]
    facts = (
        f"{model['name']}: {model['layers']} MoE layers, {model['experts']} experts each, {model['top_k']} per token, "
        f"{model['parameters'] / 1e6:.1f} million parameters, {model['dtype']}."
    )
    samples = "" if closeup is None else pictures(closeup)
    return write_page(
        path,
        "modes-fx demo",
        facts,
        (
            _headline(report),
            section("Targets", paragraph(f"{_RULE} On the test split the unskipped model's accuracy is "
                                         f"{percent(report['dense']['accuracy'])}."), _targets(report)),
            section("Quality", figures(_quality(report))),
            section("Speed", _speed(report)),
            section("Layers", figures(_layers(report, closeup))),
            section("Search for thresholds", *_search(report)),
            section("Samples", samples),
            section("How it was measured", *_measured(report)),
        ),
    )  # fmt: skip


def _headline(report: Mapping[str, Any]) -> str:
    targets, dense, sites, search = report["targets"], report["dense"], report["sites"], report["search"]
    if not targets:
        return section("No target was reached", paragraph("No target skip ratio was reached."))
    top = max(targets, key=lambda each: each["target"])
    accuracies = f"{percent(top['accuracy'])} against {percent(dense['accuracy'])}, n = {dense['n']:,}"
    rejected = f"; {sites['rejected']} rejected" if sites["rejected"] else ""
    values = [
        (percent(top["realised"]["test"]), "of expert calls skipped on the test split"),
        (percent(top["retained"]), f"of the unskipped model's accuracy retained: {accuracies}"),
        _divergence(top, report),
        (f"{sites['rewritten']} of {sites['found']}", f"routing sites rewritten{rejected}"),
        (f"{search['evaluations']:,}", f"search evaluations, against {search['exhaustive']:,} for an exhaustive search"),
    ]
    return section(f"At the highest target, {target(top['target'])}", cards(values))


def _divergence(top: Mapping[str, Any], report: Mapping[str, Any]) -> tuple[str, str]:
    """The headline on KL: against the static rule whose skip ratio is nearest to the target's."""
    kl, rules = top["kl"]["test"], [rule for rule in report.get("reduce_k") or [] if rule["kl"]]
    if not rules or not kl:
        return short(kl), "nats of KL divergence from the unskipped model, test split"
    rule = min(rules, key=lambda rule: abs(rule["ratio"] - top["target"]))
    than = f"than keeping the top {rule['k']} of {report['model']['top_k']} experts, which skips {target(rule['ratio'])}"
    values = f"{short(kl)} against {short(rule['kl'])} nats"
    said = f"{times(rule['kl'] / kl)} less" if kl <= rule["kl"] else f"{times(kl / rule['kl'])} more"
    return said, f"KL divergence from the unskipped model {than}: {values}"


def _targets(report: Mapping[str, Any]) -> str:
    groups = (
        ("Target", ()),
        ("Thresholds", ("γ", "τ text", "τ vision")),
        ("Expert calls skipped", ("calibration", "test", "text tokens", "visual tokens")),
        ("KL, nats", ("calibration", "test")),
        ("Answers, test", ("accuracy", "retained")),
    )
    rows = []
    for each in report["targets"]:
        realised, kl = each["realised"], each["kl"]
        thresholds = (short(each["gamma"]), short(each["tau"]["text"]), short(each["tau"]["vision"]))
        skipped = (percent(realised.get(key)) for key in ("calibration", "test", "text", "vision"))
        divergence = (short(kl.get("calibration")), short(kl.get("test")))
        rows.append((target(each["target"]), *thresholds, *skipped, *divergence, *_answers(each["accuracy"], report)))
    parts = [table("Targets", groups, rows)]
    if report.get("reduce_k"):
        static = [
            (f"k = {rule['k']}", percent(rule["ratio"]), short(rule["kl"]), *_answers(rule["accuracy"], report))
            for rule in report["reduce_k"]
        ]
        columns = ("Reduce-k", "Expert calls skipped", "KL, nats", "Accuracy", "Retained")
        parts += [
            paragraph("For comparison, the static rule that keeps the k largest experts of every token, on the test split:"),
            table("Static rule", [(column, ()) for column in columns], static),
        ]
    return lines(parts)


def _answers(accuracy: float | None, report: Mapping[str, Any]) -> tuple[str, str]:
    dense = report["dense"]["accuracy"]
    return percent(accuracy), percent(accuracy / dense if accuracy is not None and dense else None)


def _quality(report: Mapping[str, Any]) -> list[Drawing]:
    dense = report["dense"]["accuracy"]
    ours = [(each["realised"]["test"], each["kl"]["test"], each["accuracy"]) for each in report["targets"]]
    static = [(rule["ratio"], rule["kl"], rule["accuracy"]) for rule in report.get("reduce_k") or []]
    found: list[list[Line]] = [[], []]
    for name, points in (("modes-fx", ours), ("Reduce-k", static)):
        known = sorted(point for point in points if None not in point)
        for column, kept in ((1, [point[1] for point in known]), (2, [point[2] / dense for point in known if dense])):
            if kept:
                found[column - 1].append(Line(name, [point[0] for point in known], kept, own=name == "modes-fx"))
    titles = (
        ("KL divergence, nats an answer token, log scale", logarithmic, "Lower is better.", None),
        (
            "Accuracy retained, % of the unskipped model's",
            retained,
            "Higher is better. Stretched near 100%.",
            (1.0, "all kept"),
        ),
    )
    return [
        Drawing(title, draw_lines(each, scale, level), caption)
        for (title, scale, caption, level), each in zip(titles, found, strict=True)
        if each
    ]


def _layers(report: Mapping[str, Any], closeup: Closeup | None) -> list[Drawing]:
    rows: dict[str, Any] = {
        f"{target(each['target'])} {name}": each["by_layer"][name] for each in report["targets"] for name in ("text", "vision")
    }
    caption = "Prefill of the test split, at each target."
    if closeup is not None and "text decode" in closeup.by_layer:
        rows["decoding"] = closeup.by_layer["text decode"]
        caption = "Prefill of the test split, at each target; decoding of the samples' answers below, at the highest."
    return [charts.alpha(report["alpha"], report["layers"]), charts.skipping(rows, report["layers"], caption)]


def _search(report: Mapping[str, Any]) -> list[str]:
    trials = report["search"].get("trials") or []
    chosen = [
        {"target": each["target"], "gamma": each["gamma"], **{f"tau_{name}": tau for name, tau in each["tau"].items()}}
        for each in report["targets"]
    ]
    if not trials:
        return []
    return [
        figures([charts.frontier(trials, chosen)]),
        charts.plane_key(trials),
        figures(charts.planes(trials, chosen), kind="plots small"),
    ]


def _speed(report: Mapping[str, Any]) -> str:
    speed = report.get("speed")
    if not speed:
        return ""
    phases = (("Prefill", speed["prefill_ms"], "ms"), ("Decode", speed["decode_ms_per_token"], "ms/token"))
    rows: list[list[str]] = []
    best = []
    for setting in dict.fromkeys(key for _, found, _ in phases for key in found):  # each once, in the order given
        row = [setting]
        for column, (_, found, _) in enumerate(phases):
            here, stock = found.get(setting), _fastest(found, stock=True)
            row += [short(here), times(found[stock] / here) if here and stock else ABSENT]
            if here and here == min(time for time in found.values() if time):
                best.append((len(rows), 2 * column))
        rows.append(row)
    groups = [("Setting", ()), *((phase, (unit, "speed")) for phase, _, unit in phases)]
    sentences = (f"<p>{escape(_compare(*phase))}</p>" for phase in phases)
    note = paragraph("Speed is against the fastest stock setting of the same column: above 1 is faster than it.", "quiet")
    return lines([*sentences, table("Speed", groups, rows, best), note])


def _compare(phase: str, found: Mapping[str, float | None], unit: str) -> str:
    stock, ours = _fastest(found, stock=True), _fastest(found, stock=False)
    if stock is None or ours is None:
        return f"{phase}: not measured for both stock and modes-fx."
    stock_time, our_time = found[stock] or 0.0, found[ours] or 0.0
    if our_time < stock_time:
        times_as_fast = f"{times(stock_time / our_time)} as fast as the fastest stock setting"
        return f"{phase}: the fastest is {ours}, {short(our_time)} {unit}, {times_as_fast} ({stock}, {short(stock_time)})."
    slower = f"modes-fx is slower: its fastest ({ours}, {short(our_time)}) takes {times(our_time / stock_time)} as long"
    return f"{phase}: the fastest is {stock}, {short(stock_time)} {unit}; {slower}."


def _fastest(found: Mapping[str, float | None], *, stock: bool) -> str | None:
    known = {key: time for key, time in found.items() if time and key.startswith("stock") == stock}
    return min(known, key=known.__getitem__, default=None)


def _measured(report: Mapping[str, Any]) -> list[str]:
    said = "Thresholds are chosen on calibration data; accuracy and KL are of a test split that shares no image with it."
    if count := report["search"]["violations"]:
        said += (
            f" The search assumes that a higher threshold never lowers the KL or the skip ratio; it saw {count:,} exceptions. "
            "Each target is still met by its own evaluation, but a better point may have been missed."
        )
    setup, seconds, versions = ((report.get(key) or {}) for key in ("speed", "seconds", "versions"))
    groups = {
        "Speed setup": {key.replace("_", " "): value for key, value in (setup.get("setup") or {}).items()},
        "Seconds": {key: short(value) for key, value in seconds.items()},
        "Versions": {key.replace("_", "-"): value for key, value in versions.items()},
    }
    return [paragraph(said), columns_of_facts(groups)]
