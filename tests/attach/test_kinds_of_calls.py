"""A model that is called from Python meets more kinds of calls than torch makes graphs of one function by itself."""

import itertools

import pytest
import torch

import modes_fx
from modes_fx.attach import regions
from tests import tiny


@pytest.mark.wide
@pytest.mark.usefixtures("without_inductor")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_all_kinds_of_calls_of_one_model_run() -> None:
    """One sequence or several, of one token or several, with gradients, without, and in inference mode: twelve."""
    stock, model = tiny.one_layer(), modes_fx.optimize(tiny.one_layer())
    grad_modes = (torch.enable_grad, torch.no_grad, torch.inference_mode)
    for grad_mode, sequences, tokens in itertools.product(grad_modes, (1, 2), (1, 2)):
        ids = torch.arange(5, 5 + sequences * tokens).reshape(sequences, tokens)
        with grad_mode():
            torch.testing.assert_close(model(ids, use_cache=False).logits, stock(ids, use_cache=False).logits)
    assert modes_fx.report(model).graphs > torch._dynamo.config.recompile_limit


@pytest.mark.usefixtures("without_inductor")
def test_where_sizes_are_dynamic_two_sequences_are_as_good_as_three() -> None:
    """Thresholds are a row of a table of two phases, by whose size two sequences must not be told from others."""
    model = modes_fx.optimize(tiny.one_layer(), dynamic=True)
    for sequences, tokens in ((2, 5), (3, 5), (3, 3), (2, 2), (5, 2)):
        with torch.no_grad():
            model(torch.arange(5, 5 + sequences * tokens).reshape(sequences, tokens), use_cache=False)
    assert modes_fx.report(model).graphs == 1


@pytest.mark.usefixtures("without_inductor")
def test_at_torchs_limit_graphs_are_made_anew(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Threads make the same graph again and again, until there are too many."""
    monkeypatch.setattr(regions, "_LIMIT", {"recompile_limit": 2})
    stock, model = tiny.one_layer(), modes_fx.optimize(tiny.one_layer())
    with caplog.at_level("INFO", "modes_fx.attach.regions"), torch.no_grad():
        for sequences, tokens in ((1, 1), (1, 3), (3, 1), (3, 3), (1, 1)):
            ids = torch.arange(5, 5 + sequences * tokens).reshape(sequences, tokens)
            torch.testing.assert_close(model(ids, use_cache=False).logits, stock(ids, use_cache=False).logits)
    assert caplog.text.count("they are made anew") == 2
    assert modes_fx.report(model).graphs == 5
