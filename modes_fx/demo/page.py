"""The demo's report as one HTML file that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from modes_fx.files import write_atomically

_Groups = Sequence[tuple[str, Sequence[str]]]  # headings of columns, each with the headings below it
_ABSENT = "–"  # noqa: RUF001 - an en dash, as printed tables have it
_CAPTIONS = {
    "alpha": ("Layer importance", "How much the answers change when one layer's experts are left out, for either modality."),
    "thresholds": (
        "Search",
        "All pairs of thresholds evaluated on calibration data; rings mark the pairs chosen for the targets.",
    ),
    "skip_by_layer": ("Skipping by layer", "The share of expert calls skipped in each layer, for each target."),
    "quality": ("Quality", "What skipping costs: modes-fx against the static rule that keeps every token's k largest experts."),
}


def write_page(report: Mapping[str, Any], plots: Mapping[str, Path], path: Path) -> Path:
    """Write the demo's report as a self-contained HTML file.

    Args:
        report: What the demo measured, as in its ``report.json``.
        plots: PNG files by name, from ``save_plots``; embedded. A plot that is missing is left out.
        path: The file to write.

    Returns:
        The path written.
    """
    model = report["model"]
    facts = (
        f"{model['name']}: {model['layers']} MoE layers, {model['experts']} experts each, {model['top_k']} per token, "
        f"{model['parameters'] / 1e6:.1f} million parameters, {model['dtype']}."
    )
    page = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        title="modes-fx demo",
        model=escape(facts),
        headline=_headline(report),
        dense_accuracy=_percent(report["dense"]["accuracy"]),
        targets=_targets(report),
        speed=_speed(report),
        plots=_figures(plots),
        samples=_samples(report),
        violations=_violations(report["search"]["violations"]),
        facts=_measured(report),
    )
    return write_atomically(path, page)


def _headline(report: Mapping[str, Any]) -> str:
    targets, dense, sites, search = report["targets"], report["dense"], report["sites"], report["search"]
    if not targets:
        return "<p>No target skip ratio was reached.</p>"
    top = max(targets, key=lambda target: target["target"])
    accuracies = f"{_percent(top['accuracy'])} against {_percent(dense['accuracy'])}, n = {dense['n']:,}"
    rejected = f"; {sites['rejected']} rejected" if sites["rejected"] else ""
    cards = [
        (
            _percent(top["realised"]["test"]),
            f"of expert calls skipped on the test split, for a target of {_target(top['target'])}",
        ),
        (_percent(top["retained"]), f"of the dense model's accuracy retained: {accuracies}"),
        _divergence(top, report),
        (f"{sites['rewritten']} of {sites['found']}", f"routing sites rewritten{rejected}"),
        (f"{search['evaluations']:,}", f"search evaluations, against {search['exhaustive']:,} for an exhaustive search"),
    ]
    items = (
        f'<li><span class="value">{escape(value)}</span><span class="label">{escape(label)}</span></li>'
        for value, label in cards
    )
    return f'<h2>At the highest target, {escape(_target(top["target"]))}</h2>\n<ul class="cards">\n{_lines(items)}\n</ul>'


def _divergence(target: Mapping[str, Any], report: Mapping[str, Any]) -> tuple[str, str]:
    """The headline on KL: against the static rule whose skip ratio is nearest to the target's."""
    kl, rules = target["kl"]["test"], [rule for rule in report.get("reduce_k") or [] if rule["kl"]]
    if not rules or not kl:
        return _short(kl), "nats of KL divergence from the dense model, test split"
    rule = min(rules, key=lambda rule: abs(rule["ratio"] - target["target"]))
    than = f"than keeping the top {rule['k']} of {report['model']['top_k']} experts, which skips {_target(rule['ratio'])}"
    values = f"{_short(kl)} against {_short(rule['kl'])} nats"
    times = f"{_times(rule['kl'] / kl)} less" if kl <= rule["kl"] else f"{_times(kl / rule['kl'])} more"
    return times, f"KL divergence from the dense model {than}: {values}"


