"""lmms-eval finds the model by its entry point and the task by its folder."""

import subprocess
import sys
from importlib.metadata import entry_points
from typing import Any

from modes_fx.demo import make_samples
from modes_fx.demo.questions import KINDS
from modes_fx.lmms import TASKS


def test_the_entry_point_module_needs_no_lmms_eval() -> None:
    code = "import runpy, sys; runpy.run_module('modes_fx.lmms', run_name='__main__'); sys.exit('lmms_eval' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == f"{TASKS}\n"


def test_lmms_eval_knows_the_model(lmms_eval: Any) -> None:
    from lmms_eval.models import get_model, list_available_models

    from modes_fx.lmms.model import ModesFx

    (entry,) = entry_points(group="lmms_eval.models", name="modes_fx")
    (manifest,) = entry.load()()
    assert manifest.model_id == "modes_fx"
    assert "modes_fx" in list_available_models()
    assert get_model("modes_fx") is ModesFx


def test_the_task_asks_what_the_demo_asks(lmms_eval: Any) -> None:
    from lmms_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    assert manager.match_tasks(["modes_fx_demo"]) == ["modes_fx_demo"]
    task = get_task_dict(["modes_fx_demo"], manager, "chat")["modes_fx_demo"]
    samples = make_samples("test", 64)
    assert list(task.test_docs()["question"]) == [sample.question for sample in samples]
    doc, sample = task.test_docs()[9], samples[9]
    assert (doc["answer"], doc["kind"], doc["image"].tobytes()) == (sample.answer, sample.kind, sample.image.tobytes())
    assert set(task.aggregation()) == {"exact_match", *KINDS}
    assert task.process_results(doc, [f" {sample.answer}\n"]) == {"exact_match": 1.0, sample.kind: 1.0}
    assert task.process_results(doc, [f"{sample.answer} yes"]) == {"exact_match": 0.0, sample.kind: 0.0}
