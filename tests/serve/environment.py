"""Make an environment with vLLM fit for a CPU: ``python -m tests.serve.environment``, once, after it was installed.

With a report of ``pip install --dry-run`` it prints the pins of what would be installed instead.

vLLM brings torchaudio, torchcodec and torchvision, which package indexes hold for CUDA. Where torch is a build for CPUs, they
fail at import, and vLLM with them. The first two are not needed. Image processors need the third, if not its operators: these
get their schemas, before anybody imports it and in every process, by a ``.pth`` file.
"""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

SCHEMAS = "; ".join(
    [
        "import torch",
        "torch.torchvision_schemas = torch.library.Library('torchvision', 'FRAGMENT')",
        *(
            f"torch.torchvision_schemas.define('{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')"
            for name in ("nms", "qnms")
        ),
    ]
)


def imports(name: str) -> bool:
    """Say whether a fresh process can import a module."""
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0


def pins(report: Path) -> list[str]:
    """Return pins of all that pip would install, but this project."""
    found = (each["metadata"] for each in json.loads(report.read_text())["install"])
    return sorted(
        f"{each['name'].lower().replace('_', '-')}=={each['version'].partition('+')[0]}"
        for each in found
        if each["name"] != "modes-fx"
    )


def main() -> None:
    """Mend what does not import."""
    if sys.argv[1:]:
        title = "# This file was made by: make lock    (for Linux; made and tested with Python 3.11)"
        sys.stdout.write("\n".join([title, *pins(Path(sys.argv[1]))]) + "\n")
        return
    if broken := [name for name in ("torchaudio", "torchcodec") if not imports(name)]:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *broken], check=True)
    if not imports("torchvision"):
        Path(sysconfig.get_path("purelib"), "torchvision_schemas.pth").write_text(SCHEMAS + "\n")
        if not imports("torchvision"):
            raise SystemExit("torchvision does not import, which vLLM's processors need. Install the release for this torch.")


if __name__ == "__main__":
    main()