def _targets(report: Mapping[str, Any]) -> str:
    groups = (
        ("Target", ()),
        ("Thresholds", ("γ", "τ text", "τ vision")),  # noqa: RUF001 - Greek on purpose
        ("Expert calls skipped", ("calibration", "test", "text tokens", "visual tokens")),
        ("KL from dense, nats", ("calibration", "test")),
        ("Answers, test", ("accuracy", "retained")),
    )
    rows = []
    for target in report["targets"]:
        realised, kl = target["realised"], target["kl"]
        thresholds = (_short(target["gamma"]), _short(target["tau"]["text"]), _short(target["tau"]["vision"]))
        skipped = (_percent(realised.get(key)) for key in ("calibration", "test", "text", "vision"))
        divergence = (_short(kl.get("calibration")), _short(kl.get("test")))
        rows.append((_target(target["target"]), *thresholds, *skipped, *divergence, *_answers(target["accuracy"], report)))
    parts = [_table("Targets", groups, rows)]
    if report.get("reduce_k"):
        static = [
            (f"k = {rule['k']}", _percent(rule["ratio"]), _short(rule["kl"]), *_answers(rule["accuracy"], report))
            for rule in report["reduce_k"]
        ]
        columns = ("Reduce-k", "Expert calls skipped", "KL from dense, nats", "Accuracy", "Retained")
        parts += [
            "<p>For comparison, the static rule that keeps the k largest experts of every token, on the test split:</p>",
            _table("Static rule", [(column, ()) for column in columns], static),
        ]
    return _lines(parts)


def _answers(accuracy: float | None, report: Mapping[str, Any]) -> tuple[str, str]:
    dense = report["dense"]["accuracy"]
    return _percent(accuracy), _percent(accuracy / dense if accuracy is not None and dense else None)


def _speed(report: Mapping[str, Any]) -> str:
    speed = report.get("speed")
    if not speed:
        return ""
    phases = (("Prefill", speed["prefill_ms"], "ms"), ("Decode", speed["decode_ms_per_token"], "ms/token"))
    rows: list[list[str]] = []
    best = []
    for setting in dict.fromkeys(key for _, times, _ in phases for key in times):  # each once, in the order given
        row = [setting]
        for column, (_, times, _) in enumerate(phases):
            here, stock = times.get(setting), _fastest(times, stock=True)
            row += [_short(here), _times(times[stock] / here) if here and stock else _ABSENT]
            if here and here == min(time for time in times.values() if time):
                best.append((len(rows), 2 * column))
        rows.append(row)
    groups = [("Setting", ()), *((phase, (unit, "speed")) for phase, _, unit in phases)]
    sentences = (f"<p>{escape(_compare(*phase))}</p>" for phase in phases)
    note = '<p class="quiet">Speed is against the fastest stock setting of the same column: above 1 is faster than it.</p>'
    return _lines(["<h2>Speed</h2>", *sentences, _table("Speed", groups, rows, best), note])


def _compare(phase: str, times: Mapping[str, float | None], unit: str) -> str:
    stock, ours = _fastest(times, stock=True), _fastest(times, stock=False)
    if stock is None or ours is None:
        return f"{phase}: not measured for both stock and modes-fx."
    stock_time, our_time = times[stock] or 0.0, times[ours] or 0.0
    if our_time < stock_time:
        times_as_fast = f"{_times(stock_time / our_time)} as fast as the fastest stock setting"
        return f"{phase}: the fastest is {ours}, {_short(our_time)} {unit}, {times_as_fast} ({stock}, {_short(stock_time)})."
    slower = f"modes-fx is slower: its fastest ({ours}, {_short(our_time)}) takes {_times(our_time / stock_time)} as long"
    return f"{phase}: the fastest is {stock}, {_short(stock_time)} {unit}; {slower}."


def _fastest(times: Mapping[str, float | None], *, stock: bool) -> str | None:
    found = {key: time for key, time in times.items() if time and key.startswith("stock") == stock}
    return min(found, key=found.__getitem__, default=None)


def _figures(plots: Mapping[str, Path]) -> str:
    figures = (
        f'<figure><div class="scroll"><img alt="{escape(title)}" src="{_data(Path(plots[name]).read_bytes())}"></div>'
        f"<figcaption><strong>{escape(title)}.</strong> {escape(caption)}</figcaption></figure>"
        for name, (title, caption) in _CAPTIONS.items()
        if name in plots
    )
    return f'<h2>Plots</h2>\n<div class="plots">\n{_lines(figures)}\n</div>' if plots else ""


def _samples(report: Mapping[str, Any]) -> str:
    samples = report.get("samples")
    if not samples:
        return ""
    maps = [grid for sample in samples for grid in (sample.get("kept") or {}).values()]
    most = max((value for grid in maps for row in grid for value in row), default=0.0) or 1.0
    scale = (
        "<p>Each square of the grey picture is one visual token; the more of its experts are still computed, the stronger "
        "its colour. Expert calls kept, mean over the layers:</p>\n"
        f'<p class="scale"><span>0</span><i></i><span>{_short(most)} of {report["model"]["top_k"]}</span></p>'
    )
    cards = (_sample(sample, most) for sample in samples)
    return f'<h2>Samples</h2>\n{scale if maps else ""}\n<div class="samples">\n{_lines(cards)}\n</div>'


