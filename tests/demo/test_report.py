"""The demo's page, from a synthetic report."""

import copy

import pytest

from modes_fx.measure.demo.page import write_demo_page
from modes_fx.measure.page.closeup import Closeup, Picture
from tests.measure.page.reading import png, read

CLOSEUP = Closeup(
    8,
    {"text prefill": (0.5,) * 3, "text decode": (0.25,) * 3},
    (Picture("is it ?", "yes", "yes", "<no>", (("is", 0.5),), png(), ((0.5, 0.0), (0.0, 1.0))),),
)

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


@pytest.fixture
def report():
    return copy.deepcopy(REPORT)


def page(report, tmp_path, closeup=None):
    return read(write_demo_page(report, closeup, tmp_path / "report.html"))


@pytest.mark.parametrize("closeup", [None, CLOSEUP])
def test_page_has_every_section(report, tmp_path, closeup):
    text = page(report, tmp_path, closeup).text
    sections = ["Targets", "Quality", "Speed", "Layers", "Search for thresholds", "How it was measured"]
    assert [part for part in text if part in sections] == sections
    assert ("Samples" in text) == ("decoding" in text) == (closeup is not None)
    assert {"87.5% vision", "γ = 0.5", "Reduce-k", "modes-fx"} <= set(text)


def test_page_bears_what_is_absent_in_plots(report, tmp_path):
    report["alpha"] = [[0.5, 0.5], [0.25, 0.25], [0.25, 0.25]]
    report["layers"] = ["a", "b", "c"]
    report["search"]["trials"], report["reduce_k"] = [], []
    report["targets"] = report["targets"][:1]
    report["targets"][0]["tau"] = {"text": 0.0, "vision": 0.0}
    report["targets"][0]["kl"]["test"] = None
    report["targets"][0]["by_layer"]["text"] = [None, None, None]
    text = page(report, tmp_path).text
    assert not {"Quality", "Search for thresholds"} & set(text)
    assert "Layers" in text


def test_page_holds_every_number_of_the_targets(report, tmp_path):
    cells = page(report, tmp_path).text
    first = ["50%", "0.5", "0", "0.0123", "50.3%", "51.1%", "0.0%", "61.8%", "0.00123", "0.00234", "94.8%", "99.6%"]
    second = ["87.5%", "1", "0.0456", "0.0789", "87.6%", "88.3%", "70.2%", "93.4%", "0.0345", "0.0456", "91.7%", "96.3%"]
    cells = [cell for cell in cells if cell]
    assert any(cells[start : start + 24] == first + second for start in range(len(cells)))


def test_page_headlines(report, tmp_path):
    text = page(report, tmp_path).text
    for value in ("88.3%", "96.3%", "20× less", "3 of 3", "37"):
        assert value in text
    assert any("top 1 of 8 experts, which skips 87.5%: 0.0456 against 0.912 nats" in part for part in text)
    assert any("1,152" in part for part in text)


def test_page_says_which_is_fastest(report, tmp_path):
    text = " ".join(page(report, tmp_path).text)
    assert "Prefill: the fastest is modes-fx at 0.875, 12 ms, 2.50× as fast as the fastest stock setting" in text
    assert "Decode: the fastest is stock compiled, 3 ms/token; modes-fx is slower" in text
    assert "(modes-fx at 0.875, 3.3) takes 1.10× as long" in text


def test_page_says_where_it_is_worse(report, tmp_path):
    report["reduce_k"][2]["kl"] = 0.0114
    report["search"]["violations"] = 2
    report["sites"] = {"found": 3, "rewritten": 2, "rejected": 1}
    text = " ".join(page(report, tmp_path).text)
    assert "4.00× more" in text
    assert "it saw 2 exceptions" in text
    assert "2 of 3 routing sites rewritten; 1 rejected" in text


def test_page_escapes(report, tmp_path):
    text = page(report, tmp_path, CLOSEUP).text
    content = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<no>" not in content
    assert "Tiny<MoE>" not in content
    assert any("Tiny<MoE>" in part for part in text)
    assert "✗ <no>" in text


def test_page_leaves_out_what_is_absent(report, tmp_path):
    report |= {"speed": None, "seconds": None, "reduce_k": []}
    report["targets"][1]["realised"]["text"] = None
    text = page(report, tmp_path).text
    assert not {"Samples", "Speed", "Seconds"} & set(text)
    assert "Versions" in text
