"""What the commands share: options, the model with its processor, and its batches of data."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
import typer.core

from modes_fx.cli.terminal import Bars, be_quiet, console, errors
from modes_fx.errors import CalibrationError, DeviceError, ModesFxError, PlanError
from modes_fx.files.writing import check_writable
from modes_fx.models.locating import DEMO, locate

if TYPE_CHECKING:
    from torch import nn

    from modes_fx.data import Samples
    from modes_fx.data.batch import Batch

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, the id of a hub model, or `demo`.")]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="File or folder with questions, images and answers; left out for `demo`, which has its own."),
]
FormatOption = Annotated[
    str | None, typer.Option("--data-format", help="Layout of the data; found out from the files if left out.")
]
SplitOption = Annotated[str | None, typer.Option(help="Split of the data, where it holds several.")]
SamplesOption = Annotated[int, typer.Option("--samples", min=1, help="Samples to draw from the data.")]
MaxBadOption = Annotated[float, typer.Option(min=0, max=1, help="Share of unusable samples above which the data are refused.")]
SeedOption = Annotated[int, typer.Option(help="Another seed draws other samples.")]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Samples in a batch, on each process.")]
DtypeOption = Annotated[str, typer.Option(help="Of the weights, such as bfloat16; auto takes the checkpoint's.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N; left out, each process's own GPU where there is one, else the CPU.")
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(help="Instead of --device: spread the model over several, such as auto."),
]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
_DEMO_IMAGES = {"calibration": 12, "test": 64}  # as `modes-fx demo` takes, with 8 questions each


def _file(path: Path | None) -> Path | None:
    return _written_to(path, folder=False)


def _folder(path: Path | None) -> Path | None:
    return _written_to(path, folder=True)


def _written_to(path: Path | None, *, folder: bool) -> Path | None:
    """Refuse an output that could not be written once hours of work are done."""
    try:
        if path is not None:
            check_writable(path, folder=folder)
    except ModesFxError as error:
        raise typer.BadParameter(str(error)) from error
    return path


def output_file(help: str, *names: str) -> Any:
    """Return an option that names a file to write."""
    return typer.Option(*names, dir_okay=False, callback=_file, help=help)


def output_folder(help: str) -> Any:
    """Return an option that names a folder to write to."""
    return typer.Option(file_okay=False, callback=_folder, help=help)


JournalOption = Annotated[Path | None, output_file("File to keep each measurement in; a run that was cut off goes on from it.")]


def ratios(values: list[float]) -> list[float]:
    """Refuse targets that are no skip ratios; a callback of options."""
    for value in values:
        if not 0 <= value <= 1:
            raise typer.BadParameter(f"{value:g} is no skip ratio: pass numbers in [0, 1].")
    return values


TargetsOption = Annotated[list[float], typer.Option(callback=ratios, help="Skip ratios to reach, in [0, 1].")]


class SeveralValues(typer.core.TyperCommand):
    """Takes several values after one option: numbers after ``--targets``, say, names after ``--rules``; see ``_SEVERAL``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each of its values, as click wants it."""
        spelled: list[str] = []
        option = ""
        for arg in args:
            if option and spelled[-1] != option and _SEVERAL[option](arg):
                spelled.append(option)
            elif arg in _SEVERAL:
                option = arg
            elif not (option and spelled[-1] == option):
                option = ""
            spelled.append(arg)
        return super().parse_args(ctx, spelled)


def _is_number(text: str) -> bool:
    try:
        return float(text) >= 0
    except ValueError:
        return False


def _is_name(text: str) -> bool:
    return not text.startswith("-")


_NUMBERS = ("--targets", "--gammas", "--tokens", "--skip", "--threads")
_SEVERAL = {**dict.fromkeys(_NUMBERS, _is_number), "--rules": _is_name, "--parts": _is_name}


@dataclass(frozen=True)
class Source:
    """Where samples come from, and how many to draw.

    Attributes:
        path: File or folder; None stands for the demo's own questions, of which there are 96.
        format: Its layout; None finds it out.
        split: One of its splits, or None.
        samples: How many to draw.
        seed: Of the draw.
        max_bad: Share of them that may be unusable.
        part: Of the demo's own data, ``"calibration"`` or ``"test"``, where there is no path.
    """

    path: Path | None
    format: str | None
    split: str | None
    samples: int
    seed: int
    max_bad: float
    part: str = "calibration"

    def load(self) -> Samples:
        """Draw the samples.

        Raises:
            CalibrationError: They cannot be read.
        """
        from modes_fx.data import load_samples

        if self.path is None:
            return self._of_the_demo()
        return load_samples(
            self.path, limit=self.samples, seed=self.seed, format=self.format, split=self.split, max_bad=self.max_bad
        )

    def _of_the_demo(self) -> Samples:
        from modes_fx.data import LoadReport, Samples
        from modes_fx.demo import as_data, make_samples

        drawn = make_samples(self.part, _DEMO_IMAGES[self.part], self.seed)
        chosen = as_data(drawn[: self.samples])
        return Samples(chosen, LoadReport(DEMO, "built in", len(drawn), len(chosen), {}, ()))


def check_model(name: str) -> None:
    """See that a model's folder or file is there; go offline where a hub model's hub is not.

    Raises:
        ModelError: There is no such folder or file, or its config cannot be read.
    """
    if Path(locate(name)).exists() or os.environ.get("HF_HUB_OFFLINE"):
        return
    from modes_fx.models.waiting import hub_answers

    errors.print(f"{name} is no folder here: it is looked up on the Hugging Face hub.", highlight=False, markup=False)
    if not hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"  # its library, not imported yet, would try for half a minute
        errors.print("The hub cannot be reached: only what was downloaded before is used, as with HF_HUB_OFFLINE=1.")


def check_readable(file: Path) -> None:
    """See that a file can be read.

    Raises:
        PlanError: It cannot.
    """
    try:
        with file.open("rb"):
            pass
    except OSError as error:
        raise PlanError(f"Cannot read {file}: {error.strerror}.") from error


def check_choice(option: str, value: str, kind: Any) -> None:
    """Refuse a value of an option that is none of a ``Literal``'s.

    Raises:
        CalibrationError: It is not.
    """
    if value not in get_args(kind):
        raise CalibrationError(f"Unknown {option} {value!r}; known: {', '.join(get_args(kind))}.")


def check_data(source: Source) -> None:
    """See that the data are there.

    Raises:
        CalibrationError: They are not.
    """
    if source.path is not None and not source.path.exists():
        raise CalibrationError(f"There is no calibration data at {source.path}. Pass a file or folder.")


def check_inputs(model: str, source: Source) -> None:
    """See that a model is there, that it has data, and that no option for them is ignored.

    Raises:
        CalibrationError: It has no data, they are not there, or an option would be ignored.
        ModelError: There is no such model.
    """
    check_data(source)
    _check_options(model, source)
    check_model(model)


def _check_options(model: str, source: Source) -> None:
    if source.path is not None:
        return
    if model != DEMO:
        raise CalibrationError(f"No data for {model}: pass --data. Only the model `{DEMO}` brings its own.")
    for option, value in (("--data-format", source.format), ("--split", source.split)):
        if value is not None:
            raise CalibrationError(f"{option} would be ignored: the demo's built-in data are used. Pass --data too.")


def check_device(device: str | None, device_map: str | None) -> None:
    """See before any work that a device is there, and that nothing else says where the model goes.

    Raises:
        DeviceError: It is not, or something does.
    """
    from modes_fx.calib import processes
    from modes_fx.models.device import choose_device

    if device is not None and device_map is not None:
        raise DeviceError("--device and --device-map both say where the model goes. Pass one of them.")
    if device not in (None, "cpu", "cuda") and processes.are_launched():
        raise DeviceError(f"Several processes have a device each, got --device {device} for all. Pass cuda or cpu, or none.")
    if device_map is None:
        choose_device(device)


def say_without_figures() -> None:
    """Say it before hours of work if pages will lack their figures."""
    if importlib.util.find_spec("matplotlib") is None:
        console.print("Pages will have no figures: these need matplotlib (pip install 'modes-fx[viz]').", markup=False)


@contextmanager
def session(device: str | None = None) -> Iterator[Bars]:
    """Join the processes of ``torchrun`` or ``accelerate launch``, if any; the main one alone shows progress and results.

    Args:
        device: As the option; on ``"cpu"`` processes take no GPU, so that there may be more of them.
    """
    from modes_fx.calib import processes

    be_quiet()
    with processes.launched(cpu=device == "cpu"):
        before, console.quiet = console.quiet, not processes.is_main()
        try:
            with Bars() as bars:
                yield bars
        finally:
            console.quiet = before


def load_model(
    name: str, *, dtype: str, device: str | None, device_map: str | None, trust_remote_code: bool
) -> tuple[nn.Module, Any]:
    """Load a model and its processor; see ``modes_fx.models.loading`` and ``modes_fx.models.device``.

    Raises:
        ModelError: It cannot be loaded.
        DeviceError: There is no such device.
    """
    from modes_fx.models.device import choose_device
    from modes_fx.models.loading import load

    model, processor = load(name, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
    if device_map is None:
        model.to(choose_device(device))
    return model, processor


def load_samples(source: Source) -> Samples:
    """Draw the samples on the main process, and say what was found.

    Raises:
        CalibrationError: The data cannot be read.
    """
    from modes_fx.calib import processes

    samples = processes.together(source.load)
    processes_used = f", shared by {processes.world()} processes" if processes.world() > 1 else ""
    console.print(f"{samples.report}{processes_used}", highlight=False, markup=False)
    return samples


def load_batches(
    model: nn.Module,
    processor: Any,
    source: Source | Samples,
    batch_size: int,
    bars: Bars | None = None,
    *,
    by_answer: bool = False,
) -> list[Batch]:
    """Return this process's share of the batches, of samples that are drawn now or were drawn before; see ``make_batches``.

    Raises:
        CalibrationError: The data cannot be read, or cannot be turned into the model's forward arguments.
    """
    from modes_fx.calib import processes
    from modes_fx.data import make_batches

    samples = load_samples(source) if isinstance(source, Source) else source
    dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    shard = processes.rank(), processes.world()

    def make() -> list[Batch]:
        batches = make_batches(samples, processor, batch_size, shard=shard, dtype=dtype, by_answer=by_answer)
        made = []
        for batch in batches:
            made.append(batch)
            if bars is not None:
                bars("process the samples", len(made), len(batches))
        return made

    return processes.together(make)
