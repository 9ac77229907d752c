"""PlanScheduler in diffusers' own pipelines, unmodified, with tiny random networks: the images of `fs.sample`.

The prompts are embeddings where the text encoders would only cost time; one pipeline has them all.
"""

import json
from functools import cache

import pytest
import torch

import fastsample as fs
from fastsample import solvers

diffusers = pytest.importorskip("diffusers", reason="the pipelines need pip install 'fastsample[diffusers]'")
pytest.importorskip("transformers", reason="diffusers makes no pipeline of text without transformers")

from fastsample.solvers import PlanScheduler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 4
SCALE = 3.0


def given(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


PROMPT, NEGATIVE = given(1, 6, 8, seed=1), given(1, 6, 8, seed=2)
NOISE = fs.noise((4, 8, 8), seeds=[5])


def close(ours, theirs, tolerance=1e-5):
    """1e-5 of the largest number: float32, with cond and uncond the other way round in the batch."""
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    assert theirs.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, float(theirs.abs().max())))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(make, *args, **kwargs):
    torch.manual_seed(0)
    return make(*args, **kwargs).eval()


@cache
def vae():
    return seeded(
        diffusers.AutoencoderKL,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    )


@cache
def unet():
    return seeded(
        diffusers.UNet2DConditionModel,
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=2,
    )


@cache
def stable_diffusion(kind):
    rest = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = getattr(diffusers, kind)(
        unet=unet(), vae=vae(), scheduler=diffusers.DDIMScheduler(**SD), requires_safety_checker=False, **rest
    )
    return quiet(pipe)


WORDS = {"prompt_embeds": PROMPT, "negative_prompt_embeds": NEGATIVE, "guidance_scale": SCALE}


def guided(network, scheduler, scale=SCALE, cond=None, uncond=None, **options):
    cond, uncond = cond or {"encoder_hidden_states": PROMPT}, uncond or {"encoder_hidden_states": NEGATIVE}
    return fs.Guided(fs.from_diffusers(network, scheduler, **options), cond, uncond, scale=scale)


def drawn_by(monkeypatch, noise):
    """The steps' noises in the order in which a run of `fs.sample` numbers them."""
    module = __import__("fastsample.solvers.scheduler", fromlist=["scheduler"])

    def draw(shape, **kwargs):
        return noise.draw(draw.k)

    real = module.PlanScheduler.step

    def step(self, output, timestep, x, *args, **kwargs):
        run = self._running(timestep)
        draw.k = run.step - run.first + 2
        return real(self, output, timestep, x, *args, **kwargs)

    monkeypatch.setattr(module, "randn_tensor", draw)
    monkeypatch.setattr(module.PlanScheduler, "step", step)


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("dpmpp_2m", {}),
        ("unipc_2", {}),
        ("heun", {}),
        ("dpmpp_2s", {}),
        ("ddim", {"eta": 0.6}),
        ("euler_ancestral", {}),
    ],
)
def test_stable_diffusion_makes_the_image_of_sample(monkeypatch, solver, options):
    pipe = stable_diffusion("StableDiffusionPipeline")
    pipe.scheduler = PlanScheduler.from_config(
        diffusers.DPMSolverMultistepScheduler(**SD).config, solver=solver, solver_options=options
    )
    with monkeypatch.context() as patched:
        drawn_by(patched, NOISE)
        ours = pipe(latents=NOISE.draw(0), num_inference_steps=STEPS, output_type="latent", **WORDS).images
    model = guided(pipe.unet, diffusers.DPMSolverMultistepScheduler(**SD))
    plan = fs.trace(
        solvers.get(solver),
        fs.grid(model.schedule, STEPS, spacing=model.model.spacing, lower_order_final=True),
        **options,
    )
    close(ours, fs.sample(model, plan, NOISE))
    assert [row.node for row in pipe.scheduler.plan.rows] == [row.node for row in plan.rows]


def test_the_eta_of_a_call_is_not_passed_over():
    """diffusers' pipelines hand it on where `step` names it, and else leave it out in silence."""
    pipe = stable_diffusion("StableDiffusionPipeline")
    pipe.scheduler = PlanScheduler.from_config(diffusers.DDIMScheduler(**SD).config, solver="dpmpp_2m")
    with pytest.raises(ValueError, match=r"asks for eta = 0.5, and the plan is dpmpp_2m; leave"):
        pipe(latents=NOISE.draw(0), num_inference_steps=STEPS, output_type="latent", eta=0.5, **WORDS)


