"""diffusers networks as denoisers. Reads names and configurations alone, so diffusers itself is not imported."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser, TimeOf
from ..schedule import Flow
from .latents import latent_ids, pack_latents, unpack_latents
from .schedulers import config_of, schedule_of, spacing_of

__all__ = ["Sampled", "from_diffusers", "schedule_of", "spacing_of"]

PREDICTS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}

# What diffusers' pipelines know of their networks, and no configuration says.
PACKED = {"FluxTransformer2DModel", "ChromaTransformer2DModel"}  # take tokens, each 2 x 2 latents, with img_ids
TOKENS = PACKED | {"QwenImageTransformer2DModel", "LTXVideoTransformer3DModel", "Flux2Transformer2DModel"}
UNIT_TIME = TOKENS - {"LTXVideoTransformer3DModel"} | {"AuraFlowTransformer2DModel"}  # told sigma, not 1000 sigma
EVEN_TIMES = TOKENS  # their pipelines give the scheduler the times 1, 1 - 1 / steps, ...
BACKWARD = {  # told 1 - sigma, or predict x0 - eps
    *("Lumina2Transformer2DModel", "LuminaNextDiT2DModel", "ZImageTransformer2DModel"),
    *("HiDreamImageTransformer2DModel", "OmniGenTransformer2DModel"),
}
FRAMES_FIRST = {"CogVideoXTransformer3DModel", "UNetSpatioTemporalConditionModel"}  # x is [B, F, C, h, w]
NEEDS = {  # conditions whose default in the signature is None, but without which the network fails
    "DiTTransformer2DModel": ["class_labels"],
    "PixArtTransformer2DModel": ["encoder_hidden_states"],
    "SD3Transformer2DModel": ["encoder_hidden_states", "pooled_projections"],
    "FluxTransformer2DModel": ["encoder_hidden_states", "pooled_projections"],
    "ChromaTransformer2DModel": ["encoder_hidden_states"],
}
KNOWN = {*TOKENS, *UNIT_TIME, *BACKWARD, *FRAMES_FIRST, *NEEDS, "UNetMotionModel", "SanaTransformer2DModel"}
IDS = ("img_ids", "txt_ids")  # of the tokens, alike for every sample
CAST = ("encoder_hidden_states", "pooled_projections", "timestep_cond", "text_embeds", "image_embeds")  # to x's dtype


def from_diffusers(
    network: Any,
    scheduler: Any,
    *,
    image_seq_len: int | None = None,
    mu: float | None = None,
    time: str | TimeOf | None = None,
) -> Denoiser:
    """A diffusers network and scheduler as a model.

    network: a UNet (2D, conditional, motion, 3D) or transformer (DiT, PixArt, SD3, FLUX, ...) whose forward takes
        (x, ..., timestep, **condition). Conditions are its own keywords, one row a sample (one row alone is given to
        all): `encoder_hidden_states`, `class_labels`, `added_cond_kwargs={"text_embeds": ..., "time_ids": ...}`, ...
        FLUX: x is latents [B, 16, h, w], packed on the way in, or tokens [B, L, 64] with `img_ids` [L, 3] (under
        guidance [B, L, 3]), see `fs.latent_ids`; `guidance` is a number or [B].
        AnimateDiff: x is [B, C, F, h, w], and `encoder_hidden_states` has a row for each sample or each frame.
    scheduler: any diffusers scheduler (or its `config`): betas, prediction type, shift and spacing are read from it.
        Its `clip_sample` and `thresholding` are not: wrap the model in `fs.Thresholded` for those.
    image_seq_len, mu: one of them where the scheduler shifts with the image's size (`use_dynamic_shifting`): the number
        of tokens, or the shift's exponent.
    time: how the network is told the time, see `fs.Denoiser`; None: as diffusers' pipeline tells it.

    `model.spacing` places `scheduler.set_timesteps(steps)` of the scheduler's class, without its rounding of times
    whose noise levels it does not round: `fs.grid(model.schedule, steps, spacing=model.spacing)`. It is None where the
    class is not known; a bare config without `_class_name` is read as DDIM's. A `PlanScheduler` gives its own.

    Raises ValueError for a network or a configuration that this cannot read.
    """
    whole = getattr(network, "_orig_mod", network)  # torch.compile hides the signature
    names = list(inspect.signature(getattr(whole, "forward", whole)).parameters)
    if "timestep" not in names[1:] or "return_dict" not in names:
        raise ValueError(
            f"{type(network).__name__}.forward takes ({', '.join(names[:3])}, ...), but from_diffusers passes "
            f"(x, timestep, **condition); wrap it yourself: fs.Denoiser(lambda x, t, **c: ..., schedule, predicts=...)"
        )
    kind = _kind(whole)
    if kind in BACKWARD and time is None:
        raise ValueError(
            f"{kind} is told its time or predicts the flow with another sign than from_diffusers assumes; wrap it "
            f"yourself: fs.Denoiser(lambda x, t, **c: ..., fs.Flow(shift=...), predicts='flow')"
        )
    config, name = config_of(scheduler)
    schedule = schedule_of(config, name, image_seq_len=image_seq_len, mu=mu)
    default = "flow_prediction" if isinstance(schedule, Flow) else "epsilon"
    predicts = config.get("prediction_type", default)
    if predicts not in PREDICTS:
        raise ValueError(f"prediction_type {predicts!r} of the scheduler is not one of {', '.join(PREDICTS)}")
    return Denoiser(
        Sampled(network),
        schedule,
        PREDICTS[predicts],
        time=time or _time(kind, _config(whole), config),
        spacing=spacing_of(config, name, even=kind in EVEN_TIMES),
    )


def _kind(network: Any) -> str:
    """The class that is known here, of which the network's own may be made (as FSDP does), or else its own."""
    names = [kind.__name__ for kind in type(network).__mro__]
    return next((name for name in names if name in KNOWN), names[0])


