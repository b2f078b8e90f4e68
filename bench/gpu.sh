#!/usr/bin/env bash
# Everything that needs a GPU, in one command, without a network and in less than ten minutes:
#
#   bench/gpu.sh [STEP...]    the steps below; all of them if none is named
#
#   build      a virtual environment on top of PYTHON's packages, and the extension (always; seconds where both are)
#   triton     tests of ops, losses and backends on the Triton kernels
#   cuda       the same on the CUDA kernels
#   bench      the cases of size "gpu", everybody side by side: $OUT/results.jsonl
#   sanitize   the CUDA tests of the ops under compute-sanitizer, if it is installed: memcheck, then racecheck
#
# A step that ended well is written to $OUT/done and not run again, and a case that has been measured is not measured
# again: the same command, given the same $OUT, takes an interrupted run up, on another machine too. Take a new
# $OUT for another version of the code. Logs are $OUT/STEP.log. Exit status 0: every step has ended well. Afterwards:
#   cp $OUT/results.jsonl bench/results/GPU-DATE.jsonl && make bench-report
#
# Needed: Python >= 3.11 with torch, triton, numpy, pytest, pytest-timeout, hypothesis, rich, typer, pip, pybind11,
# ninja and setuptools >= 77; nvcc and a C++ compiler. What Python lacks can be brought as wheels. Variables:
#   OUT              where it all goes (build/gpu)
#   PYTHON           the interpreter (python3)
#   WHEELS           a folder of wheels to install into the virtual environment first
#   WORKERS          processes of pytest, where pytest-xdist is there (12)
#   LIMIT_S          seconds for all steps together (570)
#   ASYNCOPD_COMMIT  what the results are of, where the checkout has no .git
# and for a rehearsal without a GPU (DEVICE=cpu SIZE=ci ONLY=kl BACKENDS=cpu TESTS=tests/ops/test_gather.py, say):
#   DEVICE, SIZE, ONLY   of the benchmark (cuda, gpu, all cases)
#   BACKENDS, TESTS      to be tested (triton cuda), and by which files
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

export OUT=${OUT:-build/gpu} PYTHON=${PYTHON:-python3} WHEELS=${WHEELS:-} WORKERS=${WORKERS:-12} LIMIT_S=${LIMIT_S:-570}
export DEVICE=${DEVICE:-cuda} SIZE=${SIZE:-gpu} ONLY=${ONLY:-} BACKENDS=${BACKENDS:-triton cuda}
export TESTS=${TESTS:-tests/ops tests/losses tests/backends}
# Compiled kernels are what is tested and measured here, on the backend that a test or a benchmark asks for.
unset TRITON_INTERPRET ASYNCOPD_BACKEND
venv=build/gpu-venv
python=$venv/bin/python

# ------------------------------------------------------------------------------------------------------------ steps

