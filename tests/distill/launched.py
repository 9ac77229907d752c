"""What `accelerate launch` starts: python launched.py OUT METHOD STEPS SAVE_EVERY PRECISE; writes losses and weights.

The batch of an update is 32, however many processes share it, in float64 unless PRECISE is 0.
"""

import sys
from pathlib import Path

import torch
from conftest import Toy
from safetensors.torch import save_file

import fastsample as fs
from fastsample import distill

torch.set_num_threads(1)


def main(out, method, steps, save_every, precise):
    dtype = torch.float64 if precise else torch.float32
    teacher, student = (fs.Denoiser(Toy(seed=seed).to(dtype), fs.VP.scaled_linear(), "v") for seed in (0, 1))
    methods = {
        "diffusion": lambda: distill.Diffusion(student, drop=0.1, null={"class_labels": 2}),
        "conversion": lambda: distill.Conversion(student, teacher),
        "consistency": lambda: distill.ConsistencyDistillation(student, teacher),
        "progressive": lambda: distill.ProgressiveDistillation(student, teacher, steps=4),
    }
    generator = torch.Generator().manual_seed(3)
    x0 = (0.5 * torch.randn(256, 2, generator=generator)).clamp(-1, 1).to(dtype)
    labels = torch.arange(256) % 2
    loader = distill.Batches(x0, {"class_labels": labels}, size=32)
    model = distill.train(
        methods[method](), loader, steps=steps, out=out, save_every=save_every, log_every=1, ema=(0.9, 0.99), seed=5
    )
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.network.named_parameters()}
    from accelerate import PartialState

    state = PartialState()
    assert not any(hasattr(value, "to_local") for value in tensors.values())
    save_file(tensors, Path(out) / f"weights-{state.process_index}.safetensors")


if __name__ == "__main__":
    out, method, steps, save_every, precise = sys.argv[1:]
    main(out, method, int(steps), int(save_every), precise != "0")
