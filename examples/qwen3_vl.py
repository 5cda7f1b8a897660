"""Skip experts in Qwen3-VL-30B-A3B-Instruct: calibrate on your data, search, save the plan, answer a question, compare speeds.

For one GPU of 80 GB (the weights take 62 GB in bfloat16). DATA is whatever `modes-fx calibrate` takes, such as a file of lines
{"image": "cat.jpg", "question": "What is it?", "answer": "a cat"}; three quarters of it choose the thresholds, one is held out:

    python examples/qwen3_vl.py --data DATA [--image photo.jpg --question "What is this?"]

The same code on the embedded model of this family and its own data, offline, on a CPU, in under a minute:

    python examples/qwen3_vl.py --tiny
"""

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

from tabulate import tabulate

import modes_fx
from modes_fx import demo
from modes_fx.calib import layer_importance, search
from modes_fx.data import Sample, load_samples, make_batches
from modes_fx.files.writing import check_writable
from modes_fx.models.loading import load

NEW_TOKENS = 16


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-VL-30B-A3B-Instruct", help="folder or hub id")
    parser.add_argument("--data", type=Path, help="questions with images and answers")
    parser.add_argument("--samples", type=int, default=256, help="how many of them to take")
    parser.add_argument("--max-pixels", type=int, default=1024 * 1024, help="largest image; smaller is faster to calibrate on")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--grid-size", type=int, default=24, help="thresholds tried for each modality")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.75, 0.875], help="skip ratios to reach")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--image", type=Path, help="image to ask about; the first held-out one if left out")
    parser.add_argument("--question", default="What is in this image?", help="what to ask about --image")
    parser.add_argument("--out", type=Path, default=Path("out/qwen3_vl"), help="folder for plan.json")
    parser.add_argument("--tiny", action="store_true", help="the embedded model and its data, on the CPU")
    options = parser.parse_args()
    if options.tiny:
        options.model, options.batch_size, options.grid_size, options.targets = str(demo.CHECKPOINT), 32, 6, [0.5, 0.75]
    elif options.data is None:
        parser.error("pass --data, or --tiny")
    if options.image is not None and not options.image.is_file():
        parser.error(f"there is no image {options.image}")
    check_writable(options.out, folder=True)  # known before hours of work
    return options


def samples_of(options: argparse.Namespace) -> tuple[list[Sample], list[Sample]]:
    """Return samples to calibrate on, and others to measure the plan on."""
    if options.tiny:
        drawn = demo.make_samples("calibration", n_images=4)
        samples = [Sample(str(i), each.question, each.answer, (each.image,)) for i, each in enumerate(drawn)]
    else:
        samples = list(load_samples(options.data, limit=options.samples))
    return [sample for index, sample in enumerate(samples) if index % 4], samples[::4]


def prompt(processor: Any, model: Any, image: Any, question: str) -> Any:
    """Write one question as the model's chat template wants it, ready for ``generate``."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    return inputs.to(model.device, model.dtype)


def milliseconds(model: Any, inputs: Any, new_tokens: int) -> float:
    """Time one call of ``generate``."""
    started = time.perf_counter()
    answer = model.generate(**inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
    answer.cpu()  # waits for the GPU
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    """Do it all."""
    options = arguments()
    place, sizes = ("cpu", {}) if options.tiny else ("cuda", {"max_pixels": options.max_pixels})
    # as from_pretrained of the model and of AutoProcessor, but that images need no torchvision
    model, processor = load(str(options.model), dtype="bfloat16", device_map=place, processor_settings=sizes)
    # A stock twin on the very same weights, to measure against: it takes no further memory.
    stock = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})

    modes_fx.optimize(model)
    print(modes_fx.report(model))
    chosen, held_out = samples_of(options)
    batches, fresh = (make_batches(part, processor, options.batch_size, dtype=model.dtype) for part in (chosen, held_out))
    importance = layer_importance(model, batches)
    # The journal: a search that was cut off goes on where it stopped.
    plan = search(
        model, batches, importance, options.targets, grid_size=options.grid_size, held_out=fresh,
        journal=options.out / "search.jsonl",
    )  # fmt: skip
    plan.save(options.out / "plan.json")
    for point in plan.points:
        print(
            f"target {point.target:g}: on held-out data {point.realised['held_out']:.1%} skipped, KL {point.kl['held_out']:.1e}"
        )

    if options.image is None:
        image, question = held_out[0].open_images()[0], held_out[0].question
    else:
        image, question = str(options.image), options.question
    inputs = prompt(processor, model, image, question)

    settings: dict[str, Any] = {"stock": None, "all kept": None, **{f"{target:.1%}": target for target in plan.targets}}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in settings}
    for round_ in range(options.rounds + 2):  # in turn, so that a busy moment hits all alike; two rounds to compile and warm up
        for name, target in settings.items():
            modes_fx.set_plan(model, None if target is None else plan, target)
            timed = stock if name == "stock" else model
            first, more = (milliseconds(timed, inputs, tokens) for tokens in (1, 1 + NEW_TOKENS))
            if round_ >= 2:
                times[name].append((first, (more - first) / NEW_TOKENS))

    rows = []
    for name, target in settings.items():
        modes_fx.set_plan(model, None if target is None else plan, target)
        with modes_fx.stats(model).reset() as stats:
            answer = (stock if name == "stock" else model).generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        text = processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        skipped = (
            0.0 if name == "stock" else stats.skip_ratio(**part) for part in ({}, {"modality": "text"}, {"modality": "vision"})
        )
        rows.append(
            [name, *map(statistics.median, zip(*times[name], strict=True)), *(f"{ratio:.1%}" for ratio in skipped), text]
        )
    print(f"\n{question} ({inputs['input_ids'].shape[1]} tokens)\n")
    print(tabulate(rows, headers=["", "prefill ms", "ms a token", "skipped", "text", "vision", "answer"], floatfmt=".1f"))


if __name__ == "__main__":
    main()
