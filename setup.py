"""Builds csrc/ as `asyncopd._C` with ninja; all other metadata is in pyproject.toml.

The sources are free of torch, so building needs a C++ compiler, pybind11 and ninja, and takes seconds; the result
works with any torch. nvcc, where there is one, adds the CUDA kernels. Environment variables:

    ASYNCOPD_BUILD_CUDA   0: never build CUDA kernels; 1: fail if there is no nvcc; unset: build them if there is one
    ASYNCOPD_SANITIZE     1: address and undefined-behaviour sanitizers (`make sanitize`), without CUDA kernels
    CXX, CXXFLAGS         the C++ compiler and flags added to ours
    CUDA_HOME             where bin/nvcc is looked for, after PATH
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ninja
import pybind11
from ninja.ninja_syntax import Writer
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    # No kernel reads floating-point exception flags, and without this GCC vectorises no loop with a condition in it.
    # -ffast-math is out of the question: kernels promise what happens to NaN and inf.
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
]

# Instrumented code that stops at the first error; on top of the flags above, since what they vectorise is the kernels.
SANITIZE = os.environ.get("ASYNCOPD_SANITIZE") == "1"
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]

# Real code for A100 and H100, Blackwell where nvcc knows it; PTX of the newest for whatever comes later.
CUDA_ARCHS = [80, 90, 100]


def say(message: str) -> None:
    print(f"asyncopd: {message}", file=sys.stderr, flush=True)


def compiles(command: Sequence[str], source: str, suffix: str = ".cpp") -> bool:
    """Whether a one-file program compiles and links."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"probe{suffix}")
        path.write_text(source)
        output = Path(folder, "probe")
        return subprocess.run([*command, path, "-o", output], capture_output=True).returncode == 0


def openmp_flags(cxx: Sequence[str]) -> list[str]:
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    # Apple's clang takes the pragma only through its preprocessor, and the runtime (libomp) comes separately.
    for flags in (["-fopenmp"], ["-Xpreprocessor", "-fopenmp", "-lomp"]):
        if compiles([*cxx, *flags], program):
            return flags
    say(f"{' '.join(cxx)} has no OpenMP; CPU kernels will use one thread")
    return []


