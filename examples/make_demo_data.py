"""Write a job's questions and pictures as a JSONL file, which `modes-fx calibrate`, `search` and `compare` read.

python examples/make_demo_data.py --job pairs --split calibration --groups 12 --out out/pairs-calibration
python examples/make_demo_data.py --job pairs --split test --groups 64 --out out/pairs-test
"""

import argparse
import json
from pathlib import Path

from demo_model.jobs import JOBS

from modes_fx.demo.canvas import SPLITS
from modes_fx.files.writing import check_writable

QUESTIONS = 8
FILE = "questions.jsonl"


def write(job: str, split: str, n_groups: int, seed: int, out: Path) -> Path:
    """Write eight questions about the pictures of each of `n_groups`; the file, which names them, comes last."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, group in enumerate(JOBS[job].groups(split, n_groups, seed, QUESTIONS)):
        names = [f"{index}-{place}.png" for place in range(len(group[0].images))]
        for name, image in zip(names, group[0].images, strict=True):
            image.save(out / name)
        lines += [json.dumps({"images": names, "question": each.question, "answer": each.answer}) for each in group]
    path = out / FILE
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", choices=list(JOBS), required=True)
    parser.add_argument("--split", choices=SPLITS, required=True, help="no handwritten digit belongs to two")
    parser.add_argument("--groups", type=int, default=64, help=f"pictures, or pairs of them; {QUESTIONS} questions about each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder; another file of this script in it is replaced")
    args = parser.parse_args()
    check_writable(args.out, folder=True)
    print(write(args.job, args.split, args.groups, args.seed, args.out))


if __name__ == "__main__":
    main()
