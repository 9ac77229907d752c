"""Sample an unconditional diffusers pipeline in 10 network evaluations instead of 1000.

python examples/fewer_steps.py                          # google/ddpm-cifar10-32, from the Hugging Face hub
python examples/fewer_steps.py path/to/a/saved/pipeline
"""

import sys

import torch
from diffusers import DDPMPipeline

import fastsample as fs
from fastsample import solvers


def main(name: str = "google/ddpm-cifar10-32", steps: int = 10) -> torch.Tensor:
    try:
        pipe = DDPMPipeline.from_pretrained(name)
    except (OSError, ValueError) as error:  # the hub is out of reach, or there is no such folder
        sys.exit(f"could not load {name}: {error}\nOffline? Pass the folder of a pipeline saved with save_pretrained.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = fs.from_diffusers(pipe.unet.to(device).eval(), pipe.scheduler)
    plan = fs.trace(solvers.dpmpp_2m, fs.grid(model.schedule, steps))
    print(plan)
    shape = (pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    images = fs.sample(model, plan, fs.noise(shape, seeds=range(16), device=device), progress=True)
    pixels = (images.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for i, image in enumerate(pipe.numpy_to_pil(pixels / 255)):
        image.save(f"sample-{i:02}.png")
    print(f"wrote sample-00.png to sample-{len(images) - 1:02}.png")
    return images


if __name__ == "__main__":
    main(*sys.argv[1:2])