def find_nvcc(cxx: Sequence[str]) -> str | None:
    """Path of an nvcc that works, or None (after saying so) where CUDA kernels are not to be built."""
    wanted = "0" if SANITIZE else os.environ.get("ASYNCOPD_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"ASYNCOPD_BUILD_CUDA: got {wanted!r}, expected 0, 1 or nothing")
    if wanted == "0":
        say("CUDA kernels are not built (ASYNCOPD_BUILD_CUDA=0)")
        return None
    nvcc = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    if nvcc is None and os.access(Path(home, "bin", "nvcc"), os.X_OK):
        nvcc = str(Path(home, "bin", "nvcc"))
    if nvcc is None:
        if wanted == "1":
            raise SystemExit("ASYNCOPD_BUILD_CUDA=1, but no nvcc on PATH or in CUDA_HOME/bin")
        say("no nvcc found; CUDA kernels are not built")
    elif wanted == "" and not compiles([nvcc, "-ccbin", cxx[0]], "int main() {}\n", ".cu"):
        # Usually a host compiler newer than this nvcc accepts; that must not cost anybody the CPU build.
        say(f"{nvcc} does not work with {cxx[0]}; CUDA kernels are not built")
        return None
    return nvcc


def cuda_arch_flags(nvcc: str) -> list[str]:
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    archs = [arch for arch in CUDA_ARCHS if f"sm_{arch}" in known.stdout.split()]
    if not archs:
        raise SystemExit(f"{nvcc} knows none of {', '.join(f'sm_{arch}' for arch in CUDA_ARCHS)}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


class NinjaBuild(build_ext):
    """Writes a build.ninja for the sources of csrc/ and runs it: parallel, and incremental through header files."""

    def build_extension(self, ext: Extension) -> None:
        if sys.platform == "win32":
            raise SystemExit("asyncopd builds on Linux and macOS; on Windows, use WSL")
        # One folder per interpreter, kept between builds whatever temporary folders pip uses.
        variant = "-sanitize" if SANITIZE else ""
        folder = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}-{sysconfig.get_platform()}{variant}"
        folder.mkdir(parents=True, exist_ok=True)
        module = self.write_build_file(folder)
        command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder)]
        if subprocess.run(command).returncode != 0:
            raise SystemExit("asyncopd: the build of csrc/ failed; ninja's output is above")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(module), str(target))

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in CSRC.rglob("*") if path.is_file()]

    def write_build_file(self, folder: Path) -> Path:
        cxx = os.environ.get("CXX", shutil.which("c++") or shutil.which("g++") or "clang++").split()
        includes = [f"-I{path}" for path in (CSRC, pybind11.get_include(), sysconfig.get_path("include"))]
        threads = openmp_flags(cxx)
        sanitize = SANITIZE_FLAGS if SANITIZE else []
        cxx_flags = [*CXX_FLAGS, *threads, *sanitize]
        nvcc = find_nvcc(cxx)
        if nvcc:
            cxx_flags.append("-DASYNCOPD_WITH_CUDA")

        with Path(folder, "build.ninja").open("w") as file:
            out = Writer(file, width=120)
            out.variable("builddir", ".")
            out.variable("cxx", cxx)
            out.variable("cxxflags", [*cxx_flags, *includes, *os.environ.get("CXXFLAGS", "").split()])
            out.rule(
                "cxx",
                command="$cxx -MMD -MF $out.d $cxxflags -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="C++  $in",
            )
            objects = self.write_objects(out, "cxx", ".cpp")
            if nvcc:
                out.variable("nvcc", nvcc)
                host = ["-Xcompiler=-fPIC,-fvisibility=hidden", "-ccbin", cxx[0]]
                out.variable("nvccflags", ["-std=c++17", "-O3", *host, *cuda_arch_flags(nvcc), f"-I{CSRC}"])
                out.rule(
                    "nvcc",
                    command="$nvcc -MMD -MF $out.d $nvccflags -c $in -o $out",
                    depfile="$out.d",
                    deps="gcc",
                    description="CUDA $in",
                )
                objects += self.write_objects(out, "nvcc", ".cu")
                # nvcc knows where its runtime is. Linked statically (and kept private), it lets the module import on
                # a machine without CUDA and beside torch's own runtime.
                link = "$nvcc -shared -cudart=static -Xlinker=--exclude-libs,ALL $in -o $out $ldflags"
                ldflags = ["-ccbin", cxx[0], *(f"-Xcompiler={flag}" for flag in threads)]
            else:
                link = "$cxx -shared $in -o $out $ldflags"
                ldflags = [*threads, *sanitize, *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]
            out.variable("ldflags", ldflags)
            out.rule("link", command=link, description="link $out")
            module = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
            out.build(module, "link", objects)
            out.default(module)
        return folder / module

    def write_objects(self, out: Writer, rule: str, suffix: str) -> list[str]:
        objects = []
        for source in sorted(CSRC.rglob(f"*{suffix}")):
            name = str(source.relative_to(CSRC)) + ".o"
            out.build(name, rule, str(source))
            objects.append(name)
        return objects


setup(
    # kernels/ lies beside asyncopd/ for readers and is installed inside it: the top-level name belongs to others.
    package_dir={"asyncopd": "asyncopd", "asyncopd.kernels": "kernels"},
    packages=[
        *find_packages(include=["asyncopd", "asyncopd.*"]),
        "asyncopd.kernels",
        *(f"asyncopd.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_data={"asyncopd": ["py.typed", "*.pyi", "**/*.yaml", "task/assets/**"]},
    include_package_data=False,
    ext_modules=[Extension("asyncopd._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
