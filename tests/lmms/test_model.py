"""Whole evaluations of the embedded model by lmms-eval's own evaluator."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import modes_fx
from modes_fx import ModesFxError, SkipPlan
from modes_fx.calib import Objective
from modes_fx.demo import collate, make_samples
from modes_fx.errors import PlanError
from modes_fx.optimize import optimized_state
from modes_fx.plan import PlanPoint
from tests.lmms.conftest import answers

RATIOS = {"avg_skip_ratio", *(f"avg_skip_ratio_{part}" for part in ("text", "vision", "prefill", "decode"))}
Pair = tuple[Any, Any]


@pytest.fixture
def lm(wrap: Callable[..., Any], optimized: Pair) -> Any:
    modes_fx.set_plan(optimized[0], None)
    return wrap(model=optimized[0], processor=optimized[1], batch_size=4)


def test_all_kept_answers_as_stock_does(lm: Any, evaluate: Callable[..., dict[str, Any]]) -> None:
    kept = evaluate(lm)
    stock = evaluate("modes_fx", model_args="pretrained=demo,optimize=False", batch_size=4)
    assert answers(kept) == answers(stock)
    assert kept["results"]["modes_fx_demo"]["exact_match,none"] == stock["results"]["modes_fx_demo"]["exact_match,none"] > 0.5
    assert {kept["throughput"][name] for name in RATIOS} == {0.0}
    assert RATIOS.isdisjoint(stock["throughput"])


def test_measured_ratios_and_a_second_run(lm: Any, evaluate: Callable[..., dict[str, Any]]) -> None:
    modes_fx.set_plan(lm.model, SkipPlan.uniform(text=0.0, vision=float("inf")))
    modes_fx.stats(lm.model).reset()
    first = evaluate(lm)
    assert first["throughput"]["avg_skip_ratio_vision"] == 1
    assert first["throughput"]["avg_skip_ratio_text"] == first["throughput"]["avg_skip_ratio_decode"] == 0
    assert first["throughput"]["avg_skip_ratio"] == modes_fx.stats(lm.model).skip_ratio()
    assert 0 < first["throughput"]["avg_skip_ratio"] < first["throughput"]["avg_skip_ratio_prefill"] < 1
    assert not modes_fx.stats(lm.model).recording

    modes_fx.set_plan(lm.model, None)  # the evaluator has called clean() by now
    second = evaluate(lm)
    assert second["throughput"]["avg_skip_ratio"] == 0  # of this run alone, though counts go on
    assert answers(second) != answers(first)


@pytest.mark.parametrize("plan", [None, SkipPlan.uniform(text=0.05, vision=0.15)], ids=["all kept", "plan"])
def test_the_score_is_that_of_the_objective(lm: Any, evaluate: Callable[..., dict[str, Any]], plan: SkipPlan | None) -> None:
    modes_fx.set_plan(lm.model, plan)
    results = evaluate(lm, limit=8)["results"]["modes_fx_demo"]
    samples = make_samples("test", 1)
    objective = Objective(lm.model, [collate(samples, lm.processor)])
    wanted = objective.accuracy if plan is None else objective.evaluate(plan.bounds(objective.num_layers)).accuracy
    assert results["exact_match,none"] == wanted
    assert {name for name in (f"{sample.kind},none" for sample in samples) if name not in results} == set()


def requests(lm: Any, messages: list[list[dict[str, Any]]], **gen_kwargs: Any) -> list[Any]:
    """Requests as a task of chat messages makes them."""
    from lmms_eval.api.instance import Instance

    lm.task_dict = {"task": {"test": messages}}
    return [
        Instance(
            request_type="generate_until", arguments=("", lambda doc: doc, gen_kwargs, index, "task", "test"), idx=0,
            metadata={"task": "task", "doc_id": index, "repeats": 1},
        )
        for index in range(len(messages))
    ]  # fmt: skip


def user(*content: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def test_requests_of_text_alone_and_of_images_in_one_batch(lm: Any) -> None:
    sample = make_samples("test", 1)[0]
    text = {"type": "text", "text": sample.question}
    messages = [user(text), user({"type": "image", "url": sample.image}, text), user(text)]
    together = lm.generate_until(requests(lm, messages, max_new_tokens=12))
    lm.batch_size = 1
    alone = lm.generate_until(requests(lm, messages, max_new_tokens=12))
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert together[0].text == together[2].text != together[1].text


def test_settings_of_a_request_are_followed(lm: Any) -> None:
    sample = next(sample for sample in make_samples("test", 2) if sample.kind == "line")
    messages = [user({"type": "image", "url": sample.image}, {"type": "text", "text": sample.question})]

    def answer(**settings: Any) -> Any:
        (result,) = lm.generate_until(requests(lm, messages, **settings))
        return result

    whole = answer(max_new_tokens=12)
    words = whole.text.split()
    assert whole.token_counts.output_tokens == len(words) + 1  # and the token that ends it
    short = answer(max_new_tokens=2)
    assert (short.text.split(), short.token_counts.output_tokens) == (words[:2], 2)
    assert answer(max_new_tokens=12, until=[words[3]]).text == whole.text[: whole.text.index(words[3])]
    assert answer(max_new_tokens=12, num_beams=2).text
    assert len({answer(max_new_tokens=12, temperature=50.0).text for _ in range(3)}) > 1


def test_requests_that_cannot_be_answered(lm: Any) -> None:
    with pytest.raises(ModesFxError, match=r"Cannot read the video a\.mp4"):
        lm.generate_until(requests(lm, [user({"type": "video", "url": "a.mp4"})]))
    with pytest.raises(ModesFxError, match="not loglikelihood"):
        lm.loglikelihood([])
    with pytest.raises(ModesFxError, match="not generate_until_multi_round"):
        lm.generate_until_multi_round([])


def test_arguments_that_do_not_go_together(wrap: Callable[..., Any], optimized: Pair) -> None:
    model, processor = optimized
    for arguments in ({}, {"pretrained": "demo", "model": model, "processor": processor}, {"model": model}):
        with pytest.raises(ModesFxError, match="Pass either pretrained=, or model= and processor="):
            wrap(**arguments)
    with pytest.raises(PlanError, match="optimize=False asks for the stock one"):
        wrap("demo", optimize=False, target=0.5)
    with pytest.raises(PlanError, match="needs a plan that knows it"):
        wrap(model=model, processor=processor, target=0.5)
    with pytest.raises(ModesFxError, match="batch_size must be a positive number, got 'auto'"):
        wrap("demo", batch_size="auto")


@pytest.mark.usefixtures("without_inductor")
def test_a_plan_file_and_its_targets(wrap: Callable[..., Any], tmp_path: Any) -> None:
    plan = SkipPlan((PlanPoint(0.5, 0.01, 0.02), PlanPoint(0.75, 0.05, 0.15)))
    plan.save(tmp_path / "plan.json")
    arguments = f"plan={tmp_path / 'plan.json'},target=0.75,decode_target=0.5,region=layer,dtype=float32"
    lm = wrap.create_from_arg_string(f"pretrained=demo,{arguments}")
    report = modes_fx.report(lm.model)
    assert (report.region, len(report.rewritten), str(lm.model.dtype)) == ("layer", 8, "torch.float32")
    wanted = torch.stack([plan.bounds(8, target) for target in (0.75, 0.5)])
    assert torch.equal(optimized_state(lm.model).runtime.bounds_in_force, wanted)
