from typing import Any, TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    build_type: str
    ffi_api: tuple[int, int]
    target: str

def build_info() -> BuildInfo: ...
def handlers() -> dict[str, Any]: ...
def workspace_bytes(
    batch: int,
    dim: int,
    length: int,
    dstate: int,
    groups: int,
    chunk: int,
    instances: int,
    channel_last: bool,
    B_varies: bool,
    C_varies: bool,
    has_segments: bool,
    is_complex: bool,
    is_double: bool,
    has_states: bool,
) -> tuple[int, int]: ...