def _sample(sample: Mapping[str, Any], most: float) -> str:
    picture = f"data:image/png;base64,{escape(sample['image_png'])}"
    tiles = [_tile("image", f'<image href="{picture}" width="8" height="8"/>', 8)]
    for target, grid in (sample.get("kept") or {}).items():
        tokens = "".join(
            f'<rect x="{x}" y="{y}" width="1" height="1" opacity="{0.85 * kept / most:.3f}"><title>{kept:.2f}</title></rect>'
            for y, row in enumerate(grid)
            for x, kept in enumerate(row)
        )
        side = len(grid)
        grey = f'<image class="grey" href="{picture}" width="{side}" height="{side}"/>'
        tiles.append(_tile(f"kept at {_target(float(target))}", grey + tokens, side))
    answers = [("reference", sample["answer"]), ("dense", _judged(sample["dense"], sample["answer"]))]
    for target, answer in (sample.get("skipped") or {}).items():
        answers.append((f"at {_target(float(target))}", _judged(answer, sample["answer"])))
    return (
        f'<article class="sample"><h3>{escape(sample["question"])}</h3>'
        f'<div class="row">{"".join(tiles)}{_facts(answers)}</div></article>'
    )


def _tile(caption: str, content: str, side: int) -> str:
    svg = f'<svg viewBox="0 0 {side} {side}" role="img" aria-label="{escape(caption)}">{content}</svg>'
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _judged(answer: str, reference: str) -> str:
    return f"{'✓' if answer.strip() == reference.strip() else '✗'} {answer}"


def _violations(count: int) -> str:
    text = (
        f"The search assumes that a higher threshold never lowers the KL or the skip ratio; it saw {count:,} exceptions. Each "
        "target is still met by its own evaluation, but a better point may have been missed."
    )
    return text if count else ""


def _measured(report: Mapping[str, Any]) -> str:
    setup, seconds, versions = ((report.get(key) or {}) for key in ("speed", "seconds", "versions"))
    facts = {
        "Speed setup": {key.replace("_", " "): value for key, value in (setup.get("setup") or {}).items()},
        "Seconds": {key: _short(value) for key, value in seconds.items()},
        "Versions": {key.replace("_", "-"): value for key, value in versions.items()},
    }
    return _lines(f"<section><h3>{name}</h3>{_facts(pairs.items())}</section>" for name, pairs in facts.items() if pairs)


def _table(name: str, groups: _Groups, rows: Iterable[Sequence[str]], best: Collection[tuple[int, int]] = ()) -> str:
    """A table whose groups of columns, if they name any, are a second line of headings; ``best`` are cells that stand out."""
    height = 2 if any(columns for _, columns in groups) else 1
    first, second = [], []
    for index, (group, columns) in enumerate(groups):
        kind = "name" if index == 0 else "group" if columns else ""
        span = f'colspan="{len(columns)}"' if columns else f'rowspan="{height}"'
        first.append(f'<th class="{kind}" {span}>{escape(group)}</th>')
        second += [f"<th>{escape(column)}</th>" for column in columns]
    body = []
    for row, (label, *cells) in enumerate(rows):
        kinds = ("best" if (row, column) in best else "" for column in range(len(cells)))
        filled = "".join(f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(kinds, cells, strict=True))
        body.append(f'<tr><th class="name" scope="row">{escape(label)}</th>{filled}</tr>')
    head = "".join(f"<tr>{''.join(line)}</tr>" for line in (first, second) if line)
    table = f"<table><thead>{head}</thead>\n<tbody>\n{_lines(body)}\n</tbody></table>"
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">{table}</div>'


def _facts(pairs: Iterable[tuple[str, object]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>' for key, value in pairs)}</dl>"


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _lines(parts: Iterable[str]) -> str:
    return "\n".join(parts)


def _percent(share: float | None) -> str:
    return _ABSENT if share is None else f"{100 * share:.1f}%"


def _target(ratio: float) -> str:
    return f"{100 * ratio:.4g}%"


def _short(value: float | None) -> str:
    """Three significant digits; whole numbers in full."""
    return _ABSENT if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:,.0f}×"  # noqa: RUF001 - a multiplication sign
