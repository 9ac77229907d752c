"""LoRA students: adapters of low rank on the teacher's own, frozen weights.

Hu et al. 2021, arXiv:2106.09685; as students of latent consistency Luo et al. 2023, arXiv:2311.05556.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastsample import files
from fastsample.adapters.diffusers import Sampled
from fastsample.denoiser import Denoiser

WEIGHTS = "pytorch_lora_weights.safetensors"  # where diffusers looks for them
TARGETS = (  # of LCM-LoRA: all that is wide in a UNet
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


def lora_student(
    teacher: Denoiser,
    rank: int = 64,
    *,
    alpha: float | None = None,
    targets: Sequence[str] = TARGETS,
    seed: int = 0,
) -> Denoiser:
    """The teacher with adapters, to be trained: W + alpha / rank B A, with B = 0, so that it begins as its teacher.

    The weights W are the teacher's own, not a copy, and are frozen by this, for the teacher too. Only the adapters have
    a gradient; they are float32 where W is half precision.

    rank: of A and B. alpha: None is the rank. seed: of A.
    targets: modules (linear or convolution) that get an adapter: those whose name is one of these or ends in "." and
        one of these.
    Raises ValueError where there is no such module, ImportError without peft.
    """
    peft: Any = _peft()
    if not isinstance(teacher.network, nn.Module):
        raise TypeError(f"only a torch.nn.Module can have adapters, got {type(teacher.network).__name__}")
    if rank < 1 or (alpha is not None and not alpha > 0):
        raise ValueError(f"rank must be at least 1 and alpha positive, got rank = {rank}, alpha = {alpha}")
    if _layers(teacher.network):
        raise ValueError("the teacher has adapters already; merge them first: distill.merged(teacher)")
    whole = teacher.network.requires_grad_(False)
    shared = {id(value): value for value in whole.parameters()}
    network = copy.deepcopy(whole, memo=shared)
    inner: Any = network.network if isinstance(network, Sampled) else network
    config = peft.LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inner.add_adapter(config) if hasattr(inner, "add_adapter") else peft.inject_adapter_in_model(config, inner)
        except ValueError as error:
            names = sorted({name.rsplit(".", 1)[-1] for name, module in whole.named_modules() if _wide(module)})
            raise ValueError(
                f"{type(inner).__name__} has none of the modules {', '.join(targets)}; pass targets=[...] with some of "
                f"its own: {', '.join(names[:20])} ({str(error).splitlines()[0]})"
            ) from error
    for value in network.parameters():
        if value.requires_grad:
            value.data = value.data.float()
    found = copy.copy(teacher)
    found.network, found.count = network, type(teacher.count)()
    return found


def save_lora(student: Denoiser, folder: str | Path) -> Path:
    """Write the adapters as diffusers' pipelines load them: `pipe.load_lora_weights(folder)`. The file that is written.

    alpha / rank is multiplied into B, so that every loader, with or without a notion of alpha, has the same student.
    Raises ValueError for a model without adapters.
    """
    network: Any = student.network.network if isinstance(student.network, Sampled) else student.network
    layers = _layers(network)
    if not layers:
        raise ValueError(f"{type(network).__name__} has no adapters; make the student by distill.lora_student")
    prefix = "transformer" if "Transformer" in type(network).__name__ else "unet"
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for adapter in layer.active_adapters:
            up, scale = layer.lora_B[adapter].weight, layer.scaling[adapter]
            tensors[f"{prefix}.{name}.lora_A.weight"] = layer.lora_A[adapter].weight.detach().cpu().contiguous()
            tensors[f"{prefix}.{name}.lora_B.weight"] = (up.detach() * scale).cpu().contiguous()
    path = Path(folder) / WEIGHTS
    files.write(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    return path


def merged(student: Denoiser) -> Denoiser:
    """A copy of the student with its adapters added to the weights: an ordinary network, for `fs.save_pretrained`."""
    network: Any = copy.deepcopy(student.network)
    layers = _layers(network)
    if not layers:
        raise ValueError(f"{type(network).__name__} has no adapters to merge; save it as it is")
    for name, layer in layers.items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer.get_base_layer())
    inner: Any = network.network if isinstance(network, Sampled) else network
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if attribute in vars(inner):
            delattr(inner, attribute)
    found = copy.copy(student)
    found.network, found.count = network, type(student.count)()
    return found


def _layers(network: nn.Module) -> dict[str, Any]:
    """The modules that have adapters, by name."""
    return {name: module for name, module in network.named_modules() if hasattr(module, "lora_A") and module.lora_A}


def _wide(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA students need peft: pip install 'fastsample[lora]'") from error
    return peft