def test_the_decoded_image_and_the_seed_are_those_of_sample_too():
    pipe = stable_diffusion("StableDiffusionPipeline")
    pipe.scheduler = PlanScheduler.from_config(
        diffusers.DDIMScheduler(**SD).config, solver="dpmpp_2m", clip_sample=False
    )
    ours = pipe(generator=torch.Generator().manual_seed(5), num_inference_steps=STEPS, output_type="pt", **WORDS).images
    model = guided(pipe.unet, pipe.scheduler)
    latents = fs.sample(model, pipe.scheduler.plan, NOISE)
    with torch.no_grad():
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    close(ours, (image / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun", "unipc_3", "ddpm"])
def test_an_image_is_changed_as_sample_changes_it(monkeypatch, solver):
    pipe = stable_diffusion("StableDiffusionImg2ImgPipeline")
    pipe.scheduler = PlanScheduler.from_config(diffusers.EulerDiscreteScheduler(**SD).config, solver=solver)
    image = given(1, 4, 8, 8, seed=3)
    with monkeypatch.context() as patched:
        drawn_by(patched, NOISE)
        generator = torch.Generator().manual_seed(5)
        asked = {"num_inference_steps": 6, "strength": 0.6, "generator": generator}
        ours = pipe(image=image, output_type="latent", **asked, **WORDS).images
    model = guided(pipe.unet, diffusers.EulerDiscreteScheduler(**SD))
    grid = fs.grid(model.schedule, 6, spacing=model.model.spacing, strength=0.6)
    assert len(grid) == 3
    close(ours, fs.sample(model, fs.trace(solvers.get(solver), grid), NOISE, init=image))


PEERS = [
    ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}, "ddim"),
    ("DPMSolverMultistepScheduler", {"solver_order": 2}, "dpmpp_2m"),
    ("UniPCMultistepScheduler", {"solver_order": 2}, "unipc_2"),
]


def picture(size=16):
    mask = torch.zeros(1, 1, size, size)
    mask[..., size // 2 :] = 1
    return {"image": given(1, 3, size, size, seed=4).clamp(-1, 1), "mask_image": mask, "height": size, "width": size}


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "StableDiffusionInpaintPipeline"])
@pytest.mark.parametrize(("peer", "settings", "solver"), PEERS, ids=[solver for *_, solver in PEERS])
def test_it_is_the_scheduler_of_diffusers_where_they_agree(kind, peer, settings, solver):
    """Through the whole pipeline; from noise of variance 1 as theirs."""
    pipe, theirs = stable_diffusion(kind), getattr(diffusers, peer)(**SD, **settings)
    asked = {"num_inference_steps": 5, "output_type": "latent", **WORDS}
    if "Inpaint" in kind:
        asked |= {**picture(), "strength": 0.9}
    images = []
    for scheduler in (PlanScheduler.from_config(theirs.config, solver=solver, unit_start=True), theirs):
        pipe.scheduler = scheduler
        images.append(pipe(generator=torch.Generator().manual_seed(5), **asked).images)
    # their tables are float32, and UniPC solves its linear systems in it; DDIM visits T / N, which is whole at 5 steps
    close(*images, tolerance=5e-5)


def test_a_mask_leaves_the_rest_to_the_image():
    """Inpainting writes into the state between the steps, which a state kept from the last step would undo."""
    pipe = stable_diffusion("StableDiffusionInpaintPipeline")
    pipe.scheduler = PlanScheduler.from_config(diffusers.DDIMScheduler(**SD).config, solver="dpmpp_2m")
    asked = {"num_inference_steps": 5, "output_type": "latent", **picture(), "strength": 0.9, **WORDS}
    latents = pipe(generator=torch.Generator().manual_seed(5), **asked).images
    with torch.no_grad():
        image = pipe.vae.encode(asked["image"]).latent_dist
    kept = image.mean * pipe.vae.config.scaling_factor
    spread = 5 * image.std * pipe.vae.config.scaling_factor  # the pipeline draws its latents from the encoder
    assert ((latents - kept).abs()[..., :4] <= spread[..., :4]).all()
    assert ((latents - kept).abs()[..., 4:] > spread[..., 4:]).any()


