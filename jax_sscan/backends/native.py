"""The compiled extension: whether it is there, and which native implementations it holds."""

import functools
import importlib
from types import ModuleType


@functools.cache
def _load() -> ModuleType | str:
    """The extension module, or the reason why it cannot be had."""
    try:
        return importlib.import_module("jax_sscan._native")
    except ModuleNotFoundError:
        return (
            "jax_sscan was installed without its compiled extension; install a C++17 compiler and reinstall jax_sscan"
        )
    except ImportError as error:
        return f"the compiled extension does not load ({error}); reinstall jax_sscan"


def missing(implementation: str) -> str | None:
    """Why the native ``implementation`` ("cpu" or "cuda") cannot run here, or None if it can."""
    extension = _load()
    if isinstance(extension, str):
        return extension
    info = extension.build_info()
    if not info.get(implementation, False):
        return (
            f"this build of jax_sscan {info['version']} holds no native {implementation} kernel; "
            'use implementation="xla" or a build that has it'
        )
    return None
