#!/usr/bin/env bash
# Brings .venv to requirements/cpu.lock plus rayrlhf itself (editable); `make` runs it before everything else.
# usage: requirements/install.sh PYTHON VENV      in the root of the repository
# A stamp keyed on what is installed makes a second run return at once.
set -euo pipefail

python=$1
venv=$2
lock=requirements/cpu.lock
stamp=$venv/installed
log=$venv/install.log

fail() {
    printf 'install: %s\n' "$@" >&2
    exit 1
}

# The folder belongs to the key: console scripts name their interpreter by its absolute path.
key=$(printf '%s\n' "$PWD/$venv" | cat - "$lock" pyproject.toml | sha256sum | cut -d ' ' -f 1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then
    exit 0
fi

command -v "$python" >/dev/null || fail "'$python' was not found, and the locked packages are for Python 3.11." \
    "Install it (on Debian and Ubuntu: python3.11 and python3.11-venv) or say where it is: make PYTHON=/path/to/python3.11"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "'$python' does not start."
[ "$version" = 3.11 ] || fail "'$python' is Python $version, but the locked packages are for Python 3.11." \
    "Say where a 3.11 is: make PYTHON=/path/to/python3.11"

# An environment that was moved, copied or is half made is made again; a complete one is only brought up to date.
if ! { head -n 3 "$venv/bin/pip" | grep -qF "$PWD/$venv/bin/python" && "$venv/bin/pip" --version; } >/dev/null 2>&1; then
    rm -rf "$venv"
    "$python" -m venv "$venv" || fail "'$python -m venv' failed (on Debian and Ubuntu it needs the package python3.11-venv)."
fi
rm -f "$stamp"

started=$SECONDS
printf 'Installing %s locked packages into %s (about 2 minutes, once) ...\n' "$(grep -c '==' "$lock")" "$venv"
# --no-deps: the lock is complete, and the resolver would add packages that break a CPU torch (see the lock's head).
# DS_BUILD_OPS=0: DeepSpeed without its CUDA ops, so that neither torch nor nvcc is needed to build it.
if ! {
    DS_BUILD_OPS=0 "$venv/bin/python" -m pip install --no-deps --no-input --disable-pip-version-check -r "$lock" &&
        "$venv/bin/python" -m pip install --no-deps --no-build-isolation --no-input --disable-pip-version-check -e .
} >"$log" 2>&1 </dev/null; then
    tail -n 20 "$log" >&2
    fail "pip failed; the whole log is $log"
fi
if ! "$venv/bin/python" -c 'import torch' >>"$log" 2>&1; then
    tail -n 5 "$log" >&2
    fail "torch was installed but does not import. If the line above names a CUDA library, the package index served torch's" \
        "CUDA build: remove $venv, put PyTorch's index of CPU wheels into PIP_EXTRA_INDEX_URL, and run make again."
fi
printf '%s\n' "$key" >"$stamp"
printf 'Installed in %s seconds (log: %s)\n' "$((SECONDS - started))" "$log"
