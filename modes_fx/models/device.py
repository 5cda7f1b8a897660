"""Where models run: which device is chosen, and what it is."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from modes_fx.errors import DeviceError


def choose_device(name: str | None = None) -> torch.device:
    """Return a device; a GPU that is named by its number becomes the process's own, for what asks for none in particular.

    Args:
        name: ``"cpu"``, ``"cuda"`` for the process's own GPU, or one such as ``"cuda:1"``. None takes the process's own GPU
            where there is one, else the CPU.

    Raises:
        DeviceError: There is no such device here.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    known = ["cpu", *(["cuda"] if gpus else []), *gpus]
    if name is None:
        name = "cuda" if gpus else "cpu"
    if name not in known:
        build = "" if gpus or torch.version.cuda else f" (torch {torch.__version__} is built without CUDA)"
        raise DeviceError(f"There is no device {name!r} here; there is: {', '.join(known)}{build}.")
    if name in gpus:
        torch.cuda.set_device(name)
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def describe_device(device: torch.device) -> str:
    """Return a device's name and, of a GPU, what times depend on: capability, multiprocessors, and its clock at this moment."""
    if device.type != "cuda":
        return device_name(device)
    major, minor = torch.cuda.get_device_capability(device)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    facts = [f"compute capability {major}.{minor}", f"{count} multiprocessors"]
    try:
        facts.append(f"{torch.cuda.clock_rate(device)} MHz")
    except Exception:  # NVML is not there or does not tell, which each of its bindings says in its own way
        facts.append("clock unknown")
    return f"{device_name(device)} ({', '.join(facts)})"


def cpu_name() -> str:
    """Return the processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