@cache
def xl(kind):
    network = seeded(
        diffusers.UNet2DConditionModel,
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 4 + 8,
        cross_attention_dim=8,
        norm_num_groups=2,
    )
    rest = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1)
    return quiet(getattr(diffusers, kind)(unet=network, vae=vae(), scheduler=scheduler, add_watermarker=False, **rest))


def test_stable_diffusion_xl_makes_the_image_of_sample():
    pipe = xl("StableDiffusionXLPipeline")
    theirs = diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1)
    pipe.scheduler = PlanScheduler.from_config(theirs.config, solver="dpmpp_2m")
    pooled, other = given(1, 8, seed=6), given(1, 8, seed=7)
    words = {**WORDS, "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": other}
    ours = pipe(latents=NOISE.draw(0), num_inference_steps=STEPS, output_type="latent", **words).images
    ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]])
    cond, uncond = (
        {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": embeds, "time_ids": ids}}
        for text, embeds in ((PROMPT, pooled), (NEGATIVE, other))
    )
    model = guided(pipe.unet, theirs, cond=cond, uncond=uncond)
    plan = fs.trace(solvers.dpmpp_2m, fs.grid(model.schedule, STEPS, spacing=model.model.spacing))
    close(ours, fs.sample(model, plan, NOISE))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"])
def test_stable_diffusion_xl_from_an_image_is_that_of_diffusers(kind):
    pipe, theirs = xl(kind), diffusers.DPMSolverMultistepScheduler(**SD)
    words = {**WORDS, "pooled_prompt_embeds": given(1, 8, seed=6), "negative_pooled_prompt_embeds": given(1, 8, seed=7)}
    asked = picture() if "Inpaint" in kind else {"image": given(1, 4, 8, 8, seed=3)}
    images = []
    for scheduler in (PlanScheduler.from_config(theirs.config, solver="dpmpp_2m", unit_start=True), theirs):
        pipe.scheduler = scheduler
        asked |= {"generator": torch.Generator().manual_seed(5), "num_inference_steps": 5, "strength": 0.7}
        images.append(pipe(**asked, output_type="latent", **words).images)
    close(*images, tolerance=5e-5)


@pytest.mark.slow
def test_a_run_may_be_handed_on_between_two_pipelines_of_xl():
    """denoising_end and denoising_start, with a solver that remembers nothing."""
    words = {**WORDS, "pooled_prompt_embeds": given(1, 8, seed=6), "negative_pooled_prompt_embeds": given(1, 8, seed=7)}
    asked = {"num_inference_steps": 6, "output_type": "latent", **words}
    base, refiner = xl("StableDiffusionXLPipeline"), xl("StableDiffusionXLImg2ImgPipeline")
    config = diffusers.DPMSolverMultistepScheduler(**SD).config
    for pipe in (base, refiner):
        pipe.scheduler = PlanScheduler.from_config(config, solver="ddim")
    whole = base(latents=NOISE.draw(0), **asked).images
    half = base(latents=NOISE.draw(0), denoising_end=0.5, **asked).images
    close(refiner(image=half, denoising_start=0.5, **asked).images, whole)


def test_the_latent_consistency_pipeline_makes_the_image_of_its_own_scheduler():
    network = seeded(diffusers.UNet2DConditionModel, **{**unet().config, "time_cond_proj_dim": 8})
    theirs = diffusers.LCMScheduler(**SD, clip_sample=False)
    names = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    pipe = quiet(
        diffusers.LatentConsistencyModelPipeline(
            unet=network, vae=vae(), scheduler=theirs, requires_safety_checker=False, **dict.fromkeys(names)
        )
    )
    images = []
    for scheduler in (PlanScheduler.from_config(theirs.config, solver="consistency", unit_start=True), theirs):
        pipe.scheduler = scheduler
        asked = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(5), "output_type": "latent"}
        images.append(pipe(prompt_embeds=PROMPT, **asked).images)
    close(*images, tolerance=1e-4)  # theirs mixes in 1e-5 of the state: a boundary condition at t = 0


