from typing import Any, TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    build_type: str
    ffi_api: tuple[int, int]
    cpu: bool
    cuda: bool
    cpu_target: str

def build_info() -> BuildInfo: ...
def handlers() -> dict[str, dict[str, Any]]: ...
def cpu_workspace_bytes(
    batch: int,
    dim: int,
    length: int,
    dstate: int,
    groups: int,
    chunk: int,
    instances: int,
    channel_last: bool,
    has_states: bool,
    B_varies: bool,
    C_varies: bool,
    is_complex: bool,
    is_double: bool,
) -> int: ...
