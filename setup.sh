#!/bin/sh
# Makes the virtual environment that `make` uses: setup.sh VENV [PYTHON]. A second call installs nothing.
set -eu
cd "$(dirname "$0")"
venv=$1
fail() { printf 'prefab set-up: %s\n' "$1" >&2; exit 1; }

usable() { command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
python=
for candidate in ${2:-python3 python3.13 python3.12 python3.11}; do
    if usable "$candidate"; then python=$candidate; break; fi
done
[ -n "$python" ] || fail "needs Python 3.11 or newer, and found none under ${2:-python3, python3.13, python3.12 or python3.11}.
  Debian 12, Ubuntu 24.04 or newer: apt install python3 python3-venv    or name one: make PYTHON=/path/to/python3.12"

if nvidia-smi -L >/dev/null 2>&1; then file=requirements-gpu.txt need_gb=20; else file=requirements.txt need_gb=5; fi
# The packages for GPUs are built for CUDA 13.
if [ "$file" = requirements-gpu.txt ]; then
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
    major=${driver%%.*}
    case $major in *[!0-9]* | "") major=580 ;; esac  # not known: try
    [ "$major" -ge 580 ] || fail "needs NVIDIA driver 580 or newer (CUDA 13), and there is $driver.
  Update the driver; or hide the GPU and install for the CPU: put a command nvidia-smi that fails first in PATH"
fi
# The project is installed in place, so a moved checkout needs its environment made again.
packages="$("$python" -c 'import sys; print(sys.version.split()[0])') $(pwd) $(sha256sum < "$file" | cut -c1-32)"
project=$(cat pyproject.toml setup.sh | sha256sum | cut -c1-32)
stamp() { cat "$venv/.$1" 2>/dev/null || true; }
pip="$venv/bin/python -m pip --disable-pip-version-check -qq"
# Pip's editable install finds `prefab` by an import hook, which type checkers and editors do not run. A path that
# holds nothing but a link to it is found by all of them.
install_project() {
    $pip install --no-deps --no-build-isolation --editable .
    mkdir -p "$venv/src" && ln -sfn "$(pwd)/prefab" "$venv/src/prefab"
    (cd "$venv/src" && pwd) > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/prefab.pth"
    echo "$project" > "$venv/.project"
}
if [ "$(stamp packages)" = "$packages" ]; then
    [ "$(stamp project)" = "$project" ] || install_project
    exit 0
fi

"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$python has no venv module.
  Debian or Ubuntu: apt install python3-venv"
mkdir -p "$venv"
free_gb=$(($(df -Pk "$venv" | awk 'NR == 2 {print $4}') / 1048576))
[ "$free_gb" -ge "$need_gb" ] || fail "needs $need_gb GB of free disk space for $venv, and there are $free_gb GB."
# On a CPU vLLM compiles each model it serves, against Python's headers.
if [ "$file" = requirements.txt ]; then
    command -v "${CXX:-g++}" >/dev/null 2>&1 || fail "needs a C++ compiler, ${CXX:-g++}: vLLM compiles models with it.
  Debian or Ubuntu: apt install g++"
    "$python" -c 'import os, sysconfig; os.stat(os.path.join(sysconfig.get_paths()["include"], "Python.h"))' 2>/dev/null ||
        fail "$python has no headers (Python.h), against which vLLM compiles models.
  Debian or Ubuntu: apt install python3-dev"
fi

echo "prefab set-up: $("$python" -V) -> $venv, $(grep -c == "$file") packages of $file (a few minutes, once)"
"$python" -m venv --clear "$venv"
$pip install --no-deps -r "$file" || fail "pip could not install $file (its reason is above).
  No 'torch==2.13.0+cpu'? PyTorch's CPU index serves it: pytorch.org, Get Started, Linux / Pip / CPU prints the address.
  Then: PIP_EXTRA_INDEX_URL=<that address> make setup"
if [ "$file" = requirements-gpu.txt ]; then
    torch=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))')
    case $torch in *+cpu*) fail "pip installed torch $torch, which cannot use the GPU: it also sees PyTorch's CPU index.
  Unset PIP_EXTRA_INDEX_URL, or remove that index from pip's configuration (pip config list); then: rm -r $venv && make setup" ;; esac
fi
install_project
echo "$packages" > "$venv/.packages"
echo "prefab set-up: done; the command is $venv/bin/prefab"