def _config(network: Any) -> Mapping[str, Any]:
    config = getattr(network, "config", None)
    return config if isinstance(config, Mapping) else {}


def _time(kind: str, network: Mapping[str, Any], scheduler: Mapping[str, Any]) -> str:
    scale = network.get("timestep_scale", 1.0) if kind == "SanaTransformer2DModel" else 1.0
    if scale not in (1.0, 0.001):
        raise ValueError(f"{kind} is told its time times {scale:g}; pass time=lambda schedule, node: ... to say so")
    if scheduler.get("timestep_type") == "continuous" and scheduler.get("prediction_type") == "v_prediction":
        return "log_sigma"  # EulerDiscreteScheduler tells these networks ln(sigma) / 4, as EDM does
    return "unit" if kind in UNIT_TIME or scale == 0.001 else "index"


class Sampled(torch.nn.Module):
    """A diffusers network as a plain one: network(x, t, **condition) -> Tensor. Checks them by name and rows.

    null: the class label that means no class, for those who guide; None where there is none or it is not known.
    """

    def __init__(self, network: Any, *, null: int | None = None):
        super().__init__()
        self.network, self.null = network, null
        whole = getattr(network, "_orig_mod", network)
        self.kind, self.config = _kind(whole), _config(whole)
        signature = inspect.signature(getattr(whole, "forward", whole)).parameters.values()
        self.names = {p.name for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.open = any(p.kind is p.VAR_KEYWORD for p in signature)
        first = next(iter(signature)).name if signature else ""
        self.names -= {first, "timestep", "return_dict"}
        self.needs = _needs(self.kind, self.config, [p for p in signature if p.name in self.names])

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        self._check(x, condition)
        given = {name: self._given(name, value, x) for name, value in condition.items()}
        if self.kind not in PACKED:
            return self._call(x, t, given)
        if "txt_ids" not in given and "encoder_hidden_states" in given:
            given["txt_ids"] = torch.zeros(given["encoder_hidden_states"].shape[1], 3, device=x.device)
        if x.dim() == 3:
            return self._call(x, t, given)
        height, width = x.shape[2:]
        given["img_ids"] = latent_ids(height, width, device=x.device)
        return unpack_latents(self._call(pack_latents(x), t, given), height, width)

    def _call(self, x: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        output: Tensor = self.network(x, timestep=t, return_dict=False, **condition)[0]
        return output

    def _check(self, x: Tensor, condition: Mapping[str, Any]) -> None:
        channels = self.config.get("in_channels")
        if channels is not None:
            self._check_channels(x, channels)
        unknown = [] if self.open else sorted(condition.keys() - self.names)
        if unknown:
            raise ValueError(f"{self.kind} takes no condition {unknown[0]!r}; it takes {', '.join(sorted(self.names))}")
        for name, what in self.needs.items():
            if condition.get(name) is None:
                raise ValueError(
                    f"{self.kind} needs the condition {name!r}{what}; pass fs.sample(..., "
                    f"condition={{{name!r}: ...}}), or under guidance fs.Guided(..., cond=..., uncond=...)"
                )
        if self.kind in PACKED and x.dim() == 3 and condition.get("img_ids") is None:
            raise ValueError(
                f"{self.kind} needs 'img_ids' for tokens [B, L, C]: fs.latent_ids(height, width) of the latents; or "
                f"give x as latents [B, C, h, w], which are packed for you"
            )
        if condition.get("guidance") is not None and self.config.get("guidance_embeds") is False:
            raise ValueError(
                f"this {self.kind} was not distilled with guidance (guidance_embeds); leave out 'guidance'"
            )

    def _check_channels(self, x: Tensor, channels: int) -> None:
        packs = self.kind in PACKED and x.dim() == 4
        at = 1 if packs else 2 if self.kind in FRAMES_FIRST else -1 if self.kind in TOKENS else 1
        wanted = channels // 4 if packs else channels
        if x.dim() < 3 or x.shape[at] != wanted:
            shape = {1: f"[B, {wanted}, ...]", 2: f"[B, F, {wanted}, ...]", -1: f"[B, L, {wanted}]"}[at]
            raise ValueError(f"the network takes x of shape {shape}, got {list(x.shape)}")

    def _given(self, name: str, value: Any, x: Tensor) -> Any:
        """A condition as the network wants it: one row a sample, and of x's dtype where that is what it computes in."""
        if isinstance(value, Mapping):  # a copy: FLUX takes entries out of what it is given
            rows = name == "added_cond_kwargs"
            return {key: self._given(key, one, x) if rows else one for key, one in value.items()}
        if name == "guidance" and isinstance(value, int | float):
            return torch.full((x.shape[0],), float(value), device=x.device)
        if not isinstance(value, Tensor) or not value.dim():
            return value
        if name in IDS:
            return value[0] if value.dim() == 3 else value
        if name in CAST and value.is_floating_point():
            value = value.to(x.dtype)
        if self.kind != "UNetMotionModel" or name != "encoder_hidden_states":
            return _rows(name, value, x.shape[0])
        frames = x.shape[2]
        each = value.shape[0] == x.shape[0] * frames
        return value if each else _rows(name, value, x.shape[0]).repeat_interleave(frames, dim=0)


def _rows(name: str, value: Tensor, batch: int) -> Tensor:
    """One row a sample, of as many or of one for all."""
    rows = value.shape[0]
    if rows == batch:
        return value
    if rows != 1:  # not `rows in (1, batch)`, which torch.compile gets wrong where sizes are symbols
        raise ValueError(f"condition {name!r} has {rows} rows for a batch of {batch}; give one a sample")
    return value.expand(batch, *value.shape[1:])


def _needs(kind: str, config: Mapping[str, Any], parameters: list[inspect.Parameter]) -> dict[str, str]:
    """Conditions without which this network fails, or runs as something it was not trained to be, with a hint each."""
    needs = {p.name: "" for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    needs.update(dict.fromkeys(NEEDS.get(kind, []), ""))
    if config.get("guidance_embeds"):
        needs["guidance"] = ", the scale it was distilled with, a number such as 3.5 or [B]"
    if (size := config.get("time_cond_proj_dim")) is not None:
        needs["timestep_cond"] = f", the scale it was distilled with: fs.guidance_embedding(scale, {size})"
    if config.get("addition_embed_type") == "text_time":
        needs["added_cond_kwargs"] = ", {'text_embeds': pooled prompt [B, D], 'time_ids': sizes [B, 6]}"
    return needs