step_build() {
    "$PYTHON" -c '
import sys
sys.exit(f"Python {sys.version}; needed 3.11 or newer" if sys.version_info < (3, 11) else 0)' || return
    "$PYTHON" -m venv --clear --without-pip "$venv" || return
    # The interpreter's own packages below those of the virtual environment. That it has torch is why it was chosen, and
    # --system-site-packages would skip them where PYTHON is itself of a virtual environment.
    "$PYTHON" -c '
import sys
for path in sys.path:
    if path.endswith(("site-packages", "dist-packages")):
        print(f"import site; site.addsitedir({path!r})")
' > "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth" || return
    if [ -n "$WHEELS" ]; then
        "$python" -m pip install --quiet --no-index --no-deps --upgrade "$WHEELS"/*.whl || return
    fi
    "$python" -c '
import importlib.metadata as metadata, importlib.util as util, sys
names = "torch numpy pytest pytest_timeout hypothesis rich typer setuptools pip pybind11 ninja".split()
missing = [name for name in names + ["triton"] * (sys.argv[1] == "cuda") if util.find_spec(name) is None]
if missing:
    sys.exit("not installed: " + ", ".join(missing) + "; bring wheels (WHEELS)")
version = metadata.version("setuptools")
if int(version.split(".")[0]) < 77:  # older ones do not understand pyproject.toml
    sys.exit(f"setuptools {version}, needed 77 or newer; bring its wheel (WHEELS)")
' "$DEVICE" || return
    if [ "$DEVICE" = cuda ]; then export ASYNCOPD_BUILD_CUDA=1; fi
    "$python" setup.py --quiet build_ext --inplace || return
    "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps --editable . || return
    "$python" -c '
from torch import __version__, cuda
print(f"torch {__version__},", cuda.get_device_name() if cuda.is_available() else "no GPU")'
}

# A test's name says its backend. Other tests may have the word in theirs, so whether it runs at all is asked first.
step_tests() {
    "$python" -c '
import sys
from asyncopd import backends
sys.exit(backends.unavailable_reason(sys.argv[1]))' "$1" || return
    local workers=()
    if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n "$WORKERS"); fi
    # shellcheck disable=SC2086 # TESTS is a list
    "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" -k "$1" $TESTS
}

step_bench() {
    local status=4
    # 4: a case broke the device, for its process. The others can still be had.
    for _ in 1 2 3; do
        "$python" -m bench.suite --size "$SIZE" --device "$DEVICE" --only "$ONLY" --budget-s 190 \
            --results "$OUT/results.jsonl"
        status=$?
        if [ "$status" -ne 4 ]; then break; fi
    done
    return "$status"
}

step_sanitize() {
    local sanitizer tool kernel filters=()
    sanitizer=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
    if [ -z "$sanitizer" ]; then echo "compute-sanitizer is not installed: skipped"; return 0; fi
    # torch's allocator rounds up and reuses: what lies beyond a tensor would be somebody's.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    # torch's kernels are its own affair, and instrumented they would take minutes. Ours have a register budget each.
    while read -r kernel; do
        filters+=(--kernel-name "kns=$kernel")
    done < <(sed -n 's|^// max-registers: \([a-z0-9_]*\) .*|\1|p' csrc/cuda/*.cu)
    for tool in memcheck racecheck; do
        echo "compute-sanitizer --tool $tool ${filters[*]}"
        "$sanitizer" --tool "$tool" "${filters[@]}" --error-exitcode 9 --target-processes all \
            "$python" -m pytest -q -p no:cacheprovider -x -k cuda -m "not slow" tests/ops || return
    done
}

if [ "${1:-}" = --step ]; then
    case $2 in
        build) step_build ;;
        bench) step_bench ;;
        sanitize) step_sanitize ;;
        *) step_tests "$2" ;;
    esac
    exit
fi

# -------------------------------------------------------------------------------------------------- one after another

# The most that a step may take; together they take less, and LIMIT_S at most.
limit_of() {
    case $1 in
        build) echo 90 ;;
        triton) echo 240 ;;
        bench) echo 225 ;;
        sanitize) echo 75 ;;
        *) echo 60 ;;
    esac
}

mkdir -p "$OUT" || exit 1
touch "$OUT/done"
# shellcheck disable=SC2206 # BACKENDS is a list
steps=($BACKENDS bench sanitize)
if [ $# -gt 0 ]; then steps=("$@"); fi
for step in "${steps[@]}"; do
    case " build $BACKENDS bench sanitize " in
        *" $step "*) ;;
        *) echo "bench/gpu.sh: no step $step; there are: build $BACKENDS bench sanitize" >&2; exit 2 ;;
    esac
done

summary=()
failed=0
run() {
    local name=$1 limit left=$((LIMIT_S - SECONDS)) begin=$SECONDS status
    if grep -qx "$name" "$OUT/done"; then summary+=("$name: done before"); return 0; fi
    if [ "$left" -lt 10 ]; then
        summary+=("$name: not begun, $LIMIT_S s are over; run again to go on")
        failed=1
        return 1
    fi
    limit=$(limit_of "$name")
    if [ "$limit" -gt "$left" ]; then limit=$left; fi
    echo "== $name, at most $limit s, log: $OUT/$name.log"
    # INT, so that pytest still says what it has seen.
    timeout --signal=INT --kill-after=10 "$limit" bash bench/gpu.sh --step "$name" > "$OUT/$name.log" 2>&1
    status=$?
    if [ "$status" -eq 0 ]; then
        if [ "$name" != build ]; then echo "$name" >> "$OUT/done"; fi
        summary+=("$name: done in $((SECONDS - begin)) s: $(tail -n 1 "$OUT/$name.log")")
    else
        failed=1
        summary+=("$name: FAILED with status $status after $((SECONDS - begin)) s")
        echo "== $name failed; the end of its log:"
        tail -n 25 "$OUT/$name.log"
    fi
    return "$status"
}

# Nothing can follow a build that failed.
if run build; then
    for step in "${steps[@]}"; do
        if [ "$step" != build ]; then run "$step"; fi
    done
fi
if [ -f "$OUT/results.jsonl" ]; then "$python" -m bench.report "$OUT/results.jsonl"; fi
printf '== %s\n' "${summary[@]}"
exit "$failed"
