#!/usr/bin/env bash
# Everything that needs a GPU, in one command, without a network and in six minutes:
#
#   bench/gpu.sh [STEP...]    the steps below in this order; without a name all but sanitize (and peers unless PEERS=1)
#
#   build     a virtual environment on top of PYTHON's packages, and the extension (always; seconds where both are)
#   smoke     every op once on every backend beside the reference; an op that breaks ends the run with its name
#   host      what calls cost the CPU: $OUT/host.jsonl
#   probe     what decides designs of kernels: $OUT/probe.jsonl
#   bench     the limit, torch.compile and asyncopd in the same rounds, the cases of size "gpu": $OUT/results.jsonl
#   profile   the headline cases kernel by kernel: $OUT/profile.jsonl
#   triton    tests of ops, losses and backends on the Triton kernels, those that failed in the last run first
#   cuda      tests of ops and losses on the CUDA kernels (those of tests/backends run them on a CPU: not here)
#   peers     eager torch, the CUDA kernels and other projects, added to $OUT/results.jsonl (PEERS=1, or by name)
#   sanitize  tests of the ops on the CUDA kernels under compute-sanitizer, if it is installed (by name only)
#
# Measurements come before the tests, so that a test that hangs cannot take their time; smoke makes them trustworthy, and
# the benchmark checks every result against fp64. nvidia-smi writes the clocks into $OUT/clocks.csv every 200 ms; the
# median clock is printed beside what was measured. Every figure is in its file as soon as it is known.
#
# A step that ended well is written to $OUT/done and not run again, and what has been measured is not measured again: the
# same command, given the same $OUT, takes an interrupted run up. Take a new $OUT for another version of the code. Logs
# are $OUT/STEP.log. Compiled Triton kernels are packed into $OUT/triton-cache.tar.gz at the end; give that file to the
# next run as CACHE, and most of the time of smoke and tests is saved. Exit status 0: every step has ended well. Then:
#   make bench-report ARGS="--keep $OUT/results.jsonl"     puts the results into bench/results and README's table
#
# Needed: Python >= 3.11 with torch, triton, numpy, pytest, pytest-timeout, hypothesis, rich, typer, pip, pybind11,
# ninja and setuptools >= 77; nvcc and a C++ compiler. What Python lacks can be brought as wheels. pydantic,
# transformers, safetensors and pyyaml, which the pipeline needs, may be missing: no step here imports them.
# pytest-xdist should be there: without it the tests run one after another and do not end in time. Variables:
#   OUT              where it all goes (build/gpu)
#   PYTHON           the interpreter (python3)
#   WHEELS           a folder of wheels to install into the virtual environment first
#   CACHE            a triton-cache.tar.gz of an earlier run (that of $OUT)
#   WORKERS          processes of smoke, and of pytest where pytest-xdist is there (14, at most the number of cores)
#   PEERS            1: the step peers too, in the time that is left (0)
#   LIMIT_S          seconds for all steps together (360)
#   ASYNCOPD_COMMIT  what the results are of, where the checkout has no .git
#   TESTS_triton, TESTS_cuda   the files of tests of a backend (see above)
# and for a rehearsal without a GPU (DEVICE=cpu SIZE=ci ONLY=kl BACKENDS=cpu TESTS_cpu=tests/ops/test_gather.py, say), in
# which host and probe launch kernels into nothing (bench.launch_check):
#   DEVICE, SIZE, ONLY   of the benchmark and the profile (cuda, gpu, all cases)
#   BACKENDS             to be smoked and tested, separated by spaces (triton cuda)
#   PARTS, ROUNDS        of the probe (all), of host (its own)
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

