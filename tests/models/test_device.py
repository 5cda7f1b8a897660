"""Which device the tools take, told before any work; GPUs are pretended."""

from pathlib import Path

import pytest
import torch

from modes_fx.errors import DeviceError
from modes_fx.files import importance_fields
from modes_fx.measure.bench import parts
from modes_fx.measure.bench.options import Options
from modes_fx.measure.timing import now
from modes_fx.models.device import choose_device, cpu_name, describe_device, device_name
from tests.cli.command import run

CPU = torch.device("cpu")
COMMANDS = {
    "demo": (),
    "calibrate": ("demo",),
    "search": ("demo",),
    "compare": ("demo",),
    "bench": ("--preset", "tiny"),
}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two GPUs; the devices that were made the process's own."""
    own: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", own.append)
    return own


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """An importance file that ``search`` finds."""
    monkeypatch.setattr(importance_fields, "read", lambda path, quiet: None)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_there_is_the_cpu() -> None:
    assert choose_device() == choose_device("cpu") == CPU
    assert device_name(CPU) == describe_device(CPU) == cpu_name()
    assert now(CPU) <= now(CPU)


def test_with_gpus_the_processs_own_is_taken_unless_one_is_named(gpus: list[str]) -> None:
    assert choose_device() == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu") == CPU
    assert gpus == []
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert gpus == ["cuda:1"]


@pytest.mark.parametrize("name", ["cuda:2", "cuda:-1", "gpu", "mps", "meta", ""])
def test_what_is_not_there_is_refused_with_what_is(name: str, gpus: list[str]) -> None:
    with pytest.raises(DeviceError, match=rf"no device '{name}' here; there is: cpu, cuda, cuda:0, cuda:1\."):
        choose_device(name)
    assert gpus == []


@pytest.mark.usefixtures("no_gpu", "measured")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_it_before_any_work(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cuda", "cuda:9", "gpu"):
        with pytest.raises(DeviceError, match=rf"no device '{name}' here; there is: cpu"):
            run(command, *COMMANDS[command], "--device", name)
    assert not list(tmp_path.iterdir())


def test_a_benchmark_says_what_is_not_there() -> None:
    with pytest.raises(DeviceError, match="no device 'gpu'"):
        parts.run(Options(device="gpu"))


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("command", ["calibrate", "search", "compare"])
def test_a_device_and_a_device_map_exclude_each_other(command: str) -> None:
    with pytest.raises(DeviceError, match="--device and --device-map"):
        run(command, "demo", "--device", "cpu", "--device-map", "auto")


def test_one_gpu_is_not_for_several_processes(gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DeviceError, match="got --device cuda:1 for all"):
        run("calibrate", "demo", "--device", "cuda:1")
    assert gpus == []
