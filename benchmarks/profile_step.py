"""Where the time of one compiled program goes, from JAX's profiler."""

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

SCAN = "selective scan"
# By the name of the operation or kernel; the first that fits.
KINDS = {
    "transposes and copies": r"transpose|copy|memcpy",
    "matrix products": r"dot|gemm|nvjet|cublas|cutlass|ynn|xnn",
    "loops and calls": r"^(while|call|conditional)",
}


def scan_instructions(hlo: str) -> set[str]:
    """The names of the scan's custom calls in compiled HLO."""
    return set(re.findall(r"%?([\w.-]+) = [^\n]*custom-call\([^\n]*custom_call_target=\"jax_sscan_", hlo))


def large_transposes(hlo: str, elements: int) -> list[str]:
    """The instructions of compiled HLO that transpose at least so many elements."""
    found = []
    for line, shape in re.findall(r"^\s*(\S+ = \w+\[([\d,]+)\]\S* transpose\(.*)$", hlo, re.MULTILINE):
        size = 1
        for n in shape.split(","):
            size *= int(n)
        if size >= elements:
            found.append(line[:120])
    return found


def time_by_kind(call: Callable[[], Any], hlo: str) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """Runs once under the profiler.

    Returns:
        Milliseconds by kind of operation, summed over threads or streams, and of the twelve longest operations.
    """
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (file,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
        by_name: collections.Counter[str] = collections.Counter()
        scans = scan_instructions(hlo)
        names = set(re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = ", hlo, re.MULTILINE))
        planes = [plane for plane in profile.planes if plane.name.startswith("/device:")]
        on_device = bool(planes)
        for plane in planes or profile.planes:
            for line in plane.lines:
                if on_device and not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    operation = next((str(value) for key, value in event.stats if key == "hlo_op"), event.name)
                    if on_device or operation in names:
                        is_scan = operation in scans or "sscan" in event.name
                        by_name[SCAN + " " + operation if is_scan else f"{operation} {event.name}"] += event.duration_ns
    kinds: collections.Counter[str] = collections.Counter()
    for name, duration in by_name.items():
        kind = next(
            (kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "elementwise and rest"
        )
        kind = SCAN if name.startswith(SCAN) else kind
        if kind != "loops and calls":  # what is inside them has been counted
            kinds[kind] += duration
    longest = [(name, duration / 1e6) for name, duration in by_name.most_common(12)]
    return {kind: duration / 1e6 for kind, duration in kinds.most_common()}, longest
