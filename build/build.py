#!/usr/bin/env python3
"""One entry for set-up, demo, tests, lint, benchmarks and wheels; needs nothing but Python 3.11.

Each command first makes or brings up to date a virtual environment in the repository root, which
takes a few minutes the first time and no time after that. Arguments that a command does not know go
on to the program that it runs; put `--` before those that it would take for its own:

    python3 build/build.py test -k conv -x
    python3 build/build.py test --jax floor -- --help
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 (nothing has checked requires-python yet)
    sys.exit(f"build.py needs Python 3.11 or newer; this is {sys.version.split()[0]} ({sys.executable})")

import tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
BUILD_REQUIRES = PYPROJECT["build-system"]["requires"]
FLOOR = next(r.split("==")[1] for r in BUILD_REQUIRES if r.startswith("jaxlib=="))


def run(
    *command: str | Path | int, check: bool = True, cwd: Path | None = ROOT, env: dict[str, str] | None = None
) -> int:
    """Print and run a command; if it fails, leave with its exit code (its output says why)."""
    words = [str(part) for part in command]
    env = env or {}
    print("+", *[f"{k}={shlex.quote(v)}" for k, v in env.items()], shlex.join(words), flush=True)
    try:
        code = subprocess.run(words, cwd=cwd, env=os.environ | env).returncode
    except OSError as error:
        sys.exit(f"build.py: cannot run {words[0]}: {error}")
    if code and check:
        sys.exit(code if code > 0 else 128 - code)  # negative: killed by that signal
    return code


def ask(python: str | Path, code: str) -> str:
    """What `code` prints when `python` runs it."""
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"build.py: cannot run {python}: {error}")
    if done.returncode:
        sys.exit(f"build.py: {python} does not work:\n{done.stderr.strip()}")
    return done.stdout.strip()


def cuda_extra():
    """The extra with the CUDA jax that this machine's driver can run, or None without a GPU."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        return "cuda13" if int(driver.split(".")[0]) >= 580 else "cuda12"
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


class Environment:
    """A Python with this package and the wanted extras, and a note in it of what was installed."""

    def __init__(self, args):
        self.system = args.system
        self.jax = FLOOR if args.jax == "floor" else args.jax
        base: str = args.python or sys.executable
        if self.system:
            if self.jax:
                sys.exit("build.py: --system uses the jax that is there; leave out --jax")
            self.python = Path(shutil.which(base) or base)
            self.prefix = Path(ask(base, "import sys, jax; print(sys.prefix)"))
        else:
            name = ".venv"
            if args.python:
                name += ask(base, "import sys; print('-%d.%d' % sys.version_info[:2])")
            if self.jax:
                name += f"-jax{self.jax}"
            self.prefix = ROOT / name
            self.python = self.prefix / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
            make = [base, "-m", "venv", "--clear", self.prefix]
            if not self.python.exists() and (code := run(*make, check=False)):
                shutil.rmtree(self.prefix, ignore_errors=True)  # half a venv looks like a whole one
                sys.exit(code)
        self.note = self.prefix / "jax-sscan-build.json"
        self.installed = json.loads(self.note.read_text()) if self.note.exists() else {}

    def pip(self, *args):
        run(self.python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *args)

    def tool(self, name):
        return self.python.with_name(name)

    def remember(self, **installed):
        self.installed |= installed
        self.note.write_text(json.dumps(self.installed, indent=1))

    def requirements(self, extra):
        if extra != "dependencies":
            return EXTRAS[extra]
        if self.system:  # never touch its jax; pip builds in place, so bring the build tools
            mine = [*PYPROJECT["project"]["dependencies"], *BUILD_REQUIRES]
            return [r for r in mine if not r.startswith("jax")]
        return PYPROJECT["project"]["dependencies"] + ([f"jax=={self.jax}"] if self.jax else [])

    def need(self, *extras, package=True):
        """Install the extras, and the package itself (editable) if asked for, unless up to date."""
        if package:
            extras = ("dependencies", *extras)
            if not self.system and (cuda := cuda_extra()):
                extras += (cuda,)
        have = self.installed.get("extras", {})
        if any(have.get(extra) != self.requirements(extra) for extra in extras):
            # Together with the extras of earlier calls, so that pip finds versions that suit all.
            names = {*have, *extras} & {*EXTRAS, "dependencies"}
            wanted = {extra: self.requirements(extra) for extra in names}
            self.pip(*sorted({r for group in wanted.values() for r in group}))
            self.remember(extras=wanted)
        if package and self.installed.get("package") != (fingerprint := self.fingerprint()):
            # Build isolation compiles against the headers of the oldest jaxlib, whichever runs here.
            in_place = ["--no-build-isolation"] if self.system else []
            self.pip("--no-deps", *in_place, "--editable", ROOT)
            self.remember(package=fingerprint)
            site = ask(self.python, "import sysconfig; print(sysconfig.get_path('platlib'))")
            if not any(Path(site, "jax_sscan").glob("_cpu*")):
                # pip hides CMake's own warning.
                text = "warning: no C++ compiler found: jax_sscan has no native kernels, only 'xla'."
                print(f"build.py: {text}\nInstall one and remove {self.note} to build them.")
        return self

    def fingerprint(self):
        """Of all that goes into the installed package; Python code is used from where it lies."""
        digest = hashlib.sha256(str(ROOT).encode())
        parts = [PYPROJECT["build-system"], PYPROJECT["project"], PYPROJECT["tool"]["scikit-build"]]
        settings = ["CXX", "CXXFLAGS", "CMAKE_ARGS", "SKBUILD_CMAKE_DEFINE"]
        digest.update(json.dumps([parts, [os.environ.get(name) for name in settings]]).encode())
        for path in [ROOT / "CMakeLists.txt", *sorted((ROOT / "csrc").rglob("*.*"))]:
            digest.update(str(path).encode() + path.read_bytes())
        return digest.hexdigest()


