"""Run mypy (strict, as ``pyproject.toml`` says) over every package of the tree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    marks = [*ROOT.glob("core/src/*/py.typed"), *ROOT.glob("plugins/*/src/*/py.typed")]
    words = [word for mark in sorted(marks) for word in ("-p", mark.parent.name)]
    return subprocess.run([sys.executable, "-m", "mypy", *words], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