cores=$(getconf _NPROCESSORS_ONLN)
export OUT=${OUT:-build/gpu} PYTHON=${PYTHON:-python3} WHEELS=${WHEELS:-} WORKERS=${WORKERS:-$((cores < 14 ? cores : 14))}
export LIMIT_S=${LIMIT_S:-360} PEERS=${PEERS:-0} CACHE=${CACHE:-$OUT/triton-cache.tar.gz}
export DEVICE=${DEVICE:-cuda} SIZE=${SIZE:-gpu} ONLY=${ONLY:-} BACKENDS=${BACKENDS:-triton cuda}
export PARTS=${PARTS:-} ROUNDS=${ROUNDS:-}
export TESTS_triton=${TESTS_triton:-tests/ops tests/losses tests/backends}
export CLOCKS=$OUT/clocks.csv
# Compiled kernels are what is tested and measured here, on the backend that a test or a benchmark asks for.
unset TRITON_INTERPRET ASYNCOPD_BACKEND
venv=build/gpu-venv
python=$venv/bin/python
measurements="host probe bench profile"

# ------------------------------------------------------------------------------------------------------------ steps

step_build() {
    echo "$cores cores: $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null | head -n 1)"
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
if util.find_spec("xdist") is None:
    print("pytest-xdist is not installed: tests run one after another")
' "$DEVICE" || return
    if [ "$DEVICE" = cuda ]; then export ASYNCOPD_BUILD_CUDA=1; fi
    "$python" setup.py --quiet build_ext --inplace || return
    "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps --editable . || return
    "$python" -c '
from torch import __version__, cuda
print(f"torch {__version__},", cuda.get_device_name() if cuda.is_available() else "no GPU")'
}

step_smoke() {
    "$python" -m bench.smoke --device "$DEVICE" --backends "${BACKENDS// /,}" --jobs "$WORKERS"
}

step_host() {
    "$python" -m bench.host_time --device "$DEVICE" --results "$OUT/host.jsonl" --rounds "${ROUNDS:-60}"
}

step_probe() {
    local dry=()
    if [ "$DEVICE" != cuda ]; then dry=(--dry-run); fi
    # shellcheck disable=SC2086 # PARTS is a list
    "$python" -m bench.probe $PARTS --results "$OUT/probe.jsonl" --budget-s 85 "${dry[@]}"
}

# A case may break the device, for its process (status 4). The others can still be had.
step_bench() {
    local status=4
    for _ in 1 2 3; do
        "$python" -m bench.suite --size "$SIZE" --device "$DEVICE" --only "$ONLY" --results "$OUT/results.jsonl" "$@"
        status=$?
        if [ "$status" -ne 4 ]; then break; fi
    done
    return "$status"
}

step_profile() {
    "$python" -m bench.profile_kernels --size "$SIZE" --device "$DEVICE" --only "$ONLY" --budget-s 40 \
        --results "$OUT/profile.jsonl"
}

# A test's name says its backend. Other tests may have the word in theirs, so whether it runs at all is asked first.
# A test that hangs in a kernel ends its process after a minute, and a few such processes end the step.
step_tests() {
    local workers=() tests=TESTS_$1
    "$python" -c '
import sys
from asyncopd import backends
sys.exit(backends.unavailable_reason(sys.argv[1]))' "$1" || return
    if "$python" -c 'import xdist' 2>/dev/null; then
        workers=(-n "$WORKERS" --dist worksteal --max-worker-restart 4)
    fi
    # shellcheck disable=SC2086 # the files are a list
    set -- -q -k "$1" ${!tests:-tests/ops tests/losses} --maxfail 60 --timeout 60 --timeout-method thread \
        --failed-first -o cache_dir="$(realpath "$OUT")/pytest-$1" "${workers[@]}"
    echo "pytest $*"
    "$python" -m pytest "$@"
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
        build | smoke | host | probe | profile | sanitize) "step_$2" ;;
        bench) step_bench --no-peers --budget-s 75 --case-budget-s 1.5 ;;
        peers) step_bench --peers --budget-s 120 --case-budget-s 1.5 ;;
        *) step_tests "$2" ;;
    esac
    exit
fi

# ----------------------------------------------------------------------------------------- clocks, and Triton's cache

