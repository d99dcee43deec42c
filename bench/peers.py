"""``python -m bench.peers``: an environment that holds Liubai, transformers and the newest TRL.

Both sides run from this one environment, so they share one torch. Needs only the standard library.
"""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-peers"
PEERS = ("trl", "transformers", "accelerate", "datasets")


def main() -> None:
    ready = FOLDER / "ready"
    if ready.exists() and ready.stat().st_mtime >= (ROOT / "pyproject.toml").stat().st_mtime:
        return
    python = FOLDER / "bin" / "python"
    if not python.exists():
        venv.create(FOLDER, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch first and alone: with its version settled, nothing that follows pulls in another build
    subprocess.run([*pip, _torch()], check=True)
    subprocess.run([*pip, "--upgrade", _torch(), *PEERS], check=True)
    subprocess.run([*pip, "--editable", str(ROOT)], check=True)
    ready.touch()


def _torch() -> str:
    """The very torch that Liubai asks for."""
    found = re.search(r'"(torch==[^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if found is None:
        sys.exit("pyproject.toml pins no torch")
    return found[1]


if __name__ == "__main__":
    main()
