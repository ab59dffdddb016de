"""The package as a package: what importing it does, what it ships, and which way its imports
point."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_sscan

PACKAGE = Path(str(jax_sscan.__file__)).parent


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints; it sees the same package as this one."""
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light() -> None:
    """No Flax (an optional dependency), and no backend: XLA flags and jax.distributed still work
    after the import."""
    printed = run_python(
        "import sys, jax_sscan\n"
        "from jax._src import xla_bridge\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('flax', 'torch', 'optax')],"
        " xla_bridge.backends_are_initialized())"
    )
    assert printed == "[] False"


def test_x64_mode_after_import() -> None:
    """Nothing is decided at import: x64 mode may still be switched on."""
    printed = run_python(
        "import jax_sscan, jax, jax.numpy as jnp\n"
        "jax.config.update('jax_enable_x64', True)\n"
        "x = jnp.ones((1, 2, 3)); A = -jnp.ones((2, 1)); B = jnp.ones((1, 1, 3))\n"
        "print(jax_sscan.selective_scan(x, x, A, B, B, implementation='xla').dtype)"
    )
    assert printed == "float64"


def test_implementations() -> None:
    """Three names, each either available or with a reason that helps."""
    found = jax_sscan.implementations()
    assert set(found) == {"xla", "cpu", "cuda"}
    for name, info in found.items():
        assert isinstance(info.available, bool), name
        assert all(isinstance(p, str) for p in (*info.platforms, *info.default_for)), name
        assert isinstance(info.platforms, tuple) and isinstance(info.default_for, tuple)
        assert set(info.default_for) <= set(info.platforms), name
        if info.available:
            assert info.reason is None, name
            assert info.platforms, name
        else:
            assert info.reason and len(info.reason) > 20, name
            assert not info.default_for, name
    assert found["xla"].available
    assert "cpu" in found["xla"].platforms


def test_every_platform_has_one_default() -> None:
    assert len(conftest.default_here()) == 1
    defaults: dict[str, list[str]] = {}
    for name, info in jax_sscan.implementations().items():
        for platform in info.default_for:
            defaults.setdefault(platform, []).append(name)
    assert "cpu" in defaults
    for platform, names in defaults.items():
        assert len(names) == 1, f"{platform}: {names}"


def test_every_promised_implementation_is_available() -> None:
    """On machines where kernels are promised (conftest.REQUIRED) none may be missing."""
    found = jax_sscan.implementations()
    missing = {n: found[n].reason for n in conftest.REQUIRED if not found[n].available}
    assert not missing
    assert set(found) >= conftest.REQUIRED


@pytest.mark.gpu
def test_gpu_runs_the_cuda_kernels_by_default() -> None:
    assert "cuda" in jax_sscan.implementations()["cuda"].default_for
    u = jnp.ones((1, 2, 8))
    A, B = -jnp.ones((2, 3)), jnp.ones((1, 3, 8))
    compiled = jax.jit(jax_sscan.selective_scan).lower(u, u, A, B, B).compile()
    assert "custom-call" in str(compiled.as_text())


def test_a_fallback_is_never_silent() -> None:
    """A GPU without the kernels warns, once. That JAX's default backend be a GPU is pretended here,
    so that the warning is tested on machines that have none."""
    if jax_sscan.implementations()["cuda"].available:
        pytest.skip("the kernels are here; nothing falls back")
    printed = run_python(
        "import warnings, jax, jax.numpy as jnp, jax_sscan\n"
        "u = jnp.ones((1, 2, 8)); A = -jnp.ones((2, 3)); B = jnp.ones((1, 3, 8))\n"
        "jax.default_backend = lambda: 'gpu'\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    jax_sscan.selective_scan(u, u, A, B, B, implementation='xla')\n"
        "    print([str(w.message) for w in caught])\n"
        "    for n in (1, 2):\n"
        "        jax.jit(lambda u: n * jax_sscan.selective_scan(u, u, A, B, B))(u)\n"
        "print([str(w.message) for w in caught])"
    )
    named, automatic = (ast.literal_eval(line) for line in printed.splitlines())
    assert named == []
    assert len(automatic) == 1, automatic
    assert "jax_sscan" in automatic[0] and "GPU" in automatic[0]
    assert str(jax_sscan.implementations()["cuda"].reason) in automatic[0]


def test_a_cpu_needs_no_warning() -> None:
    """On a CPU without the native kernel the pure-JAX scan is a fair default."""
    printed = run_python(
        "import warnings; warnings.simplefilter('error')\n"
        "import jax.numpy as jnp, jax_sscan\n"
        "u = jnp.ones((1, 2, 8)); A = -jnp.ones((2, 3)); B = jnp.ones((1, 3, 8))\n"
        "print(jax_sscan.selective_scan(u, u, A, B, B).shape)",
        JAX_PLATFORMS="cpu",
    )
    assert printed == "(1, 2, 8)"


