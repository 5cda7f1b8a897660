"""The exceptions that modes-fx raises on purpose; each says what failed, where, and what to do next."""


class ModesFxError(Exception):
    """Base of every error that modes-fx raises on purpose.

    Its message says what to do. Raised by itself for an unknown choice (a region, a mode, a rule) and for a file that cannot be
    written; what was measured by then is kept in the temporary folder, and the message says where.
    """


class NoRoutingSiteError(ModesFxError):
    """No Mixture-of-Experts routing site could be rewritten in the model.

    ``modes-fx inspect MODEL`` names the reason of each site; docs/troubleshooting.md says what each means.
    """


class NotOptimizedError(ModesFxError):
    """The model is not optimised (or no longer is), so there is nothing to report, change or undo.

    Call ``modes_fx.optimize`` on this very object: copies and unpickled models are stock.
    """


class ModalityError(ModesFxError, ValueError):
    """The modality of the running forward's tokens is missing or does not fit its shape.

    Pass all that the processor returns; without ``input_ids`` call the model inside ``with modes_fx.token_modality(ids):``.
    """


class PlanError(ModesFxError, ValueError):
    """A skip plan is unreadable, malformed, has no such target, or belongs to another model.

    ``modes-fx plan check FILE`` says what it holds; ``modes-fx plan sign FILE`` signs a change made on purpose.
    """


class CalibrationError(ModesFxError, ValueError):
    """Calibration or search was given data or functions that it cannot use.

    Look at the sample that the message names; ``labels`` are -100 but on the answer tokens.
    """


class UnreachableError(CalibrationError):
    """No choice of thresholds reaches any of the target skip ratios on the data.

    Ask for lower targets, or for a finer grid (``--grid-size``).
    """


class CompilerError(ModesFxError, RuntimeError):
    """Inductor cannot generate code on this machine, or torch.compile is switched off.

    Install a C++ compiler (``apt-get install g++``), or name one in the environment variable ``CXX``; start Python anew.
    """


class ModelError(ModesFxError, ValueError):
    """A model folder is missing, unreadable or of a kind that modes-fx cannot load.

    Name another folder or id. What changes a model (moving, quantising, adapters) comes before ``optimize``.
    """


class ServingError(ModesFxError, ValueError):
    """A server was asked for what modes-fx cannot serve: it does not start, or keeps the thresholds that it has.

    Change the setting that the message names; docs/serving.md has all of them.
    """


class DeviceError(ModesFxError, ValueError):
    """There is no such device on this machine, or two options name different ones.

    ``python -c "import torch; print(torch.cuda.device_count())"`` tells how many GPUs torch sees.
    """


def printable(text: str) -> str:
    """Return text as a screen may show it: control characters, which files can hold too, in their Python spelling."""
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


def in_a_line(error: Exception) -> str:
    """Return an error's type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def no_compiler(error: Exception) -> CompilerError:
    """Describe a missing C++ compiler and what to do about it."""
    return CompilerError(
        f"Inductor needs a C++ compiler to generate code and found none that works ({error}). Install one (for example "
        "`apt-get install g++`), or name yours in the environment variable CXX, then start Python anew."
    )
