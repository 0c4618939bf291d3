#!/bin/sh
# Prints the Python to use, or says on stderr what is missing (one apt line) and fails.
# Needed: Python 3.11 or 3.12 with venv and its shared libpython (Triton's Python stub loads it), gcc.
set -u

python_ok() { "$1" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }

if [ -n "${PYTHON:-}" ] && ! python_ok "$PYTHON"; then
    echo "PYTHON=$PYTHON is not a Python 3.11 or 3.12 that runs: name another one, or leave PYTHON out" >&2
    exit 1
fi

python=""
for candidate in ${PYTHON:-} python3.12 python3.11 python3; do
    if command -v "$candidate" >/dev/null 2>&1 && python_ok "$candidate"; then python=$candidate; break; fi
done

missing=""
if [ -z "$python" ]; then
    missing="python3 python3-venv libpython3-dev"
else
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 || missing="$missing python$version-venv"
    "$python" - >/dev/null 2>&1 <<'PY' || missing="$missing libpython$version"
import ctypes, pathlib, sys, sysconfig
name = "libpython%d.%d.so.1.0" % sys.version_info[:2]
beside = pathlib.Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib") / name
ctypes.CDLL(str(beside) if beside.exists() else name)
PY
fi
command -v gcc >/dev/null 2>&1 || missing="$missing gcc"

if [ -n "$missing" ]; then
    echo "missing on this machine:$(echo " $missing" | tr -s ' ') - install it with: apt-get install -y$(echo " $missing" | tr -s ' ')" >&2
    [ -z "$python" ] && echo "(Python 3.11 or 3.12 is needed; PYTHON=/path/to/python3.12 make demo uses another one)" >&2
    exit 1
fi
command -v "$python"
