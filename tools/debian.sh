# Sourced by the scripts beside it: bring Debian packages, or ask for them by name.

# need PACKAGE...: install what is missing (as root or through sudo), else say what to type and stop.
need() {
    missing=""
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing="$missing $package"
    done
    [ -z "$missing" ] && return 0
    if ! command -v apt-get >/dev/null; then
        echo "These Debian packages (or your system's equivalents) are needed:$missing" >&2
        exit 1
    fi
    if [ "$(id -u)" = 0 ]; then root=""; elif sudo -n true 2>/dev/null; then root="sudo"; else
        echo "Please install first:  sudo apt-get install --no-install-recommends$missing" >&2
        exit 1
    fi
    echo "Installing Debian packages:$missing" >&2
    $root apt-get -qq update >/dev/null 2>&1 || true
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive $root apt-get -qq install -y --no-install-recommends $missing >/dev/null
}

# python_311: print the first interpreter that is new enough and can make a virtual environment.
python_311() {
    for python in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return 0
        fi
    done
    echo "Python 3.11 or newer with venv is needed:  apt-get install python3 python3-venv" >&2
    return 1
}
