"""Serve the embedded model by vLLM on this machine, with a plan and without, and ask it about images over the OpenAI API.

    python examples/serve_vllm.py [--plan out/demo/plan.json] [--target 0.75] [--questions 64]

Needs vLLM (`make test-vllm` makes an environment with it, `.venv-vllm`). Without `--plan`: with thresholds by hand.
Prints answers, how many are right, skip ratios as the server's metrics have them, and throughput. The embedded model is tiny,
so that its throughput says what skipping costs; what it spares, `benchmarks/serving.py` says.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from modes_fx import SkipPlan
from modes_fx.demo import CHECKPOINT, Sample, make_samples

ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOG_STATS_INTERVAL": "1",
}


def get(url: str, content: Any = None) -> str:
    """Return the body of an answer to a GET, or to a POST of JSON."""
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        body: bytes = answer.read()
    return body.decode()


@contextlib.contextmanager
def server(settings: dict[str, Any], log: Path) -> Iterator[str]:
    """Run ``vllm serve`` on a free port; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",  # `vllm serve`; vllm-cpu 0.32.0 has it in this form
        "--model", str(CHECKPOINT), "--served-model-name", "demo", "--port", str(port), "--max-model-len", "512",
        "--enforce-eager", "--kv-cache-memory-bytes", "67108864",
        "--limit-mm-per-prompt", '{"image": 1, "video": 0}', "--additional-config", json.dumps(settings),
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=output, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                get(f"{address}/health")
                break
            if process.poll() is not None:
                raise SystemExit(f"The server did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def ask(address: str, sample: Sample) -> str:
    """Ask one question about one image."""
    picture = io.BytesIO()
    sample.image.save(picture, format="PNG")
    image = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": sample.question}]
    body = {"model": "demo", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 16}
    answer: str = json.loads(get(f"{address}/v1/chat/completions", body))["choices"][0]["message"]["content"]
    return answer.strip()


def ask_all(address: str, samples: Sequence[Sample]) -> tuple[list[str], float]:
    """Ask eight questions at a time; return the answers and questions a second."""
    ask(address, samples[0])  # what a server does once
    started = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda sample: ask(address, sample), samples))
    return answers, len(samples) / (time.perf_counter() - started)


def skipped(address: str) -> dict[str, float]:
    """Return skip ratios by modality and phase, from the server's metrics."""
    time.sleep(2.5)  # they are as old as the server's last line of statistics
    pairs: dict[str, dict[str, float]] = {}
    for line in get(f"{address}/metrics").splitlines():
        if line.startswith("modes_fx_pairs_total{"):
            labels, value = line.removeprefix("modes_fx_pairs_total{").split("} ")
            found = dict(part.replace('"', "").split("=") for part in labels.split(","))
            pairs.setdefault(f"{found['modality']} {found['phase']}", {})[found["kept"]] = float(value)
    return {name: each["false"] / sum(each.values()) for name, each in pairs.items() if sum(each.values())}


def main() -> None:
    """Serve twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, help="a plan for the embedded model, such as `make demo` leaves")
    parser.add_argument("--target", type=float, help="one of its targets")
    parser.add_argument("--questions", type=int, default=64)
    options = parser.parse_args()
    samples = make_samples("test", -(-options.questions // 8))[: options.questions]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = options.plan or SkipPlan.uniform(text=0.08, vision=0.2).save(folder / "plan.json")
        settings = {"plan": str(plan.resolve())} | ({} if options.target is None else {"target": options.target})
        with server({}, folder / "without.log") as address:
            without, before = ask_all(address, samples)
        with server({"modes_fx": settings}, folder / "with.log") as address:
            answers, after = ask_all(address, samples)
            ratios = skipped(address)
    for sample, answer in list(zip(samples, answers, strict=True))[:8]:
        print(f"{sample.question} {answer}")
    for label, given, rate in (("without", without, before), ("with", answers, after)):
        right = sum(answer == sample.answer for answer, sample in zip(given, samples, strict=True))
        print(f"{label} a plan: {right} of {len(samples)} right, {rate:.1f} questions a second")
    print("skipped:", ", ".join(f"{name} {ratio:.1%}" for name, ratio in ratios.items()))


if __name__ == "__main__":
    main()
