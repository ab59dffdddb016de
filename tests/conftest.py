"""Marks, the `implementation` parametrisation, and hypothesis profiles.

`implementation` runs over what `jax_sscan.implementations()` says can run here, so native kernels
join every test the moment they are built. Where kernels are promised (``JAX_SSCAN_REQUIRE_GPU=1``
on a GPU machine, ``JAX_SSCAN_REQUIRE=cpu,cuda`` in general) a missing one is a failure, never a
quiet skip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hypothesis
import jax
import pytest

import jax_sscan

# Tests of many devices run on virtual ones; all others use the first of them.
jax.config.update("jax_num_cpu_devices", 8)

# Compiling takes seconds, and the `implementation` fixture, which holds no state that an example
# could change, is set up once for all examples.
CHECKS = [
    hypothesis.HealthCheck.too_slow,
    hypothesis.HealthCheck.function_scoped_fixture,
]
hypothesis.settings.register_profile("local", deadline=None, suppress_health_check=CHECKS)
hypothesis.settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=CHECKS,
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

REQUIRED = {name for name in os.environ.get("JAX_SSCAN_REQUIRE", "").split(",") if name}
GPU_REQUIRED = os.environ.get("JAX_SSCAN_REQUIRE_GPU") == "1"
if GPU_REQUIRED:
    REQUIRED.add("cuda")


def has_gpu() -> bool:
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False


def default_here() -> list[str]:
    """The implementations that call themselves the default of JAX's default platform."""
    platform = jax.default_backend()
    names = {platform} | ({"cuda"} if platform == "gpu" else set())
    found = jax_sscan.implementations().items()
    return [name for name, info in found if info.available and names & set(info.default_for)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU")
    config.addinivalue_line("markers", "slow: runs only under --slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip_slow = pytest.mark.skip(reason="slow; run with --slow")
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(skip_slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not has_gpu():
        if GPU_REQUIRED:
            pytest.fail("JAX_SSCAN_REQUIRE_GPU=1, but JAX sees no GPU here")
        pytest.skip("needs a GPU")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" in metafunc.fixturenames:
        names = {name for name, info in jax_sscan.implementations().items() if info.available}
        params = [
            pytest.param(name, marks=pytest.mark.gpu) if name == "cuda" else name for name in sorted(names | REQUIRED)
        ]
        metafunc.parametrize("implementation", params, indirect=True)
    elif "devices" in metafunc.fixturenames:
        metafunc.parametrize("devices", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """The name of an implementation, with a platform that it runs on as JAX's default."""
    name: str | None = request.param
    if name is None:
        yield None
        return
    info = jax_sscan.implementations().get(name)
    if info is None or not info.available:
        reason = "no implementation has that name" if info is None else info.reason
        pytest.fail(f"implementation {name!r} is required here but missing: {reason}")
    gpu_names = {"gpu", "cuda", "rocm"}
    platforms = set(info.platforms)
    if jax.default_backend() in (gpu_names if platforms & gpu_names else set()) | platforms:
        yield name
    else:
        with jax.default_device(jax.devices(info.platforms[0])[0]):
            yield name


@pytest.fixture
def devices(request: pytest.FixtureRequest) -> Iterator[str]:
    """The platform that a test's meshes are of: eight virtual CPUs and then the GPUs that are there.

    For a test of an implementation, what that runs on.
    """
    if "implementation" in request.fixturenames:
        platform = "gpu" if request.getfixturevalue("implementation") == "cuda" else "cpu"
    else:
        platform = request.param
    with jax.default_device(jax.devices(platform)[0]):
        yield platform


@pytest.fixture
def virtual_devices() -> Iterator[None]:
    """CPUs as the default where a GPU would be."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture(scope="session")
def cxx() -> str:
    """A C++ compiler."""
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CXX", ""), "c++", "g++", "clang++"])), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    return compiler


@pytest.fixture(scope="session")
def compile_native(tmp_path_factory: pytest.TempPathFactory, cxx: str) -> Callable[..., Path]:
    """Compiles programs of tests/native with the sources beside them, paths from the top of the project."""
    top = Path(__file__).parent.parent

    def compile_sources(*sources: str, flags: Sequence[str] = ()) -> Path:
        program = tmp_path_factory.mktemp("native") / "program"
        includes = f"-I{top / 'csrc'}", f"-I{jax.ffi.include_dir()}"
        command = [cxx, "-std=c++17", "-O2", *includes, *flags, *(top / x for x in sources), "-o", program]
        subprocess.run(command, check=True)
        return program

    return compile_sources
