from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    build_type: str
    ffi_api: tuple[int, int]
    cuda: bool

def build_info() -> BuildInfo: ...
