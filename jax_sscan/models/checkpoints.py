"""Checkpoints in the layouts that published Mamba models have.

Read are directories of Hugging Face transformers (config.json and safetensors, one file or several with an index) of
the types "mamba" and "falcon_mamba", and the original layout of state-spaces/mamba (config.json of another kind, and
safetensors or a torch file). Written is that of transformers.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jax_sscan import checks
from jax_sscan.models.config import MambaConfig, Remat
from jax_sscan.models.language_model import MambaLM
from jax_sscan.modules import mamba
from jax_sscan.modules.sharding import Shard

_INDEX = "model.safetensors.index.json"
_TORCH_FILE = "pytorch_model.bin"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_UNITS = {"KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}

# Our names of what a Hugging Face config.json says.
_CONFIG_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "intermediate_size": "d_inner",
    "time_step_rank": "dt_rank",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
    "time_step_scale": "dt_scale",
    "layer_norm_epsilon": "norm_eps",
    "use_bias": "use_bias",
    "use_conv_bias": "use_conv_bias",
    "residual_in_fp32": "residual_f32",
    "rescale_prenorm_residual": "rescale_residual",
    "tie_word_embeddings": "tie_embeddings",
    "mixer_rms_eps": "inner_norm_eps",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
# What transformers takes where a config.json is silent, as far as it differs from MambaConfig.
_CONFIG_DEFAULTS = {
    "vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 32,
    "rescale_prenorm_residual": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
# Our names of what ssm_cfg of the original layout says.
_SSM_NAMES = {
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
    **{name: name for name in ("d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_scale")},
    "dt_init_floor": "dt_init_floor",
}


_Path = tuple[Any, ...]  # of names and indices, in the model's state


class _Tensor(NamedTuple):
    """One tensor of a file, and the parameters that it holds.

    Attributes:
        parameters: the paths of the parameters in the model's state.
        read: from the tensor to the parameters.
        write: from the parameters to the tensor.
    """

    parameters: tuple[_Path, ...]
    read: Callable[[Any], tuple[Any, ...]] = lambda tensor: (tensor,)
    write: Callable[..., Any] = lambda parameter: parameter


def load_pretrained(
    directory: str | Path,
    *,
    dtype: Any = None,
    param_dtype: Any = None,
    scan_layers: bool = False,
    remat: Remat = None,
    implementation: str | None = None,
    shard: Shard | None = None,
) -> MambaLM:
    """Reads a model from a checkpoint directory.

    Args:
        directory: a directory with config.json and the weights, in one of the layouts of this module.
        dtype: dtype of the computation; that of the parameters if None.
        param_dtype: dtype of the parameters; that of the file's embedding if None. A_log, D and the step sizes' bias
            are float32 at least.
        scan_layers: as in `MambaConfig`.
        remat: as in `MambaConfig`.
        implementation: as in `MambaConfig`.
        shard: as in `MambaConfig`. Each device of the mesh in context gets its part of the parameters, and none all.

    Returns:
        The model.

    Raises:
        FileNotFoundError: the directory holds no config.json or no weights.
        ValueError: the model is of a kind that this package does not have, or tensors are missing, unexpected or of a
            wrong shape; the message lists their names and shapes.
    """
    directory = Path(directory)
    settings = _read_config(directory)
    tensors = _read_tensors(directory)
    if param_dtype is None:
        param_dtype = tensors[_EMBEDDING].dtype if _EMBEDDING in tensors else jnp.float32
    if settings.pop("pads_vocabulary", False) and _EMBEDDING in tensors:
        settings["vocab_size"] = tensors[_EMBEDDING].shape[0]
    config = MambaConfig(
        **settings,
        dtype=dtype,
        param_dtype=param_dtype,
        scan_layers=scan_layers,
        remat=remat,
        implementation=implementation,
        shard=shard,
    )
    graph, abstract = nnx.split(nnx.eval_shape(lambda: MambaLM(config, rngs=nnx.Rngs(0))))
    wanted = _flatten(abstract, config)
    layout = _layout(config)
    if config.tie_embeddings and {_HEAD, _EMBEDDING} <= tensors.keys():
        head = tensors.pop(_HEAD)  # some files hold a tied head twice
        if not np.array_equal(head, tensors[_EMBEDDING]):
            raise ValueError(
                f"config.json in {directory} ties the head to the embedding, but {_HEAD} is another tensor than "
                f"{_EMBEDDING}; set tie_word_embeddings (tie_embeddings in the original layout) to false"
            )
    _check_tensors(directory, tensors, {name: spec.shape for name, spec in _expected(layout, wanted).items()})
    values = {}
    for name, tensor in layout.items():
        for path, value in zip(tensor.parameters, tensor.read(tensors.pop(name)), strict=True):
            values[path] = np.asarray(value, wanted[path].dtype)
    return nnx.merge(graph, _unflatten(abstract, values, config))


def save_pretrained(model: MambaLM, directory: str | Path, *, max_shard_size: int | str = "5GB") -> None:
    """Writes a model as a checkpoint directory that transformers loads: config.json and safetensors.

    What the directory holds of an earlier model under the same names is replaced. Whether initial parameters were
    rescaled (rescale_residual) is not written down: transformers would rescale these.

    Args:
        model: the model.
        directory: where to write; made if it is not there.
        max_shard_size: the most bytes of tensors in one file, a number or one with a unit as in "200MB" or "5GB"; a
            larger tensor has a file of its own. A model that fits is model.safetensors, another one
            model-00001-of-00002.safetensors and so on, with model.safetensors.index.json.

    Raises:
        ValueError: transformers has no model of this kind (one with weights in the norms of B, C and dt), or
            max_shard_size is not a size.
    """
    directory = Path(directory)
    config = model.config
    settings = _config_to_json(config)
    layout = _layout(config)
    values = _flatten(jax.device_get(nnx.state(model, nnx.Param)), config)
    sizes = {name: spec.size * spec.dtype.itemsize for name, spec in _expected(layout, values).items()}
    parts = _split(sizes, _to_bytes(max_shard_size))
    files = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    if len(parts) == 1:
        files = ["model.safetensors"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for file, names in zip(files, parts, strict=True):
        tensors = {name: layout[name].write(*[values[path] for path in layout[name].parameters]) for name in names}
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        # transformers asks which framework's tensors these are.
        safetensors.numpy.save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(parts) > 1:
        where = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
        files.append(_INDEX)
    # What is left from before would be read instead of what was written now.
    for path in directory.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in files:
            path.unlink()


# ---- Names and shapes

_EMBEDDING, _HEAD = "backbone.embeddings.weight", "lm_head.weight"


def _layout(config: MambaConfig) -> dict[str, _Tensor]:
    """What transformers calls each tensor, and where it belongs here."""
    layout = {_EMBEDDING: _Tensor((("embedding",),)), "backbone.norm_f.weight": _Tensor((("norm",),))}
    if not config.tie_embeddings:
        layout[_HEAD] = _Tensor((("head",),))
    d_inner = mamba.inner_size(config)

    def transposed(tensor: Any) -> tuple[Any, ...]:
        return (tensor.T,)

    for index in range(config.num_layers):
        layer = f"backbone.layers.{index}."

        def mixer(*names: str, index: int = index) -> tuple[_Path, ...]:
            return tuple(("layers", index, "mixer", name) for name in names)

        layout[layer + "norm.weight"] = _Tensor((("layers", index, "norm"),))
        layer += "mixer."
        layout[layer + "in_proj.weight"] = _Tensor(
            mixer("in_proj", "z_proj"),
            lambda tensor: (tensor[:d_inner].T, tensor[d_inner:].T),
            lambda u, z: jnp.concatenate([u, z], axis=1).T,
        )
        layout[layer + "conv1d.weight"] = _Tensor(
            mixer("conv_kernel"), lambda tensor: (tensor[:, 0],), lambda kernel: kernel[:, None]
        )
        if config.use_conv_bias:
            layout[layer + "conv1d.bias"] = _Tensor(mixer("conv_bias"))
        for name in ("x_proj", "dt_proj", "out_proj"):
            layout[f"{layer}{name}.weight"] = _Tensor(mixer(name), transposed, lambda kernel: kernel.T)
        layout[layer + "dt_proj.bias"] = _Tensor(mixer("dt_bias"))
        layout[layer + "A_log"] = _Tensor(mixer("A_log"))
        layout[layer + "D"] = _Tensor(mixer("D"))
        if config.use_bias:
            layout[layer + "in_proj.bias"] = _Tensor(
                mixer("in_proj_bias", "z_proj_bias"),
                lambda tensor: (tensor[:d_inner], tensor[d_inner:]),
                lambda u, z: jnp.concatenate([u, z]),
            )
            layout[layer + "out_proj.bias"] = _Tensor(mixer("out_proj_bias"))
    return layout


def _flatten(state: Any, config: MambaConfig) -> dict[_Path, Any]:
    """The parameters by path, layer by layer also where they are stacked."""
    flat = {}
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        if path[0] == "layers" and config.scan_layers:
            abstract = isinstance(value, jax.ShapeDtypeStruct)
            for index in range(config.num_layers):
                one = jax.ShapeDtypeStruct(value.shape[1:], value.dtype) if abstract else value[index]
                flat["layers", index, *path[1:]] = one
        else:
            flat[path] = value
    return flat


def _unflatten(abstract: Any, values: dict[_Path, np.ndarray], config: MambaConfig) -> Any:
    """Undoes `_flatten`, into a state like ``abstract``, each device its part."""
    flat = []
    for path, variable in nnx.to_flat_state(abstract):
        if path[0] == "layers" and config.scan_layers:
            value = np.stack([values["layers", index, *path[1:]] for index in range(config.num_layers)])
        else:
            value = values[path]
        division = variable.get_metadata().get("out_sharding")
        place = None if division is None else NamedSharding(jax.sharding.get_mesh(), PartitionSpec(*division))
        flat.append((path, variable.replace(jax.device_put(value, place))))
    return nnx.from_flat_state(flat)


def _expected(layout: Mapping[str, _Tensor], parameters: Mapping[_Path, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The tensors that hold these parameters."""
    return {
        name: jax.eval_shape(tensor.write, *[parameters[path] for path in tensor.parameters])
        for name, tensor in layout.items()
    }


