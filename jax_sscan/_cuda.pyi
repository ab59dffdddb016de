# The two modules offer the same.
from jax_sscan._cpu import BuildInfo as BuildInfo
from jax_sscan._cpu import build_info as build_info
from jax_sscan._cpu import handlers as handlers
from jax_sscan._cpu import workspace_bytes as workspace_bytes
