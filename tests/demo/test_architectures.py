"""The models that the training script makes: packed questions see what single ones see; each trains and is stored."""

from pathlib import Path
from typing import Any

import pytest
import torch
from demo_model import train
from demo_model.architectures import ARCHITECTURES, Architecture
from demo_model.balance import Balance
from demo_model.evaluate import accuracy_by_kind
from demo_model.jobs import JOBS, pairs
from demo_model.jobs.job import as_data
from demo_model.packing import Packer
from torch import Tensor, nn

from modes_fx.data import load_samples, make_batches
from modes_fx.demo.canvas import Canvas, draw
from modes_fx.demo.data import IGNORED
from modes_fx.models.loading import load

NAMES = pytest.mark.parametrize("name", list(ARCHITECTURES))


def build(name: str, job: str = "pairs") -> tuple[Architecture, Any, Any]:
    architecture = ARCHITECTURES[name]
    processor = architecture.build_processor(JOBS[job])
    model = architecture.build_model(processor, JOBS[job]).eval()
    for buffer_name, buffer in model.named_buffers():
        if "correction" in buffer_name:
            buffer.normal_(0, 0.1)
    for parameter_name, parameter in model.named_parameters():
        if "sinks" in parameter_name:
            nn.init.normal_(parameter)
    return architecture, model, processor


def for_training(architecture: Architecture, model: Any) -> Any:
    language = model.model.language_model
    language.set_experts_implementation(architecture.experts_implementation)
    language.set_attn_implementation(architecture.attention_implementation)
    return model


@NAMES
@pytest.mark.parametrize("job", list(JOBS))
@torch.no_grad()
def test_packed_questions_see_what_single_ones_see(name: str, job: str) -> None:
    architecture, model, processor = build(name)
    groups = JOBS[job].groups("train", 2, 0, 4)
    single = [
        model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits[:, :-1][
            batch["labels"][:, 1:] != IGNORED
        ]
        for batch in make_batches(as_data([asked for group in groups for asked in group]), processor, 1)
    ]
    packed = Packer(for_training(architecture, model), processor).pack(groups)
    logits = model(**packed.inputs, use_cache=False).logits[packed.labels != IGNORED]
    torch.testing.assert_close(logits, torch.cat(single), atol=1e-5, rtol=0)