def demo(args, rest):
    env = Environment(args).need("demo", "models")
    run(env.python, ROOT / "examples/demo.py", *rest, cwd=None)


def test(args, rest):
    env = Environment(args).need("test", "models")
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # fewer in a container, say; not on macOS
        cores = len(os.sched_getaffinity(0))
    # Most of the time goes into XLA compiling small programs: share them between workers and runs.
    # (JAX locks the cache only if it has a maximal size. Another version of JAX would trip over its entries.)
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / "build/jax-cache" / env.prefix.name),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if cuda_extra():  # the workers share the GPU, and each would otherwise take most of its memory
        cores = min(cores, 4)
        settings["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    settings = {name: value for name, value in settings.items() if name not in os.environ}
    run(env.python, "-m", "pytest", "-n", cores, *rest, env=settings)


def lint(args, rest):
    # What the code imports must be there for pyright to see its types; the package need not be built.
    groups = ["dependencies", "test", "models", "demo", "bench", "lint"]
    env = Environment(args).need(*groups, package=False)
    native = [path for folder in ("csrc", "tests/native", "benchmarks") for path in (ROOT / folder).rglob("*")]
    sources = sorted(path for path in native if path.suffix in {".cc", ".h", ".cu", ".cuh"})
    fix, check = (["--fix"], []) if args.fix else ([], ["--check"])
    commands = [
        [env.tool("ruff"), "check", *fix, *rest],
        [env.tool("ruff"), "format", *check],
        [env.tool("clang-format"), *(["-i"] if args.fix else ["--dry-run", "-Werror"]), *sources],
        [env.tool("pyright"), "--pythonpath", env.python],
    ]
    failed = {command[0].name: True for command in commands if run(*command, check=False)}
    if failed:
        sys.exit(f"build.py: lint failed: {', '.join(failed)}" + ("" if args.fix else " (try --fix)"))


def bench(args, rest):
    env = Environment(args).need("bench", "models")
    script = next((name for name in ("gpu", "scaling", "model", "parallel") if getattr(args, name)), "bench")
    run(env.python, ROOT / "benchmarks" / f"{script}.py", *rest, cwd=None)


def sanitize(args, rest):
    env = Environment(args).need("test", "models", "sanitize")

    # Threads: a program of its own, since XLA's threads are not instrumented.
    tree = ROOT / "build/sanitize-thread"
    cmake = [f"-DPython_EXECUTABLE={env.python}", "-DSKBUILD_PROJECT_VERSION=0", "-DJAX_SSCAN_SANITIZE=thread"]
    ninja = f"-DCMAKE_MAKE_PROGRAM={env.tool('ninja')}"
    run(env.tool("cmake"), "-S", ROOT, "-B", tree, "-G", "Ninja", ninja, *cmake)
    run(env.tool("cmake"), "--build", tree, "--target", "race_test")
    run(tree / "race_test")

    # Addresses and undefined behaviour: the tests of the CPU kernel, with an instrumented extension in an environment
    # that borrows everything else. Python knows nothing of sanitizers, so their runtime is loaded ahead of it.
    prefix = ROOT / "build/sanitize-address"
    python = prefix / "venv/bin/python"
    site_code = "import sysconfig; print(sysconfig.get_path('platlib'))"
    if not python.exists():
        run(env.python, "-m", "venv", "--without-pip", prefix / "venv")
    Path(ask(python, site_code), "borrowed.pth").write_text(ask(env.python, site_code) + "\n")
    define = "-Ccmake.define.JAX_SSCAN_SANITIZE=address,undefined"
    tree = f"-Cbuild-dir={prefix}/tree"
    pip = [env.python, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--no-deps", "--force-reinstall", define, tree, ROOT)
    compiler = os.environ.get("CXX", "c++")
    # libstdc++ as well: the sanitizer looks up __cxa_throw when it starts, before anything else would load it.
    runtimes = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    settings = {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and XLA keep what they have until the end
        "JAX_PLATFORMS": "cpu",
        "PYTHONSAFEPATH": "1",  # the installed package, not the one in the working directory
    }
    tests = ["tests/test_scan.py", "tests/test_transformations.py", "-k", "cpu"]
    run(python, "-m", "pytest", "-q", *(rest or tests), env=settings)


def wheel(args, rest):
    # The wheel is built from the sdist: proof that the sdist is complete.
    env = Environment(args).need("wheel", package=False)
    run(env.python, "-m", "build", "--outdir", ROOT / "dist", *rest, ROOT)


COMMANDS = {
    demo: "run examples/demo.py (its options: --steps N, --seed N, --out DIR)",
    test: "run the tests with pytest, on all cores",
    lint: "check with ruff, pyright and clang-format; --fix repairs what can be repaired",
    bench: "run benchmarks/bench.py, or gpu.py, scaling.py, model.py, parallel.py with --gpu, --scaling, ...",
    sanitize: "run the CPU kernels under the thread, address and undefined behaviour sanitizers",
    wheel: "build the sdist and the wheel into dist/",
}


def main():
    raw = argparse.RawDescriptionHelpFormatter
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--python", metavar="EXE", help="use this Python, in a venv of its own (.venv-3.12, ...)")
    common.add_argument(
        "--jax",
        metavar="VERSION",
        help=f"use this jax, in a venv of its own; 'floor' is the oldest supported, {FLOOR}",
    )
    common.add_argument(
        "--system",
        action="store_true",
        help="use the Python itself and its jax, no venv (for machines without network)",
    )
    parser = argparse.ArgumentParser(prog="build.py", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for function, text in COMMANDS.items():
        sub = commands.add_parser(function.__name__, help=text, description=text, parents=[common], allow_abbrev=False)
        sub.set_defaults(function=function)
        if function is lint:
            sub.add_argument("--fix", action="store_true", help="repair what can be repaired")
        if function is bench:
            kind = sub.add_mutually_exclusive_group()
            kind.add_argument("--gpu", action="store_true", help="the CUDA kernels, by themselves and inside jit")
            kind.add_argument("--scaling", action="store_true", help="time against dstate, length and threads")
            kind.add_argument(
                "--model", action="store_true", help="a Mamba block and a language model, training and decoding"
            )
            kind.add_argument("--parallel", action="store_true", help="a training step against the number of devices")
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    args, rest = parser.parse_known_args(argv[:cut])
    args.function(args, rest + argv[cut + 1 :])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
