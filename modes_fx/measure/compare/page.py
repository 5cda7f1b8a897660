"""The comparison as a page to look at, from what ``compare.json`` holds and a close look at one plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modes_fx.measure.compare import page_tables
from modes_fx.measure.compare.rows import short_names
from modes_fx.measure.page import charts
from modes_fx.measure.page.closeup import Closeup
from modes_fx.measure.page.document import section, write_page
from modes_fx.measure.page.figures import Drawing, figures
from modes_fx.measure.page.lines import Line, draw_lines, factor, logarithmic, retained
from modes_fx.measure.page.markup import between, cards, columns_of_facts, paragraph, percent, short, target, times
from modes_fx.measure.page.tokens import pictures

Facts = Mapping[str, Any]
_NO_SAMPLES = (
    "No samples: the rule to look at closely reaches no target (lower --targets), or the model could not answer them, of which "
    "the command told."
)
_NOT_IN_DECODE = "No samples: they are shown where prefills are compared (--phase prefill)."
_TALL_IN = (4.2, 3.5)  # room for the names of many rules


def write_comparison_page(facts: Facts, closeup: Closeup | None, path: Path) -> Path:
    """Write a comparison as one self-contained HTML file; what was not measured is left out, and said so.

    Args:
        facts: As in ``compare.json``.
        closeup: Of the first model's own rule at the largest target that it reaches; None where it reaches none.
        path: The file to write.

    Returns:
        The path written.
    """
    return write_page(
        path,
        "modes-fx comparison",
        _subtitle(facts),
        (
            _headline(facts),
            section("Quality", figures(_quality(facts)), _note_on_intervals(facts)),
            section("Speed", *_speed(facts)),
            section("What each part adds", *page_tables.ablation(facts)),
            section("Layers", *_layers(facts, closeup)),
            section("Search for thresholds", *_search(facts)),
            section("Samples", *_samples(facts, closeup)),
            section("All rules", *page_tables.everything(facts)),
            section("How it was measured", *_measured(facts)),
        ),
    )


def _subtitle(facts: Facts) -> str:
    models, samples = facts["models"], next(iter(facts["models"].values()))["samples"]
    names = ", ".join(short_names(models).values())
    several = f"mean of {len(models)} models ({names})" if len(models) > 1 else names
    rules = len({row["rule"] for row in facts["rows"]})
    at = "decode steps that read equally many experts" if page_tables.decoded(facts) else "at equal skip ratios"
    return f"{several}: {rules} rule{'s' * (rules > 1)}, {at}, on {samples:,} test samples."


def _headline(facts: Facts) -> str:
    met = [row for row in facts["rows"] if row["metrics"]]
    if not met:
        return section("No target was reached", paragraph("No rule can skip as much as was asked for: lower --targets."))
    most = max(row["target"] for row in met)
    best = min((row for row in met if row["target"] == most), key=lambda row: row["metrics"]["kl"])
    metrics, skipped = best["metrics"], best["skipped"]
    values = [
        (percent(skipped["all"]), f"of the {page_tables.counted(facts)} on test data are skipped"),
        (short(metrics["kl"]), "nats of KL divergence from the unskipped model, an answer token"),
    ]
    if "retained" in metrics:
        ends = between(best["intervals"].get("retained"))
        values.insert(1, (percent(metrics["retained"]), f"of the unskipped score is retained ({ends}%)"))
    for phase, said in (("prefill", "as fast as stock's fastest setting in prefill"), ("decode", "as fast in decoding")):
        if not math.isnan(best["speed"].get(phase, math.nan)):
            share = f", where {percent(skipped[phase])} are skipped" if phase in skipped else ""
            values.append((times(best["speed"][phase]), said + share))
    rivals = [row for row in met if row["target"] == most and row["rule"] != best["rule"]]
    name = page_tables.name_of(best)
    said = f"Of the rules compared, only {name} skips as much."
    if rivals:
        second = min(rivals, key=lambda row: row["metrics"]["kl"])
        said = f"With {name}, the answers change least of the {len(rivals) + 1} rules that skip as much. "
        said += f"Next is {page_tables.name_of(second)}, with a KL divergence of {short(second['metrics']['kl'])}"
        said += f" and {percent(second['metrics']['retained'])} retained." if "retained" in second["metrics"] else "."
    return section(f"At {target(most)}, the largest target met", paragraph(said), cards(values))


def _quality(facts: Facts) -> list[Drawing]:
    drawings = []
    for metric, title, scale, caption in (
        ("kl", "KL divergence, nats an answer token, log scale", logarithmic, "Lower is better."),
        ("retained", "Score retained, % of the unskipped model's", retained, "Higher is better. Stretched near 100%."),
    ):
        found = _lines_of(facts, "metrics", metric, "all")
        if found:
            level = (1.0, "unskipped") if metric == "retained" else None
            drawings.append(Drawing(title, draw_lines(found, scale, level), caption, _TALL_IN))
    return drawings


def _speed(facts: Facts) -> list[str]:
    if not any(row["speed"] for row in facts["rows"]):
        said = "Not timed. The option --speed times prefill and decoding against stock, each in its fastest setting."
        return [paragraph(said, "missing")]
    drawings, caption = [], "Higher is better. Bars go from the slowest to the fastest round."
    for phase, said in (("prefill", "Prefill"), ("decode", "Decoding")):
        found = _lines_of(facts, "speed", phase, phase)
        if found:
            title = f"{said}, times as fast as stock's fastest"
            drawings.append(Drawing(title, draw_lines(found, factor, (1.0, "stock")), caption, _TALL_IN))
    return [figures(drawings)]


def _lines_of(facts: Facts, table: str, name: str, ratio: str) -> list[Line]:
    """Return one line a rule that was measured at all."""
    own, models = _own(facts), facts["models"]
    found = []
    for rule in dict.fromkeys(row["rule"] for row in facts["rows"]):
        rows = [row for row in facts["rows"] if row["rule"] == rule and name in row[table] and ratio in row["skipped"]]
        rows = [row for row in rows if not math.isnan(row[table][name])]
        rows.sort(key=lambda row: row["skipped"][ratio])
        if not rows:
            continue
        known = "speed_range" if table == "speed" else "intervals"
        ends = tuple((row[known][name][0], row[known][name][1]) for row in rows if name in row[known])
        each = [row for model in models.values() for row in model["rows"] if row["rule"] == rule] if len(models) > 1 else []
        shown = (row for row in each if name in row[table] and ratio in row["skipped"])
        single = tuple((row["skipped"][ratio], row[table][name]) for row in shown)
        x, y = [row["skipped"][ratio] for row in rows], [row[table][name] for row in rows]
        found.append(Line(rows[0]["title"], x, y, ends if len(ends) == len(rows) else (), single, rule == own))
    return found


def _layers(facts: Facts, closeup: Closeup | None) -> list[str]:
    first = next(iter(facts["models"].values()))
    parts, drawings = [], []
    if first["alpha"]:
        drawings.append(charts.alpha(first["alpha"], first["layers"]))
    else:
        said = "No rule takes the importance of layers. --rules gmlg, modes or tempered measures it."
        parts.append(paragraph(said, "missing"))
    if closeup is not None:
        caption = f"{_shown(facts)}. Prefill of the test data; decoding of the samples' answers below."
        drawings.append(charts.skipping(closeup.by_layer, first["layers"], caption))
    return [figures(drawings), *parts]


def _search(facts: Facts) -> list[str]:
    own, first = _own(facts), next(iter(facts["models"].values()))
    name = own if own in first["trials"] else next(iter(first["trials"]), None)
    if name is None:
        return [paragraph("No pairs of thresholds were searched for. --rules tempered, modes or dmt searches.", "missing")]
    trials = first["trials"][name]
    rows = [row for row in first["rows"] if row["rule"] == name]
    chosen = [{**row["point"], **{key: row[key] for key in ("target", "skipped", "metrics")}} for row in rows if row["point"]]
    said = f"For {page_tables.name_of(rows[0])}: a threshold for text and one for visual tokens, and the exponent γ of α."
    return [
        paragraph(said),
        figures([charts.frontier(trials, chosen)], page_tables.thresholds(chosen)),
        "<h3>All thresholds tried</h3>",
        charts.plane_key(trials),
        figures(charts.planes(trials, chosen), kind="plots small"),
    ]


def _samples(facts: Facts, closeup: Closeup | None) -> list[str]:
    if closeup is None:
        return [paragraph(_NOT_IN_DECODE if page_tables.decoded(facts) else _NO_SAMPLES, "missing")]
    return [paragraph(f"Answers with all experts, and with {_shown(facts)}."), pictures(closeup)]


def _shown(facts: Facts) -> str:
    first_name, first = next(iter(facts["models"].items()))
    names = short_names(facts["models"])
    row = max((row for row in first["rows"] if row["rule"] == first["own"] and row["metrics"]), key=lambda row: row["target"])
    of = f" of {names[first_name]}" if len(facts["models"]) > 1 else ""
    return f"{page_tables.name_of(row)} at {target(row['target'])}{of}"


def _note_on_intervals(facts: Facts) -> str:
    if len(facts["models"]) > 1:
        number = len(facts["models"])
        said = f"Lines are means over {number} models, faint dots the models; bands and bars are 95% intervals of the mean (t)."
    else:
        said = "Bands and bars are 95% intervals over samples, by a paired bootstrap."
    return paragraph(said + " A line ends where its rule cannot skip more.", "quiet")


def _measured(facts: Facts) -> list[str]:
    settings, timing = facts["settings"], next(iter(facts["models"].values()))["timing"]
    groups: dict[str, dict[str, object]] = {
        "Settings": {
            name.replace("_", " "): settings[name] for name in ("importance_mode", "grid_size", "tolerance", "seed", "dtype")
            if name in settings
        },
        "Data, hashes": dict(settings.get("data_hash", {})),
        "Unskipped score": {
            short: percent(facts["models"][name]["unskipped"]["score"]) for name, short in short_names(facts["models"]).items()
        },
        "Stock's fastest": timing.get("fastest", {}),
        "Our fastest, nothing skipped": timing.get("ours", {}),
        "Versions": {name.replace("_", "-"): value for name, value in settings.get("versions", {}).items()},
    }  # fmt: skip
    what = "Skipped are experts that a decode step does not read, of those that the unskipped model's read. "
    said = (what if page_tables.decoded(facts) else "") + (
        "Each rule is tuned on calibration data to skip at least its target, and measured on test data that it never saw. All "
        "are compiled into the model and really skip."
    )
    return [paragraph(said), columns_of_facts(groups)]


def _own(facts: Facts) -> str:
    return str(next(iter(facts["models"].values()))["own"])