@cache
def stable_diffusion_3(kind):
    network = seeded(
        diffusers.SD3Transformer2DModel,
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_projection_dim=8,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        out_channels=4,
    )
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(getattr(diffusers, kind)(transformer=network, vae=vae(), scheduler=scheduler, **dict.fromkeys(names)))


POOLED = {"pooled_prompt_embeds": given(1, 8, seed=6), "negative_pooled_prompt_embeds": given(1, 8, seed=7)}


def flow_model(network, scheduler):
    cond, uncond = (
        {"encoder_hidden_states": text, "pooled_projections": embeds}
        for text, embeds in zip((PROMPT, NEGATIVE), POOLED.values())
    )
    return guided(network, scheduler, cond=cond, uncond=uncond)


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "flow_heun"])
def test_stable_diffusion_3_makes_the_image_of_sample(solver):
    pipe, theirs = stable_diffusion_3("StableDiffusion3Pipeline"), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    asked = {"latents": NOISE.draw(0), "num_inference_steps": STEPS, "output_type": "latent"}
    pipe.scheduler = PlanScheduler.from_config(theirs.config, solver=solver)
    ours = pipe(**asked, **WORDS, **POOLED).images
    model = flow_model(pipe.transformer, theirs)
    plan = fs.trace(solvers.get(solver), fs.grid(model.schedule, STEPS, spacing=model.model.spacing))
    close(ours, fs.sample(model, plan, NOISE))
    if solver == "euler":
        pipe.scheduler = theirs
        close(ours, pipe(**asked, **WORDS, **POOLED).images)


def test_stable_diffusion_3_changes_an_image_as_sample_does():
    pipe = stable_diffusion_3("StableDiffusion3Img2ImgPipeline")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.scheduler = PlanScheduler.from_config(theirs.config, solver="dpmpp_2m")
    asked = {"generator": torch.Generator().manual_seed(5), "num_inference_steps": 5, "strength": 0.6}
    image = given(1, 4, 8, 8, seed=3)
    ours = pipe(image=image, output_type="latent", height=16, width=16, **asked, **WORDS, **POOLED).images
    model = flow_model(pipe.transformer, theirs)
    grid = fs.grid(model.schedule, 5, spacing=model.model.spacing, strength=0.6)
    latents = (
        (image - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        if pipe.vae.config.shift_factor
        else image
    )
    close(ours, fs.sample(model, fs.trace(solvers.dpmpp_2m, grid), NOISE, init=latents))


@cache
def flux():
    network = seeded(
        diffusers.FluxTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    rest = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return quiet(diffusers.FluxPipeline(transformer=network, vae=vae(), scheduler=scheduler, **rest))


def run_flux(pipe, **changes):
    """4 x 4 tokens of 2 x 2 latents."""
    words = {"prompt_embeds": PROMPT, "pooled_prompt_embeds": POOLED["pooled_prompt_embeds"]}
    asked = {
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "height": 16,
        "width": 16,
        "latents": given(1, 16, 16),
    }
    return pipe(**{**asked, **words, **changes}).images


@pytest.mark.parametrize("settings", [{"shift": 3.0}, {"use_dynamic_shifting": True, "max_shift": 1.3}], ids=str)
def test_flux_makes_the_image_of_sample(settings):
    """Its pipeline passes sigmas and, for the dynamic shift, mu."""
    pipe, theirs = flux(), diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    pipe.scheduler = theirs
    euler = run_flux(pipe)
    pipe.scheduler = PlanScheduler.from_config(theirs.config, solver="euler")
    close(run_flux(pipe), euler)
    pipe.scheduler = PlanScheduler.from_config(theirs.config, solver="dpmpp_2m")
    ours = run_flux(pipe)
    tokens = {"image_seq_len": 16} if "use_dynamic_shifting" in settings else {}
    model = fs.from_diffusers(pipe.transformer, theirs, **tokens)
    grid = fs.grid(model.schedule, STEPS, fs.at_times([1 - k / STEPS for k in range(STEPS)]))
    condition = {
        "encoder_hidden_states": PROMPT,
        "pooled_projections": POOLED["pooled_prompt_embeds"],
        "txt_ids": torch.zeros(6, 3),
        "img_ids": pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
    }
    plan = fs.trace(solvers.dpmpp_2m, grid)
    close(ours, fs.sample(model, plan, given(1, 16, 16), condition=condition))


def test_a_spacing_or_plan_of_ones_own_stands_against_the_default_sigmas_of_flux():
    pipe = flux()
    config = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0).config
    grid = fs.grid(fs.Flow(shift=2.0), STEPS, fs.quadratic_t)
    pipe.scheduler = PlanScheduler.from_config(config, plan=fs.trace(solvers.dpmpp_2m, grid))
    planned = run_flux(pipe)
    pipe.scheduler = PlanScheduler.from_config(config, solver="dpmpp_2m", spacing="quadratic_t")
    assert torch.equal(run_flux(pipe), planned)
    with pytest.raises(ValueError, match="made with quadratic_t and is given sigmas too"):
        run_flux(pipe, sigmas=[1.0, 0.8, 0.5, 0.1])
    pipe.scheduler = PlanScheduler.from_config(config, solver="dpmpp_2m")
    run_flux(pipe, sigmas=[1.0, 0.8, 0.5, 0.1])
    assert pipe.scheduler.sigmas.tolist() == pytest.approx([1.0, 1.6 / 1.8, 1.0 / 1.5, 0.2 / 1.1, 0.0])


def test_animate_diff_makes_the_video_of_sample():
    torch.manual_seed(0)
    base = seeded(
        diffusers.UNet2DConditionModel,
        block_out_channels=(8, 8),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=2,
    )
    adapter = seeded(
        diffusers.MotionAdapter,
        block_out_channels=(8, 8),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
    )
    theirs = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False)
    pipe = quiet(
        diffusers.AnimateDiffPipeline(
            unet=base, vae=vae(), motion_adapter=adapter, scheduler=theirs, text_encoder=None, tokenizer=None
        )
    )
    pipe.scheduler = PlanScheduler.from_config(theirs.config, solver="unipc_2", spacing="uniform_lam")
    noise = fs.noise((4, 3, 8, 8), seeds=[5])
    asked = {"num_inference_steps": STEPS, "num_frames": 3, "output_type": "latent"}
    ours = pipe(latents=noise.draw(0), height=16, width=16, **asked, **WORDS).frames
    model = guided(pipe.unet, theirs)
    plan = fs.trace(solvers.unipc_2, fs.grid(model.schedule, STEPS, fs.uniform_lam))
    close(ours, fs.sample(model, plan, noise))