def _check_tensors(directory: Path, tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ``ValueError`` with all that is wrong, unless the tensors are exactly the expected ones."""
    faults = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in tensors]
    faults += [f"unexpected: {name} {tensor.shape}" for name, tensor in tensors.items() if name not in expected]
    faults += [
        f"of shape {tensors[name].shape}: {name}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if faults:
        raise ValueError(
            f"the tensors in {directory} are not those of the model in its config.json:\n  " + "\n  ".join(faults)
        )


# ---- Files


def _to_bytes(size: int | str) -> int:
    number, unit = size, 1
    if isinstance(size, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]B)", size.strip().upper())):
        number, unit = float(match[1]), _UNITS[match[2]]
    if not isinstance(number, (int, float)) or number * unit < 1:
        raise ValueError(
            f'max_shard_size must be a number of bytes, or a string such as "200MB" or "5GB", got {size!r}'
        )
    return int(number * unit)


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names in their order, in parts that each hold no more than ``limit`` bytes or a single tensor."""
    parts: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not parts or size > room:
            parts.append([])
            room = limit
        parts[-1].append(name)
        room -= size
    return parts


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors, under the names of transformers."""
    single, index, torch_file = directory / "model.safetensors", directory / _INDEX, directory / _TORCH_FILE
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        tensors = {}
        for file in files:
            tensors |= safetensors.numpy.load_file(directory / file)
    elif single.exists():
        tensors = safetensors.numpy.load_file(single)
    elif torch_file.exists():
        tensors = _read_torch(torch_file)
    else:
        raise FileNotFoundError(f"no weights in {directory}: neither {single.name} nor {_INDEX} nor {_TORCH_FILE}")
    original = "backbone.embedding.weight"
    return {_EMBEDDING if name == original else name: tensor for name, tensor in tensors.items()}


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{path} is a torch file: reading it needs torch (pip install torch); or convert it to model.safetensors"
        ) from error
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    tensors = {}
    for name, tensor in loaded.items():
        if tensor.dtype == torch.bfloat16:  # NumPy has it from JAX, not from torch
            tensors[name] = tensor.view(torch.uint16).numpy().view(jnp.bfloat16)
        else:
            tensors[name] = tensor.numpy()
    return tensors


def _read_config(directory: Path) -> dict[str, Any]:
    """The arguments of `MambaConfig`, and whether the embedding may have more rows than vocab_size says."""
    path = directory / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"no config.json in {directory}")
    given = json.loads(path.read_text())
    if "model_type" not in given and {"d_model", "n_layer"} <= given.keys():
        return _original_config(given, path)
    model_type = given.get("model_type")
    if model_type not in ("mamba", "falcon_mamba"):
        raise ValueError(f'{path}: model_type must be "mamba" or "falcon_mamba", got {model_type!r}')
    if given.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f'{path}: hidden_act must be "silu", got {given["hidden_act"]!r}')
    given = _CONFIG_DEFAULTS | given
    settings = {ours: given[theirs] for theirs, ours in _CONFIG_NAMES.items() if theirs in given}
    if isinstance(settings["eos_token_id"], list):
        settings["eos_token_id"] = tuple(settings["eos_token_id"])
    return settings | {"inner_norm": "rms" if model_type == "falcon_mamba" else None}


def _original_config(given: dict[str, Any], path: Path) -> dict[str, Any]:
    """Of the layout of state-spaces/mamba."""
    ssm = dict(given.get("ssm_cfg") or {})
    layer = ssm.pop("layer", "Mamba1")
    checks.check_choice(f"{path}: ssm_cfg.layer", layer, ("Mamba1",))
    if not given.get("rms_norm", True):
        raise ValueError(f"{path}: rms_norm is false, but this package's models have RMS norms only")
    if given.get("attn_layer_idx") or given.get("d_intermediate"):
        raise ValueError(f"{path}: attention and MLP layers (attn_layer_idx, d_intermediate) are not supported")
    if unknown := ssm.keys() - _SSM_NAMES.keys() - {"dt_init", "use_fast_path"}:
        raise ValueError(f"{path}: unknown settings in ssm_cfg: {', '.join(sorted(unknown))}")
    return {
        "d_model": given["d_model"],
        "num_layers": given["n_layer"],
        "vocab_size": given["vocab_size"],
        "residual_f32": given.get("residual_in_fp32", True),
        "tie_embeddings": given.get("tie_embeddings", True),
        # Its embedding is rounded up to a multiple of pad_vocab_size_multiple.
        "pads_vocabulary": True,
        **{ours: ssm[theirs] for theirs, ours in _SSM_NAMES.items() if theirs in ssm},
    }


def _config_to_json(config: MambaConfig) -> dict[str, Any]:
    if config.inner_norm == "scaled_rms":
        raise ValueError(
            'inner_norm="scaled_rms" has no model type in transformers; save such a model with Orbax (docs/models.md)'
        )
    is_falcon = config.inner_norm == "rms"
    # transformers refuses an int where it wants a float, and the other way around.
    floats = {field.name for field in dataclasses.fields(config) if field.type is float}
    settings = {theirs: getattr(config, ours) for theirs, ours in _CONFIG_NAMES.items()}
    settings |= {theirs: float(settings[theirs]) for theirs, ours in _CONFIG_NAMES.items() if ours in floats}
    if not is_falcon:
        del settings["mixer_rms_eps"]
    return settings | {
        "architectures": ["FalconMambaForCausalLM" if is_falcon else "MambaForCausalLM"],
        "model_type": "falcon_mamba" if is_falcon else "mamba",
        "hidden_act": "silu",
        "expand": max(1, int(config.expand)),  # whole; what counts is the next one
        "intermediate_size": mamba.inner_size(config),
        "time_step_rank": mamba.rank(config),
        # Of initial values only, but transformers (5.23) also rescales what it loads.
        "rescale_prenorm_residual": False,
        "dtype": config.param_dtype.name,
    }