@NAMES
def test_what_trains_computes_and_differentiates_as_what_runs(name: str) -> None:
    architecture, model, processor = build(name)
    batch = Packer(model, processor).pack(JOBS["pairs"].groups("train", 2, 0, 2))

    def run(mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        out = model.model(**{**batch.inputs, "attention_mask": mask}, use_cache=False).last_hidden_state
        (out.square() * torch.linspace(0, 1, out.shape[-1])).sum().backward()
        return out.detach(), {key: each.grad for key, each in model.named_parameters() if each.grad is not None}

    mask = batch.inputs["attention_mask"]
    wanted, wanted_grads = run(mask)
    if mask.dtype == torch.bool:
        assert architecture.attention_implementation == "sdpa"
    found, grads = (for_training(architecture, model), run(mask))[1]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert grads.keys() == wanted_grads.keys()
    for key, grad in grads.items():
        assert (grad - wanted_grads[key]).norm() <= 1e-4 * wanted_grads[key].norm() + 1e-6, key


@NAMES
def test_it_trains_and_is_stored(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "VISION_IMAGES_PER_STEP", 4)
    monkeypatch.setattr(train, "GROUPS_PER_STEP", {"grid": 2, "pairs": 2})
    architecture, model, processor = build(name)
    for_training(architecture, model.train())
    job = JOBS["pairs"]
    before, again = (train.train_vision(architecture, job, model, processor, steps, 0)[0] for steps in (2, 1))
    assert again < before  # on the same pictures
    asked = job.draw("validation", 0, 0, 2)
    before, again = (
        train.train_whole(
            architecture, job, model, processor, steps, 0, 1, lambda *_: accuracy_by_kind(model, processor, asked)
        )[0]
        for steps in (2, 1)
    )
    assert again < before
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    architecture.to_hub_form(tmp_path)
    stored, stored_processor = load(str(tmp_path))
    (batch,) = make_batches(as_data(job.draw("test", 0, 0, 2)), stored_processor, 2)
    is_real_BS = batch["attention_mask"] == 1
    with torch.inference_mode():
        found, wanted = (each(**batch, use_cache=False).logits[is_real_BS] for each in (stored, model))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@NAMES
def test_the_load_is_balanced_as_the_makers_did(name: str) -> None:
    _, model, processor = build(name)
    routers = [each for each in model.modules() if hasattr(each, "top_k") and hasattr(each, "num_experts")]
    biases = [each.e_score_correction_bias.clone() for each in routers if hasattr(each, "e_score_correction_bias")]
    balance = Balance(model.train())
    batch = Packer(model, processor).pack(JOBS["grid"].groups("train", 1, 0, 2))
    model(**batch.inputs, use_cache=False)
    loss, load_ratio = balance.take(batch.is_real.flatten())
    balance.remove()
    assert load_ratio >= 0.99  # 1 is even
    loss.backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in routers)
    moved = [each.e_score_correction_bias for each in routers if hasattr(each, "e_score_correction_bias")]
    assert len(moved) == (7 if name == "deepseek_v3" else 0)
    for before, after in zip(biases, moved, strict=True):
        torch.testing.assert_close((after - before).abs().max(), torch.tensor(2e-3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("job", list(JOBS))
def test_every_word_of_a_job_is_one_token(job: str) -> None:
    processor = ARCHITECTURES["gpt_oss"].build_processor(JOBS[job])
    unknown = processor.tokenizer.unk_token_id
    for batch in make_batches(as_data([asked for group in JOBS[job].groups("test", 6, 3, 12) for asked in group]), processor):
        assert not (batch["input_ids"] == unknown).any()


def test_pairs_ask_what_their_pictures_show(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Canvas] = []
    monkeypatch.setattr(pairs, "draw", lambda *given: shown.append(draw(*given)) or shown[-1])
    kinds = set()

    def digit_in(cell: str) -> str:
        canvas = shown["ABCDEF".index(cell[0]) // 3]
        digit = canvas.digits[pairs.ALL_CELLS.index(cell) % 9]
        return "empty" if digit is None else str(digit)

    def colour_in(cell: str) -> str:
        return shown["ABCDEF".index(cell[0]) // 3].colours[pairs.ALL_CELLS.index(cell) % 9] or "empty"

    for index in range(6):
        shown.clear()
        for asked in pairs.JOB.draw("test", index, 0, 14):
            kinds.add(asked.kind)
            assert [image.tobytes() for image in asked.images] == [canvas.image.tobytes() for canvas in shown]
            words, answer = asked.question.split(), asked.answer.split()
            named = [word for word in words if word in pairs.ALL_CELLS]
            if asked.kind in ("larger", "sum"):
                digits = [digit_in(cell) for cell in named]
                assert answer[:2] == digits
                total, larger = str(sum(map(int, digits))), named[int(digits[1]) > int(digits[0])]
                assert answer[2] == (total if asked.kind == "sum" else larger)
            elif asked.kind == "condition":
                assert answer[0] == colour_in(named[0])
                assert answer[1] == ("yes" if answer[0] == words[2] else "no")
                assert answer[2:] == [named[1 if answer[1] == "yes" else 2], digit_in(answer[2])]
            elif asked.kind == "all_colours":
                cells = pairs.ALL_CELLS[:9] if "first" in words else pairs.ALL_CELLS[9:]
                assert answer == [word for cell in cells for word in (cell, colour_in(cell))]
            else:
                told = {"digits": (digit_in,), "colours": (colour_in,), "shown": (colour_in, digit_in)}[asked.kind]
                assert len(named) == {"digits": 3, "colours": 6, "shown": 2}[asked.kind]
                assert answer == [word for cell in named for word in dict.fromkeys((cell, *(tell(cell) for tell in told)))]
    assert kinds == set(pairs.JOB.kinds)


def test_written_questions_are_read_again(tmp_path: Path) -> None:
    import make_demo_data

    path = make_demo_data.write("pairs", "calibration", 2, 0, tmp_path / "new" / "questions")
    with pytest.raises(SystemExit, match="holds something"):
        make_demo_data.write("pairs", "calibration", 2, 1, path.parent)
    assert [each.name for each in path.parent.parent.iterdir()] == ["questions"]
    samples = load_samples(path)
    wanted = [asked for group in JOBS["pairs"].groups("calibration", 2, 0, 8) for asked in group]
    assert [(each.question, each.answer) for each in samples] == [(each.question, each.answer) for each in wanted]
    assert [each.tobytes() for each in samples[0].open_images()] == [each.tobytes() for each in wanted[0].images]