start_clocks() {
    if ! command -v nvidia-smi > /dev/null; then echo "nvidia-smi is not installed: no clocks"; return; fi
    # stdbuf: a line is written when it is known, and read when a part has been measured.
    stdbuf -oL nvidia-smi -lms 200 --format=csv \
        --query-gpu=timestamp,clocks.sm,power.draw,temperature.gpu >> "$CLOCKS" 2>&1 &
    clocks=$!
    trap 'kill "$clocks" 2> /dev/null' EXIT
}

# Triton finds the parts of a kernel by absolute paths, which it has written into files named __grp__*: in another
# folder they have to be rewritten, or everything would be compiled again.
unpack_cache() {
    TRITON_CACHE_DIR=$(realpath "$OUT")/triton-cache
    export TRITON_CACHE_DIR
    if [ -d "$TRITON_CACHE_DIR" ] || [ ! -f "$CACHE" ]; then return; fi
    mkdir -p "$TRITON_CACHE_DIR"
    tar -xzf "$CACHE" -C "$TRITON_CACHE_DIR" || return
    find "$TRITON_CACHE_DIR" -name '__grp__*' -exec sed -i "s|TRITON_CACHE_DIR|$TRITON_CACHE_DIR|g" {} +
    echo "Triton's cache: $(find "$TRITON_CACHE_DIR" -name '__grp__*' | wc -l) kernels from $CACHE"
}

pack_cache() {
    if [ ! -d "$TRITON_CACHE_DIR" ]; then return; fi
    find "$TRITON_CACHE_DIR" -name '__grp__*' -exec sed -i "s|$TRITON_CACHE_DIR|TRITON_CACHE_DIR|g" {} +
    # One file, not thousands: it may have to travel. Unpacked again by the next run in this $OUT.
    tar -czf "$OUT/triton-cache.tar.gz" -C "$TRITON_CACHE_DIR" . && rm -rf "$TRITON_CACHE_DIR"
}

# -------------------------------------------------------------------------------------------------- one after another

# The most that a step may take; together they take less, and LIMIT_S at most.
limit_of() {
    case $1 in
        build | bench) echo 90 ;;
        smoke | cuda) echo 60 ;;
        host | profile) echo 35 ;;
        probe) echo 75 ;;
        triton) echo 240 ;;
        sanitize) echo 75 ;;
        *) echo 130 ;;
    esac
}

all="build smoke $measurements $BACKENDS peers sanitize"
# shellcheck disable=SC2206 # BACKENDS and the measurements are lists
steps=(smoke $measurements $BACKENDS)
if [ "$PEERS" = 1 ]; then steps+=(peers); fi
if [ $# -gt 0 ]; then steps=("$@"); fi
for step in "${steps[@]}"; do
    case " $all " in
        *" $step "*) ;;
        *) echo "bench/gpu.sh: no step $step; there are: $all" >&2; exit 2 ;;
    esac
done
mkdir -p "$OUT" || exit 1
touch "$OUT/done"
unpack_cache
if [ "$DEVICE" = cuda ]; then start_clocks; fi

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
    if [ "$DEVICE" != cuda ]; then limit=$((3 * limit)); fi  # a rehearsal: two cores, say
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

# Nothing can follow a build that failed, nor an op that broke (status 3 of smoke): what it names is to be mended first.
# Wrong values are said, and the benchmark leaves them out by itself.
if run build; then
    for step in "${steps[@]}"; do
        if [ "$step" = build ]; then continue; fi
        run "$step"
        if [ $? -eq 3 ] && [ "$step" = smoke ]; then
            summary+=("an op broke, so nothing else was begun: $(grep -m 1 'BROKE' "$OUT/smoke.log")")
            break
        fi
    done
fi
pack_cache
if [ -f "$OUT/results.jsonl" ]; then "$python" -m bench.report "$OUT/results.jsonl"; fi
printf '== %s\n' "${summary[@]}"
exit "$failed"
