"""The demo's plots and page, from a synthetic report."""

import base64
import copy
import io
import re
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image

from modes_fx.demo.page import write_page
from modes_fx.demo.plots import save_plots
from modes_fx.errors import ModesFxError

NAMES = ("alpha", "thresholds", "skip_by_layer", "quality")
VOID = {"br", "hr", "img", "link", "meta"}
QUESTION = "is <b>&amp; \"7\" 'red' ?"

REPORT = {
    "model": {"name": "Tiny<MoE>", "layers": 3, "experts": 16, "top_k": 8, "parameters": 1_234_567, "dtype": "bfloat16"},
    "dense": {"accuracy": 0.952, "n": 250},
    "layers": [f"model.language_model.layers.{layer}.mlp.experts" for layer in range(3)],
    "alpha": [[0.7, 0.999], [0.2999, 0.001], [1e-4, 0.0]],
    "targets": [
        {
            "target": 0.5,
            "gamma": 0.5,
            "tau": {"text": 0.0, "vision": 0.0123},
            "realised": {"calibration": 0.503, "test": 0.511, "text": 0.0, "vision": 0.618},
            "kl": {"calibration": 0.00123, "test": 0.00234},
            "accuracy": 0.948,
            "retained": 0.948 / 0.952,
            "by_layer": {"text": [0.0, 0.0, 0.0], "vision": [0.1, 0.7, 1.0]},
        },
        {
            "target": 0.875,
            "gamma": 1.0,
            "tau": {"text": 0.0456, "vision": 0.0789},
            "realised": {"calibration": 0.876, "test": 0.883, "text": 0.702, "vision": 0.934},
            "kl": {"calibration": 0.0345, "test": 0.0456},
            "accuracy": 0.917,
            "retained": 0.917 / 0.952,
            "by_layer": {"text": [0.3, 0.8, 1.0], "vision": [0.6, 0.9, 1.0]},
        },
    ],
    "reduce_k": [
        {"k": 4, "ratio": 0.5, "kl": 0.0567, "accuracy": 0.9},
        {"k": 2, "ratio": 0.75, "kl": 0.4, "accuracy": 0.7},
        {"k": 1, "ratio": 0.875, "kl": 0.912, "accuracy": 0.4},
    ],
    "sites": {"found": 3, "rewritten": 3, "rejected": 0},
    "search": {
        "evaluations": 37,
        "exhaustive": 1152,
        "violations": 0,
        "trials": [
            {"gamma": gamma, "tau_text": text, "tau_vision": vision, "kl": text + vision, "ratio": 0.5}
            for gamma in (0.5, 1.0)
            for text in (0.0, 0.001, 0.0456)
            for vision in (0.0, 0.0123, 0.0789)
        ],
    },
    "speed": {
        "prefill_ms": {"stock": 40.0, "stock compiled": 30.0, "modes-fx, all kept": 31.0, "modes-fx at 0.875": 12.0},
        "decode_ms_per_token": {"stock": 6.0, "stock compiled": 3.0, "modes-fx, all kept": 3.6, "modes-fx at 0.875": 3.3},
        "setup": {"threads": 2, "batch": 8, "prompt_tokens": 90, "dtype": "bfloat16", "cpu": "A CPU"},
    },
    "seconds": {"calibrate": 1.5, "search": 2.5, "evaluate": 3.5, "time": 4.5},
    "versions": {"modes_fx": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"},
}


class Reader(HTMLParser):
    """Collects attributes and text, and fails on a tag that is not closed in its turn."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *attribute) for attribute in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data.strip())


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert not reader.open
    return reader


def png(colour, size=(64, 64)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def report():
    return copy.deepcopy(REPORT)


@pytest.fixture
def plots(tmp_path):
    """Stand-ins: the page does not care what is in them."""
    paths = {name: tmp_path / f"{name}.png" for name in NAMES}
    for index, path in enumerate(paths.values()):
        path.write_bytes(png((index, 0, 0)))
    return paths


@pytest.fixture
def sample():
    return {
        "image_png": base64.b64encode(png("red")).decode(),
        "question": QUESTION,
        "answer": "yes",
        "dense": "yes",
        "skipped": {"0.5": "yes", "0.875": "<no>"},
        "kept": {"0.875": [[row / 2 for _ in range(8)] for row in range(8)]},
    }


def check_images(paths):
    assert tuple(paths) == NAMES
    for path in paths.values():
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.size == (1050, 630)
            assert len(image.convert("RGB").getcolors(maxcolors=1050 * 630)) > 20


def test_plots_are_drawn(report, tmp_path):
    paths = save_plots(report, tmp_path / "new")
    check_images(paths)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(f"{name}.png" for name in NAMES)


def test_plots_bear_what_is_absent(report, tmp_path):
    report["alpha"] = [[0.5, 0.5], [0.25, 0.25], [0.25, 0.25]]
    report["layers"] = ["a", "b", "c"]
    report["search"]["trials"], report["reduce_k"] = [], []
    report["targets"] = report["targets"][:1]
    report["targets"][0]["tau"] = {"text": 0.0, "vision": 0.0}
    report["targets"][0]["kl"]["test"] = None
    report["targets"][0]["by_layer"]["text"] = [None, None, None]
    check_images(save_plots(report, tmp_path))


def test_plots_leave_matplotlib_as_it_was(report, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    save_plots(report, tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_plots_name_what_to_install(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModesFxError, match=re.escape("Plots need matplotlib: pip install 'modes-fx[viz]'.")):
        save_plots(report, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("with_samples", [False, True])
def test_page_is_self_contained(report, plots, sample, tmp_path, with_samples):
    if with_samples:
        report["samples"] = [sample, sample]
    path = write_page(report, plots, tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    content, reader = path.read_text(encoding="utf-8"), read(path)
    assert not re.search(r"https?://|@import|url\(|<script|<link", content)
    loaded = [value for _, name, value in reader.attributes if name in ("src", "href", "srcset", "data", "poster")]
    assert len(loaded) == (8 if with_samples else 4)
    assert all(value.startswith("data:image/png;base64,") for value in loaded)
    for value, plot in zip(loaded, plots.values(), strict=False):
        assert base64.b64decode(value.split(",")[1]) == plot.read_bytes()
    assert "$" not in "".join(reader.text)
    assert ("Samples" in reader.text) == with_samples


def test_page_holds_every_number_of_the_targets(report, plots, tmp_path):
    cells = read(write_page(report, plots, tmp_path / "report.html")).text
    first = ["50%", "0.5", "0", "0.0123", "50.3%", "51.1%", "0.0%", "61.8%", "0.00123", "0.00234", "94.8%", "99.6%"]
    second = ["87.5%", "1", "0.0456", "0.0789", "87.6%", "88.3%", "70.2%", "93.4%", "0.0345", "0.0456", "91.7%", "96.3%"]
    cells = [cell for cell in cells if cell]
    assert any(cells[start : start + 24] == first + second for start in range(len(cells)))


def test_page_headlines(report, plots, tmp_path):
    text = read(write_page(report, plots, tmp_path / "report.html")).text
    for value in ("88.3%", "96.3%", "20× less", "3 of 3", "37"):  # noqa: RUF001
        assert value in text
    assert any("top 1 of 8 experts, which skips 87.5%: 0.0456 against 0.912 nats" in part for part in text)
    assert any("1,152" in part for part in text)


def test_page_says_which_is_fastest(report, plots, tmp_path):
    text = " ".join(read(write_page(report, plots, tmp_path / "report.html")).text)
    assert "Prefill: the fastest is modes-fx at 0.875, 12 ms, 2.50× as fast as the fastest stock setting" in text  # noqa: RUF001
    assert "Decode: the fastest is stock compiled, 3 ms/token; modes-fx is slower" in text
    assert "(modes-fx at 0.875, 3.3) takes 1.10× as long" in text  # noqa: RUF001


def test_page_says_where_it_is_worse(report, plots, tmp_path):
    report["reduce_k"][2]["kl"] = 0.0114
    report["search"]["violations"] = 2
    report["sites"] = {"found": 3, "rewritten": 2, "rejected": 1}
    text = " ".join(read(write_page(report, plots, tmp_path / "report.html")).text)
    assert "4.00× more" in text  # noqa: RUF001
    assert "it saw 2 exceptions" in text
    assert "2 of 3 routing sites rewritten; 1 rejected" in text


def test_page_escapes(report, plots, sample, tmp_path):
    report["samples"] = [sample]
    path = write_page(report, plots, tmp_path / "report.html")
    content, text = path.read_text(encoding="utf-8"), read(path).text
    assert "<b>" not in content
    assert "<no>" not in content
    assert "Tiny<MoE>" not in content
    assert QUESTION in text
    assert "✗ <no>" in text


def test_page_leaves_out_what_is_absent(report, tmp_path):
    report |= {"samples": None, "speed": None, "seconds": None, "reduce_k": []}
    report["targets"][1]["realised"]["text"] = None
    text = read(write_page(report, {}, tmp_path / "report.html")).text
    assert not {"Samples", "Speed", "Plots", "Seconds"} & set(text)
    assert "Versions" in text
