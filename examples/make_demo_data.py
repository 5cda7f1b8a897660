"""Write a job's questions and pictures as a JSONL file, which `modes-fx calibrate`, `search` and `compare` read.

    python examples/make_demo_data.py --job pairs --split calibration --groups 12 --out out/pairs-calibration
    python examples/make_demo_data.py --job pairs --split test --groups 64 --out out/pairs-test

OUT appears when all is written; a folder that holds anything is left alone.
"""

import argparse
import json
import tempfile
from pathlib import Path

from demo_model.jobs import JOBS

from modes_fx.demo.canvas import SPLITS
from modes_fx.files.writing import check_writable

QUESTIONS = 8
FILE = "questions.jsonl"


def write(job: str, split: str, n_groups: int, seed: int, out: Path) -> Path:
    """Write eight questions about the pictures of each of `n_groups` into a folder, which is put at `out` in one move."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SystemExit(f"{out} is there and holds something: name another folder as --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as folder:
        staging = Path(folder) / "questions"
        staging.mkdir()
        lines = []
        for index, group in enumerate(JOBS[job].groups(split, n_groups, seed, QUESTIONS)):
            names = [f"{index}-{place}.png" for place in range(len(group[0].images))]
            for name, image in zip(names, group[0].images, strict=True):
                image.save(staging / name)
            lines += [json.dumps({"images": names, "question": each.question, "answer": each.answer}) for each in group]
        (staging / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
        staging.rename(out)
    return out / FILE


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", choices=list(JOBS), required=True)
    parser.add_argument("--split", choices=SPLITS, required=True, help="no handwritten digit belongs to two")
    parser.add_argument("--groups", type=int, default=64, help=f"pictures, or pairs of them; {QUESTIONS} questions about each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder, new or empty")
    args = parser.parse_args()
    if args.groups < 1:
        parser.error(f"--groups is {args.groups}: at least 1 is needed.")
    check_writable(args.out, folder=True)
    print(write(args.job, args.split, args.groups, args.seed, args.out))


if __name__ == "__main__":
    main()
