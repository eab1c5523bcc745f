"""A completion script for bash, made from the option table and the descriptors of what is installed."""

from __future__ import annotations

from ..errors import UsageError
from ..plugins import registry
from .arguments import ARGUMENTS
from .drives import DRIVE_OPTIONS

_SCRIPT = r"""# bash completion for vm: source this file, or put it into /etc/bash_completion.d/
# Made by "vm --completion bash" from the plugins installed then; make it again after installing others.
_vm() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words=
    case "$prev" in
@CASES@
        @FILES@) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return;;
        *) [[ $cur == -* ]] && words='@OPTIONS@' || { mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return; };;
    esac
    # Values are lists of key=value: complete the part behind the last comma.
    local head=
    [[ $cur == *,* ]] && head=${cur%,*},
    mapfile -t COMPREPLY < <(compgen -P "$head" -W "$words" -- "${cur##*,}")
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o filenames -F _vm vm
"""

_FILES = ("hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "kernel", "initrd", "bios", "trust")


def script(shell: str) -> str:
    """The script for *shell*."""
    if shell != "bash":
        raise UsageError(f"--completion {shell}: there is: bash")
    plugins = registry()
    drive = [f"{option.name}=" for option in DRIVE_OPTIONS]
    drive += [f"format={each.name}" for each in plugins.all("format")]
    drive += [f"aio={each.name}" for each in plugins.all("engine")]
    drive += [f"if={word}" for each in plugins.all("device") for word in getattr(each, "interfaces", ())]
    device = [each.name for each in plugins.all("device")]
    device += [f"{option.name}=" for each in plugins.all("device") for option in each.options]
    words = {
        "drive": [*drive, "cache=none", "cache=writeback", "cache=writethrough", "cache=unsafe", "if=none", "help"],
        "device": [*device, "drive=", "id=", "bus=", "addr=", "help"],
        "accel": [*(each.name for each in plugins.all("accelerator")), "help"],
        "machine": ["pc", "help"],
        "serial": ["stdio", "mon:stdio", "null", "none", "pty", "file:", "unix:", "tcp:"],
        "monitor": ["stdio", "null", "none", "pty", "unix:", "tcp:"],
        "qmp": ["stdio", "unix:", "tcp:"],
        "display": ["none"],
        "vga": ["none"],
        "rtc": ["base=utc", "base=localtime"],
        "boot": ["order=c", "order=d", "once=d", "menu=on", "strict=on"],
        "status": ["auto", "rich", "plain", "off"],
        "completion": ["bash"],
        "list-plugins": ["device", "engine", "format", "protocol", "accelerator", "export"],
    }
    cases = "\n".join(
        f"        -{name}|--{name}) words='{' '.join(sorted(set(each)))}';;" for name, each in words.items()
    )
    names = [f"-{name}" for argument in ARGUMENTS for name in (argument.name, *argument.aliases)]
    files = "|".join(f"-{name}|--{name}" for name in _FILES)
    filled = _SCRIPT.replace("@CASES@", cases).replace("@FILES@", files)
    return filled.replace("@OPTIONS@", " ".join(names)).rstrip()
