"""Stable Diffusion 1, 2 or XL in 10 network evaluations, guided, with a negative prompt.

python examples/stable_diffusion.py "a lighthouse at dusk"         # stable-diffusion-v1-5, from the Hugging Face hub
python examples/stable_diffusion.py "a lighthouse at dusk" --model stabilityai/stable-diffusion-xl-base-1.0 --steps 8
python examples/stable_diffusion.py "a lighthouse at dusk" --model path/to/a/saved/pipeline --solver unipc_3
python examples/stable_diffusion.py "a lighthouse at dusk" --pipeline   # diffusers' own pipeline, our solver in it
"""

import argparse
import sys
from typing import Any

import torch
from diffusers import DiffusionPipeline

import fastsample as fs
from fastsample import solvers

Condition = dict[str, Any]


def load(name: str, device: str) -> Any:
    try:
        pipe = DiffusionPipeline.from_pretrained(name)
    except (OSError, ValueError) as error:  # the hub is out of reach, or there is no such folder
        why = " ".join(str(error).split()).split(". ")[0].split(" (")[0]
        sys.exit(
            f"could not load {name} from this disk or huggingface.co: {why}. Offline? Pass --model with the folder of "
            f"a pipeline saved with save_pretrained."
        )
    return pipe.to(device, torch.float16 if device == "cuda" else torch.float32)


def conditions(pipe: Any, prompt: str, negative: str | None, count: int, size: int) -> tuple[Condition, Condition]:
    """What the network is told with the prompt and with the negative one, a row for each image."""
    encoded = pipe.encode_prompt(
        prompt=prompt,
        negative_prompt=negative,
        device=pipe.device,
        num_images_per_prompt=count,
        do_classifier_free_guidance=True,
    )
    if len(encoded) == 2:  # Stable Diffusion 1 and 2
        return {"encoder_hidden_states": encoded[0]}, {"encoder_hidden_states": encoded[1]}
    text, no_text, pooled, no_pooled = encoded
    time_ids = torch.tensor([[size, size, 0, 0, size, size]], device=pipe.device).expand(count, 6)  # size, crop, size

    def condition(states: torch.Tensor, embeds: torch.Tensor) -> Condition:
        return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": embeds, "time_ids": time_ids}}

    return condition(text, pooled), condition(no_text, no_pooled)


def with_fastsample(pipe: Any, options: argparse.Namespace, size: int, seeds: range) -> torch.Tensor:
    """Our loop: the network as a model, guided, and a plan for it. Images [B, 3, H, W] in [-1, 1]."""
    model = fs.from_diffusers(pipe.unet, pipe.scheduler)
    cond, uncond = conditions(pipe, options.prompt, options.negative, options.count, size)
    guided = fs.Guided(model, cond, uncond, scale=options.scale)
    grid = fs.grid(model.schedule, options.steps, spacing=fs.SPACINGS[options.spacing])
    plan = fs.trace(solvers.get(options.solver), grid)
    print(plan)
    shape = (pipe.unet.config.in_channels, size // pipe.vae_scale_factor, size // pipe.vae_scale_factor)
    latents = fs.sample(guided, plan, fs.noise(shape, seeds, device=pipe.device), progress=True)
    return fs.decode(pipe.vae, latents, tiled=options.tiled)


def with_the_pipeline(pipe: Any, options: argparse.Namespace, size: int, seeds: range) -> torch.Tensor:
    """The loop of diffusers: its pipeline is given our solver, and all else stays as it was."""
    config = pipe.scheduler.config
    pipe.scheduler = solvers.PlanScheduler.from_config(config, solver=options.solver, spacing=options.spacing)
    pixels: torch.Tensor = pipe(
        options.prompt,
        negative_prompt=options.negative,
        num_images_per_prompt=options.count,
        num_inference_steps=options.steps,
        guidance_scale=options.scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        height=size,
        width=size,
        output_type="pt",
    ).images
    return 2 * pixels.float() - 1


def main(arguments: list[str] | None = None) -> torch.Tensor:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--negative", help="what the images should not show")
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="a name or a folder")
    parser.add_argument("--solver", default="dpmpp_2m", choices=sorted(solvers.SOLVERS), metavar="NAME")
    parser.add_argument("--spacing", choices=sorted(fs.SPACINGS), metavar="NAME", help="Align Your Steps if left out")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--scale", type=float, default=7.5, help="of guidance: 1 is none")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next has the next")
    parser.add_argument("--count", type=int, default=1, help="images")
    parser.add_argument("--size", type=int, help="height and width in pixels; the model's own if left out")
    parser.add_argument("--tiled", action="store_true", help="decode in tiles, for large images in little memory")
    parser.add_argument("--pipeline", action="store_true", help="run diffusers' own pipeline with our scheduler")
    options = parser.parse_args(arguments)

    pipe = load(options.model, "cuda" if torch.cuda.is_available() else "cpu")
    if options.spacing is None:  # times optimised for these models: Sabour et al. 2024, arXiv:2404.14507
        options.spacing = "ays_sdxl" if pipe.unet.config.addition_embed_type == "text_time" else "ays_sd15"
    size = options.size or pipe.unet.config.sample_size * pipe.vae_scale_factor
    run = with_the_pipeline if options.pipeline else with_fastsample
    images = run(pipe, options, size, range(options.seed, options.seed + options.count))
    pixels = (images.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for i, image in enumerate(pipe.numpy_to_pil(pixels / 255)):
        image.save(f"image-{options.seed + i}.png")
        print(f"wrote image-{options.seed + i}.png")
    return images


if __name__ == "__main__":
    main()