@pytest.mark.slow
def test_stable_video_diffusion_is_that_of_diffusers():
    """EDM's levels up to sigma = 700, the network told ln(sigma) / 4, and guidance that differs from frame to frame."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    network = seeded(
        diffusers.UNetSpatioTemporalConditionModel,
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=8,
        num_attention_heads=4,
        projection_class_embeddings_input_dim=3 * 8,
        addition_time_embed_dim=8,
    )
    decoder = seeded(diffusers.AutoencoderKLTemporalDecoder, block_out_channels=(32,), latent_channels=4)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    theirs = diffusers.EulerDiscreteScheduler(
        **SD,
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    pipe = quiet(
        diffusers.StableVideoDiffusionPipeline(
            vae=decoder,
            image_encoder=seeded(
                CLIPVisionModelWithProjection, CLIPVisionConfig(**sizes, intermediate_size=8, projection_dim=8)
            ),
            unet=network,
            scheduler=theirs,
            feature_extractor=CLIPImageProcessor(crop_size=16, size=16),
        )
    )
    videos = []
    for scheduler in (PlanScheduler.from_config(theirs.config, solver="euler", unit_start=True), theirs):
        pipe.scheduler = scheduler
        asked = {"num_frames": 2, "num_inference_steps": STEPS, "height": 16, "width": 16, "output_type": "latent"}
        image = given(1, 3, 16, 16, seed=3).sigmoid()
        videos.append(pipe(image=image, generator=torch.Generator().manual_seed(0), **asked).frames)
    close(*videos)


@pytest.mark.parametrize("kind", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_cogvideox_is_that_of_diffusers(kind):
    """A network that predicts v, from alpha = 0 on."""
    network = seeded(
        diffusers.CogVideoXTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=6,
    )
    decoder = seeded(
        diffusers.AutoencoderKLCogVideoX,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    config = {**SD, **zero, "prediction_type": "v_prediction", "snr_shift_scale": 3.0}
    theirs = diffusers.CogVideoXDDIMScheduler(**config)
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=decoder, transformer=network, scheduler=theirs
    )
    ours = PlanScheduler.from_config(getattr(diffusers, kind)(**config).config, solver="ddim", unit_start=True)
    videos = []
    for scheduler in (ours, theirs):
        quiet(pipe).scheduler = scheduler
        asked = {"num_frames": 8, "num_inference_steps": STEPS, "height": 16, "width": 16, "output_type": "latent"}
        generator = torch.Generator().manual_seed(0)
        videos.append(pipe(generator=generator, max_sequence_length=6, **asked, **WORDS).frames)
    close(*videos)


def test_dit_makes_the_image_of_sample():
    network = seeded(
        diffusers.DiTTransformer2DModel,
        sample_size=8,
        num_layers=1,
        patch_size=4,
        attention_head_dim=4,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    theirs = diffusers.DDIMScheduler(clip_sample=False)
    pipe = quiet(diffusers.DiTPipeline(transformer=network, vae=vae(), scheduler=theirs))
    pipe.scheduler = PlanScheduler.from_config(theirs.config, solver="dpmpp_2m", spacing="uniform_lam")
    asked = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "pt"}
    ours = pipe([7], generator=torch.Generator().manual_seed(5), **asked).images
    labels = {"class_labels": torch.tensor([7])}, {"class_labels": torch.tensor([1000])}
    model = guided(network, theirs, cond=labels[0], uncond=labels[1])
    plan = fs.trace(solvers.dpmpp_2m, fs.grid(model.schedule, STEPS, fs.uniform_lam))
    latents = fs.sample(model, plan, NOISE.draw(0) / plan.start.sigma)  # this pipeline begins at the noise itself
    with torch.no_grad():
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    close(ours, (image / 2 + 0.5).clamp(0, 1))


def test_ddpm_and_ddim_pipelines_make_the_clipped_image_of_sample():
    network = seeded(
        diffusers.UNet2DModel,
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    theirs = diffusers.DDPMScheduler()
    assert theirs.config.clip_sample
    model = fs.Thresholded(fs.from_diffusers(network, theirs))
    plan = fs.trace(solvers.dpmpp_2m, fs.grid(model.schedule, STEPS, spacing=model.model.spacing))
    noise = fs.noise((1, 8, 8), seeds=[5])
    image = fs.sample(model, plan, noise.draw(0) / plan.start.sigma)  # these pipelines begin at the noise itself
    image = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    for kind in (diffusers.DDPMPipeline, diffusers.DDIMPipeline):
        pipe = quiet(kind(unet=network, scheduler=theirs))
        pipe.scheduler = PlanScheduler.from_config(theirs.config, solver="dpmpp_2m")
        asked = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(5), "output_type": "np"}
        close(pipe(**asked).images, image)


def test_a_pipeline_with_text_is_saved_and_loaded_with_its_scheduler(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (tmp_path / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    sizes |= {"vocab_size": len(tokens), "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    pipe = diffusers.StableDiffusionPipeline(
        unet=unet(),
        vae=vae(),
        tokenizer=CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=8),
        text_encoder=CLIPTextModel(CLIPTextConfig(**sizes)).eval(),
        scheduler=PlanScheduler.from_config(diffusers.PNDMScheduler(**SD).config, solver="unipc_3", spacing="beta"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    asked = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "pt", "height": 16, "width": 16}

    def image(pipe):
        return quiet(pipe)(**asked, generator=torch.Generator().manual_seed(5)).images

    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["scheduler"] == ["fastsample.solvers.scheduler", "PlanScheduler"]
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert type(loaded.scheduler) is PlanScheduler
    assert (loaded.scheduler.config.solver, loaded.scheduler.config.spacing) == ("unipc_3", "beta")
    torch.testing.assert_close(image(loaded), image(pipe), rtol=0, atol=0)
    alone = PlanScheduler.from_pretrained(tmp_path / "pipe", subfolder="scheduler", solver="ddim")
    assert (alone.config.solver, alone.config.spacing, alone.config.replaces) == ("ddim", "beta", "PNDMScheduler")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe", scheduler=alone)
    assert (image(again) - image(pipe)).abs().max() > 1e-4
