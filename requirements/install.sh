#!/usr/bin/env bash
# Brings a virtual environment to a lock of this folder plus rayrlhf itself; `make` runs it before everything else.
# usage: requirements/install.sh VENV      in the root of the repository
#   PYTHON     an interpreter; else python3.11, 3.12, 3.13 or python3, the first that fits, else one that uv has or brings
#   LOCK       cpu or gpu; else what is installed already, else cpu
#   INSTALLER  pip, to do without uv
# A stamp keyed on what is installed makes a second run return at once; the work is done by install.py.
set -euo pipefail

venv=$1
export PYTHON=${PYTHON:-} INSTALLER=${INSTALLER:-}
lock=${LOCK:-$(cat "$venv/lock" 2>/dev/null || echo cpu)}

fail() {
    printf 'install: %s\n' "$@" >&2
    exit 1
}

[ -f "requirements/$lock.lock" ] || fail "LOCK=$lock, wanted cpu or gpu."

# The folder belongs to the key: console scripts name their interpreter by its absolute path.
key=$({ printf '%s\n' "$PWD/$venv" "$lock" && cat "requirements/$lock.lock" pyproject.toml; } | sha256sum | cut -d ' ' -f 1)
if [ -z "$PYTHON" ] && [ -f "$venv/installed" ] && [ "$(cat "$venv/installed")" = "$key" ]; then
    exit 0
fi

fits() { # what the locks are for; a shim of a version manager may be there and not start
    [ "$("$1" -c 'import sys; print((3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null)" = True ]
}

uv_brings_python() { # an interpreter that uv knows of, or downloads; its index may be out of reach
    local uv range='>=3.11,<3.14'
    uv=$(command -v uv || ls ~/.local/bin/uv 2>/dev/null) || {
        local base
        base=$(command -v python3) || return 1
        echo "No Python 3.11 to 3.13 here: installing uv, which can bring one ..." >&2
        timeout 120 "$base" -m pip install --quiet --target .uv --timeout 10 --retries 1 uv >&2 || return 1
        uv=.uv/bin/uv
    }
    timeout 60 "$uv" python find --no-python-downloads "$range" 2>/dev/null && return
    echo "Asking uv for Python 3.11 ..." >&2
    timeout 600 "$uv" python install 3.11 >&2 || return 1
    timeout 60 "$uv" python find --no-python-downloads "$range"
}

if [ -n "$PYTHON" ]; then
    command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON was not found." "Say where a Python 3.11, 3.12 or 3.13 is, or leave PYTHON out."
    fits "$PYTHON" || fail "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1 | tail -n 1); the locked packages are for 3.11, 3.12 and 3.13." \
        "Say where one of these is, or leave PYTHON out."
    python=$PYTHON
else
    python=
    made_with=$(sed -n 's/^executable = //p' "$venv/pyvenv.cfg" 2>/dev/null || true)
    for candidate in "$made_with" python3.11 python3.12 python3.13 python3; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null && fits "$candidate"; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || python=$(uv_brings_python) || fail "no Python 3.11, 3.12 or 3.13 was found, and uv could not bring one." \
        "Install one with venv and pip (on Debian and Ubuntu: python3.11 and python3.11-venv), or say where it is: make install PYTHON=/path/to/python3"
fi
exec "$python" -m requirements.install "$venv" "requirements/$lock.lock" "$key"
