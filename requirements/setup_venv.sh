#!/usr/bin/env bash
# Makes the virtual environment of a checkout: setup_venv.sh FOLDER. `make setup` calls it; running it again is safe.
#
# Variables:
#   PYTHON       the interpreter to use; otherwise the first of python3, python3.13, python3.12, python3.11 that is
#                3.11 or newer
#   TORCH        what to install as torch instead of the choice below: any pip requirement, or the path of a wheel
set -euo pipefail
cd "$(dirname "$0")"

die() { echo "asyncopd: $*" >&2; exit 1; }

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_recent "$PYTHON" || die "PYTHON=$PYTHON is not a Python >= 3.11"
        echo "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if is_recent "$candidate"; then echo "$candidate"; return; fi
    done
    die "needs Python >= 3.11, but python3 is $(python3 --version 2>&1 || true)." \
        "Install one, or name it: make setup PYTHON=/path/to/python3.11"
}

# A plain `pip install torch` on Linux brings gigabytes of CUDA libraries, with or without a GPU. So:
#   macOS      the plain build is the CPU build
#   no GPU     the +cpu build, if pip has been configured with a place that holds one
#   otherwise  uv, which knows PyTorch's own indexes and takes the build that fits the GPU driver, or the CPU build
#              where there is none
install_torch() {
    local pin
    pin=$(grep '^torch==' torch.txt)
    if [ -n "${TORCH:-}" ]; then
        pip install -c lock.txt "$TORCH"
    elif "$python" -c "import importlib.metadata as m; assert 'torch==' + m.version('torch').split('+')[0] == '$pin'" \
        2>/dev/null; then
        echo "asyncopd: $pin is already there"
    elif [ "$(uname -s)" = Darwin ]; then
        pip install -c lock.txt "$pin"
    elif ! nvidia-smi >/dev/null 2>&1 && pip install -c lock.txt "$pin+cpu" 2>/dev/null; then
        :
    else
        echo "asyncopd: asking uv for the build of $pin that fits this machine"
        pip install uv
        "$python" -m uv pip install --python "$python" --torch-backend=auto -c lock.txt "$pin" || die \
            "no build of $pin could be installed; name one with make setup TORCH='a wheel or pip requirement'"
    fi
}

# For the kernels' tests, which its interpreter runs without a GPU. A CUDA build of torch has brought its own, and that
# one stays; a platform that has none goes without those tests.
install_triton() {
    if [ "$(uname -s)" = Linux ] && ! "$python" -c "import importlib.metadata as m; m.version('triton')" 2>/dev/null; then
        pip install --quiet -r triton.txt || echo "asyncopd: no triton for this machine; its kernels' tests are skipped"
    fi
}

pip() { "$python" -m pip --disable-pip-version-check "$@"; }

folder=$1
if [ ! -x "$folder/bin/python" ]; then
    base=$(find_python)
    "$base" -m venv "$folder"
fi
python=$folder/bin/python
is_recent "$python" || die "$folder holds $("$python" --version); remove the folder to have it made again"
install_torch
echo "asyncopd: installing the packages of requirements/lock.txt into $folder"
pip install --quiet -r lock.txt
install_triton
