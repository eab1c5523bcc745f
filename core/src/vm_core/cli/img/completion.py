"""``completion``: a script for bash, made from the help's tables and the descriptors of what is installed."""

from __future__ import annotations

import re

from .common import Failure, Tool
from .help import COMMANDS, EXTRA, Command

_SCRIPT = r"""# bash completion for vm-img: source this file, or put it into /etc/bash_completion.d/
# Made by "vm-img completion bash" from the formats installed then; make it again after installing others.
_vm_img() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command= words= at
    for ((at = 1; at < COMP_CWORD; at++)); do
        case "${COMP_WORDS[at]}" in
            --trust|--progress|-T|--trace) ((at++));;
            -*) ;;
            *) command=${COMP_WORDS[at]}; break;;
        esac
    done
    if [[ -z $command ]]; then
        case "$prev" in
            --trust) compopt -o dirnames; return;;
            --progress) words='text bar json none';;
            *) words='@COMMANDS@ --help --version --trust --progress';;
        esac
        mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
        return
    fi
    case "$command:$prev" in
        completion:*) words=bash;;
@VALUES@
        *) case "$command" in
@OPTIONS@
        esac;;
    esac
    if [[ $cur == -* || -n $words && $cur != -* && $words != -* ]]; then
        # Lists of key=value: complete the part behind the last comma.
        local head=
        [[ $cur == *,* ]] && head=${cur%,*},
        mapfile -t COMPREPLY < <(compgen -P "$head" -W "$words" -- "${cur##*,}")
        [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
    else
        mapfile -t COMPREPLY < <(compgen -f -- "$cur")
    fi
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o filenames -F _vm_img vm-img
"""

_CACHE = "writeback none writethrough directsync unsafe"
_OPTION = re.compile(r"(?<![\w-])(--?[A-Za-z][A-Za-z-]*)")


def run(args: list[str], tool: Tool) -> int:
    """``completion bash``."""
    options = tool.options(args, "h", {"help": "h"})
    list(options)
    if options.rest != ["bash"]:
        raise Failure("completion: name the shell; there is: bash")
    print(script(), end="")
    return 0


def script() -> str:
    """The script."""
    from ...plugins import drivers

    formats = sorted(one.name for one in drivers("format"))
    creatable = [one for one in drivers("format") if "create" in one.capabilities]
    options = sorted({f"{option.name}=" for one in creatable for option in getattr(one, "create_options", ())})
    commands = {**COMMANDS, **EXTRA}
    values = {
        "*:-f|*:-F|*:-O|*:--format|*:--source-format": " ".join(formats),
        "*:-o": " ".join([*options, "help"]),
        "*:-t|*:-T": _CACHE,
        "check:-r|check:--repair": "leaks all",
        "*:--output": "human json",
        "*:--preallocation": "off metadata falloc full",
        "*:--progress": "text bar json none",
        "*:--object": "secret,id=",
        "bench:-i": "threads native io_uring",
    }
    lines = [f"        {pattern}) words='{words}';;" for pattern, words in values.items()]
    cases = [f"            {name}) words='{' '.join(_options(one))}';;" for name, one in sorted(commands.items())]
    filled = _SCRIPT.replace("@COMMANDS@", " ".join(sorted(commands)))
    return filled.replace("@VALUES@", "\n".join(lines)).replace("@OPTIONS@", "\n".join(cases))


def _options(command: Command) -> list[str]:
    """The options that a command's help names."""
    found = {word for left, _ in command.options for word in _OPTION.findall(left)}
    return sorted({*found, "--help", "--trust", "--progress"})
