"""``completion``: a script for bash, made from the help's tables and the descriptors of what is installed."""

from __future__ import annotations

import re

from .common import Failure, Tool
from .help import COMMANDS, EXTRA, Command

_SCRIPT = r"""# bash completion for vm-img: source this file, or put it into /etc/bash_completion.d/
# Made by "vm-img completion bash" from the formats installed then; make it again after installing others.
_vm_img() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command= words= head= format= at
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
    # --name=value is one word here.
    [[ $cur == --*=* ]] && prev=${cur%%=*} head=$prev= cur=${cur#*=}
    for ((at = 1; at < COMP_CWORD; at++)); do
        case "$command:${COMP_WORDS[at]}" in
            create:-f|amend:-f|*:-O) format=${COMP_WORDS[at+1]};;
        esac
    done
    case "$command:$prev" in
        completion:*) words=bash;;
        *:-o)
            # Lists of name=value: complete the part behind the last comma.
            [[ $cur == *,* ]] && head=${cur%,*}, cur=${cur##*,}
            case "$format:${cur%%=*}" in
@CHOICES@
            esac
            if [[ $cur == *=* && -n $words ]]; then
                head=$head${cur%%=*}= cur=${cur#*=}
            else
                case "$format" in
@NAMES@
                esac
            fi;;
@VALUES@
        *) case "$command" in
@OPTIONS@
        esac;;
    esac
    if [[ $cur == -* || -n $words && $words != -* ]]; then
        mapfile -t COMPREPLY < <(compgen -P "$head" -W "$words" -- "$cur")
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
    creatable = sorted((one for one in drivers("format") if "create" in one.capabilities), key=lambda one: one.name)
    commands = {**COMMANDS, **EXTRA}
    values = {
        "convert-inplace:-O|convert-inplace:--target-format": " ".join(
            sorted(one.name for one in drivers("format") if "inplace" in one.capabilities)
        ),
        "create:-f|*:-O": " ".join(one.name for one in creatable),
        "*:-f|*:-F|*:--format|*:--source-format": " ".join(formats),
        "*:-t|*:-T": _CACHE,
        "check:-r|check:--repair": "leaks all",
        "*:--output": "human json",
        "*:--preallocation": "off metadata falloc full",
        "*:--progress": "text bar json none",
        "*:--object": "secret,id=",
        "bench:-i": "threads native io_uring",
        "verify:-a|verify:--algorithm": "sha256 blake2b",
    }
    lines = [f"        {pattern}) words='{words}';;" for pattern, words in values.items()]
    cases = [f"            {name}) words='{' '.join(_options(one))}';;" for name, one in sorted(commands.items())]
    named: list[str] = []
    chosen: list[str] = []
    every: set[str] = set()
    for driver in creatable:
        options = getattr(driver, "create_options", ())
        own = {f"{option.name}=" for option in options}
        every |= own
        named.append(f"                    {driver.name}) words='{' '.join(sorted(own))} help';;")
        for option in options:
            words = "on off" if option.type == "bool" else " ".join(option.choices)
            if words:
                chosen.append(f"                {driver.name}:{option.name}) words='{words}';;")
    named.append(f"                    *) words='{' '.join(sorted(every))} help';;")
    filled = _SCRIPT
    for mark, text in (
        ("@COMMANDS@", " ".join(sorted(commands))),
        ("@CHOICES@", "\n".join(chosen)),
        ("@NAMES@", "\n".join(named)),
        ("@VALUES@", "\n".join(lines)),
        ("@OPTIONS@", "\n".join(cases)),
    ):
        filled = filled.replace(mark, text)
    return filled


def _options(command: Command) -> list[str]:
    """The options that a command's help names."""
    found = {word for left, _ in command.options for word in _OPTION.findall(left)}
    return sorted({*found, "--help", "--trust", "--progress"})