def test_types_are_shipped() -> None:
    """PEP 561: without the marker, type checkers ignore every annotation in the package."""
    assert (PACKAGE / "py.typed").is_file()


def test_public_names() -> None:
    """What design.md promises is there, and every public name says what it is for."""
    promised = {
        "selective_scan", "selective_state_update", "causal_conv1d", "causal_conv1d_update",
        "selective_scan_fn", "selective_scan_forward", "selective_scan_backward",
        "implementations", "RESIDUAL_NAMES",
    }  # fmt: skip
    assert promised <= set(jax_sscan.__all__)
    assert len(set(jax_sscan.__all__)) == len(jax_sscan.__all__)
    for name in jax_sscan.__all__:
        value: Any = getattr(jax_sscan, name)
        if callable(value):
            assert value.__doc__ and len(value.__doc__) > 20, f"{name} has no docstring"
            assert not value.__doc__.startswith(f"{name}("), f"{name} has a generated docstring"
    assert jax_sscan.RESIDUAL_NAMES and all(isinstance(n, str) for n in jax_sscan.RESIDUAL_NAMES)


def test_no_module_bears_the_name_of_a_public_function() -> None:
    """`jax_sscan.selective_scan` must never be a module, whatever was imported before."""
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not modules & set(jax_sscan.__all__)


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything that a file of the package imports from the package."""
    package = ("jax_sscan", *path.relative_to(PACKAGE).parent.parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            parts = (*base, *([node.module] if node.module else []))
            module = ".".join(parts)
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "jax_sscan"}


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def dependencies() -> dict[str, set[str]]:
    """module -> the modules of the package that it imports (only names that are files)."""
    graph: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ("jax_sscan", *path.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        graph[name] = {m for m in imported_modules(path) if is_module(m)} - {name}
    return graph


def test_backends_import_nothing_above_them() -> None:
    """models -> modules -> ops -> backends; nothing points back."""
    graph = dependencies()
    backends = {name for name in graph if name.startswith("jax_sscan.backends")}
    assert backends, "jax_sscan/backends is gone"
    operations = {f"jax_sscan.{name}" for name in ("scan", "conv", "decode", "compat")}
    assert operations <= set(graph)
    # What backends share with the operations (checks, the canonical form) lies below both.
    reached, pending = set(), set(backends)
    while pending:
        name = pending.pop()
        reached.add(name)
        pending |= {m for m in graph[name] if m != "jax_sscan"} - reached
    assert not reached & operations
    for name in reached - backends:
        assert not graph[name] & backends, f"{name}, which backends import, imports them"


def test_models_stand_on_modules_and_modules_on_operations() -> None:
    """And never the other way round."""
    floors = {"jax_sscan.models": 3, "jax_sscan.nnx": 2, "jax_sscan.linen": 2, "jax_sscan.modules": 1}

    def floor(name: str) -> int:
        return next((n for prefix, n in floors.items() if name == prefix or name.startswith(prefix + ".")), 0)

    graph = dependencies()
    assert {floor(name) for name in graph} == {0, 1, 2, 3}
    for name, uses in graph.items():
        for used in uses:
            assert floor(used) <= floor(name), f"{name} imports {used}"
            assert not (floor(name) == floor(used) == 2), f"{name} imports {used}: the two flavours share modules only"


def test_no_import_cycles() -> None:
    """Also none hidden in a function: ast.walk sees those too."""
    graph = {
        name: {m for m in uses if m != "jax_sscan"} for name, uses in dependencies().items() if name != "jax_sscan"
    }
    # A submodule's import runs its package's __init__, and a package may import its submodules.
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for used in sorted(graph.get(name, ())):
                if not used.startswith(name + ".") and not name.startswith(used + "."):
                    visit(used, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_modules_and_models_know_flax() -> None:
    """The operations must work where Flax is not installed, and the modules' mathematics needs none."""
    folders = [PACKAGE / "backends", PACKAGE / "modules"]
    for path in [*PACKAGE.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            flax = [n for n in names if n.split(".")[0] == "flax"]
            assert not flax or path.stem in ("nnx", "linen"), f"{path}: {flax}"


def test_numpy_arrays_are_arrays() -> None:
    """Inputs may be NumPy's: they are converted as every jnp function converts them."""
    u = np.ones((1, 2, 3), np.float32)
    A, B = -np.ones((2, 1), np.float32), np.ones((1, 1, 3), np.float32)
    assert isinstance(jax_sscan.selective_scan(u, u, A, B, B), jax.Array)
