"""LCM-LoRA: distil Stable Diffusion 1.5 into an adapter of 67 million numbers that samples in 4 steps, unguided.

python examples/lcm_lora.py photos --steps 1000 --out runs/lcm-lora    # photos: 1.jpg and its prompt 1.txt, 2.png, ...
python examples/lcm_lora.py photos --model path/to/a/saved/pipeline --prompt "a lighthouse at dusk"

A run that was stopped goes on when started again. Use the adapter in any pipeline of diffusers:
    pipe.load_lora_weights("runs/lcm-lora"); pipe.scheduler = LCMScheduler.from_pretrained("runs/lcm-lora")
    pipe(prompt, num_inference_steps=4, guidance_scale=1)
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageOps

import fastsample as fs
from fastsample import distill, solvers


def load(name: str, device: str) -> Any:
    try:
        pipe = StableDiffusionPipeline.from_pretrained(name, safety_checker=None)
    except (OSError, ValueError) as error:  # the hub is out of reach, or there is no such folder
        why = " ".join(str(error).split()).split(". ")[0].split(" (")[0]
        sys.exit(
            f"could not load {name} from this disk or huggingface.co: {why}. Offline? Pass --model with the folder of "
            f"a pipeline saved with save_pretrained."
        )
    return pipe.to(device)


def images_of(folder: Path) -> list[Path]:
    kinds = {".jpg", ".jpeg", ".png", ".webp"}
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in kinds)
    if not paths:
        sys.exit(
            f"{folder} holds no image ({', '.join(sorted(kinds))}); give a folder with some, and a .txt beside each"
        )
    return paths


@torch.no_grad()
def encoded(pipe: Any, paths: list[Path], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of the images [N, 4, h, w], and their prompts as the network is told them [N, L, C]."""
    latents, words = [], []
    for path in paths:
        image = ImageOps.fit(Image.open(path).convert("RGB"), (size, size))
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
        latents.append(fs.encode(pipe.vae, pixels / 127.5 - 1).cpu())
        beside = path.with_suffix(".txt")
        prompt = beside.read_text(encoding="utf-8").strip() if beside.exists() else ""
        words.append(pipe.encode_prompt(prompt, pipe.device, 1, False)[0].float().cpu())
    return torch.cat(latents), torch.cat(words)


def main(arguments: list[str] | None = None) -> torch.Tensor:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of images, each with its prompt in a .txt of its name")
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="a name or a folder")
    parser.add_argument("--out", type=Path, default=Path("runs/lcm-lora"))
    parser.add_argument("--steps", type=int, default=1000, help="updates")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--scale", type=float, default=7.5, help="of the guidance that the student shall have in it")
    parser.add_argument("--size", type=int, help="height and width in pixels; the model's own if left out")
    parser.add_argument("--prompt", default="a lighthouse at dusk", help="of the image that is drawn at the end")
    options = parser.parse_args(arguments)

    paths = images_of(options.images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load(options.model, device)
    size = options.size or pipe.unet.config.sample_size * pipe.vae_scale_factor
    latents, words = encoded(pipe, paths, size)
    batches = distill.Batches(latents, {"encoder_hidden_states": words}, size=options.batch, bounded=False)
    with torch.no_grad():
        prompt, empty = (pipe.encode_prompt(text, device, 1, False)[0] for text in (options.prompt, ""))

    teacher = fs.from_diffusers(pipe.unet, pipe.scheduler)
    guided = fs.Guided(teacher, uncond={"encoder_hidden_states": empty}, scale=options.scale)
    student = distill.bounded(distill.lora_student(teacher, options.rank), "lcm")
    student = distill.train(
        distill.LatentConsistency(student, guided),
        batches,
        steps=options.steps,
        lr=options.lr,
        optimizer="AdamW",
        schedule="constant",
        out=options.out,
        precision="bf16" if device == "cuda" else None,
    )
    print(f"wrote {distill.save_lora(student, options.out)}")
    distill.lcm_scheduler(student).save_pretrained(options.out)

    plan = fs.trace(solvers.consistency, fs.grid(student.schedule, 4, distill.skipping()))
    noise = fs.noise(latents.shape[1:], seeds=[0], device=device)
    image = fs.decode(pipe.vae, fs.sample(student, plan, noise, condition={"encoder_hidden_states": prompt}))
    pixels = (image[0] * 127.5 + 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(options.out / "image.png")
    print(f"wrote {options.out / 'image.png'}")
    return image


if __name__ == "__main__":
    main()
