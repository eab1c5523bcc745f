"""Install the distributions of this tree into the running interpreter: ``python tools/plugins.py [options] [NAME...]``.

    python tools/plugins.py                  core, every plugin and the example of one, with all optional libraries
    python tools/plugins.py qcow2 ide        core and these plugins
    python tools/plugins.py --test qcow2     the same, then its tests (options of pytest after --)
    python tools/plugins.py --list           the names
    python tools/plugins.py --editable       as development installs

What stands in a plugin's folder decides: whoever adds ``plugins/NAME`` edits no list.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Extras that are for developers, not for use.
FOR_TESTS = ("test", "dev")


def names() -> list[str]:
    """Every plugin of the tree, by folder."""
    return sorted(path.parent.name for path in (ROOT / "plugins").glob("*/pyproject.toml"))


def requirement(folder: Path, *, tests: bool) -> str:
    """*folder* as pip takes it, with its extras."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [name for name in project.get("optional-dependencies", {}) if tests or name not in FOR_TESTS]
    return f"{folder}[{','.join(extras)}]" if extras else str(folder)


def main(words: list[str]) -> int:
    more = words[words.index("--") + 1 :] if "--" in words else []
    words = words[: words.index("--")] if "--" in words else words
    options = {word for word in words if word.startswith("--")}
    chosen = [word.removeprefix("plugin-") for word in words if not word.startswith("--")]
    unknown = (options - {"--test", "--list", "--editable"}) or (set(chosen) - set(names()))
    if unknown:
        print(f"tools/plugins.py: {min(unknown)}: no such option or plugin ({', '.join(names())})", file=sys.stderr)
        return 2
    if "--list" in options:
        print("\n".join(names()))
        return 0
    tests = "--test" in options
    folders = [ROOT / "core", *(ROOT / "plugins" / name for name in chosen or names())]
    if not chosen:
        folders += [path.parent for path in (ROOT / "examples").glob("*/pyproject.toml")]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    for folder in folders:
        pip += ["-e"] * ("--editable" in options) + [requirement(folder, tests=tests)]
    done = subprocess.run(pip, cwd=ROOT).returncode
    if done or not tests:
        return done
    tests_of = [f"plugins/{name}/tests" for name in chosen]
    return subprocess.run([sys.executable, "-m", "pytest", *tests_of, *more], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
