"""Skip experts in a model: thresholds by hand first, then calibrated ones. Runs on the embedded model in about a minute.

python examples/quickstart.py
"""

import modes_fx
from modes_fx.calib import layer_importance, search
from modes_fx.demo import collate, load, make_samples


def main() -> None:
    """Optimise, generate, calibrate, switch targets, restore."""
    model, processor = load()  # yours: AutoModelForImageTextToText.from_pretrained(...), AutoProcessor.from_pretrained(...)
    samples = make_samples("test", n_images=1)[:4]
    prompts = collate(samples, processor, answers=False)

    # Thresholds on the routing weights, by hand: visual tokens keep fewer experts than text.
    modes_fx.optimize(model, modes_fx.SkipPlan.uniform(text=0.05, vision=0.15))
    print(modes_fx.report(model))
    with modes_fx.stats(model) as stats:
        answers = model.generate(**prompts, max_new_tokens=12)
    print(stats)
    texts = processor.batch_decode(answers[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    for sample, text in zip(samples, texts, strict=True):
        print(f"{sample.question:40} {text!r}, expected {sample.answer!r}")

    # Calibrated: batches are forward arguments with `labels` on the answer tokens.
    batches = [collate(make_samples("calibration", n_images=4), processor)]
    importance = layer_importance(model, batches)
    plan = search(model, batches, importance, targets=(0.5, 0.75), grid_size=6)
    modes_fx.set_plan(model, plan, target=0.5)  # no recompilation
    for point in plan.points:
        print(f"target {point.target:g}: {point.realised['calibration']:.1%} skipped, KL {point.kl['calibration']:.4f} nats")
    modes_fx.restore(model)


if __name__ == "__main__":
    main()
