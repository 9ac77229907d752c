"""The host cost of a step: `fs.sample` and `PlanScheduler.step` beside four schedulers of diffusers, one CPU thread.

    python bench/studies/scheduler_overhead.py     # writes bench/results/scheduler_overhead.md

The network returns a tensor made beforehand, so that what is left is the loop. Each trio runs the same solver at the
same number of steps in palindromic rounds; CPU time; what is asked for once before a run (plans, `set_timesteps`) is
not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsample as fs
from fastsample import solvers
from fastsample.bench.environment import environment
from fastsample.bench.latency import Times
from fastsample.bench.overhead import SHAPES, STEPS, _cpu_seconds, _per_step, _ratio
from fastsample.files import write_text

PAIRS = {
    "DDIMScheduler": ("ddim", {"clip_sample": False, "timestep_spacing": "trailing"}),
    "EulerDiscreteScheduler": ("euler", {"timestep_spacing": "trailing"}),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", {}),
    "UniPCMultistepScheduler": ("unipc_2", {}),
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
HEADS = ("fs.sample", "PlanScheduler.step", "diffusers", "fs.sample / diffusers", "PlanScheduler / diffusers")
Loop = Callable[[], Tensor]


def trio(name: str, shape: tuple[int, ...]) -> dict[str, Loop]:
    import diffusers

    solver, settings = PAIRS[name]
    theirs: Any = getattr(diffusers, name)(**BETAS, **settings)
    ours: Any = solvers.PlanScheduler.from_config(theirs.config, solver=solver)
    noise, eps = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    model = fs.Denoiser(lambda x, t: eps, fs.VP.scaled_linear())
    ours.set_timesteps(STEPS)
    theirs.set_timesteps(STEPS)
    fresh = {key: _copied(value) for key, value in vars(theirs).items()}

    def whole() -> Tensor:
        return fs.sample(model, ours.plan, noise)

    @torch.no_grad()
    def stepped() -> Tensor:
        x = noise * ours.init_noise_sigma
        for t in ours.timesteps:
            x = ours.step(eps, t, ours.scale_model_input(x, t)).prev_sample
        return x

    @torch.no_grad()
    def diffusers_loop() -> Tensor:
        for key, value in fresh.items():  # as set_timesteps leaves it
            setattr(theirs, key, _copied(value))
        x = noise * theirs.init_noise_sigma
        for t in theirs.timesteps:
            theirs.scale_model_input(x, t)
            x = theirs.step(eps, t, x).prev_sample
        return x

    return {"fs.sample": whole, "PlanScheduler": stepped, "diffusers": diffusers_loop}


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def measure(candidates: dict[str, Loop], rounds: int) -> dict[str, Times]:
    whole, stepped, theirs = (loop() for loop in candidates.values())
    torch.testing.assert_close(whole, stepped, rtol=1e-4, atol=1e-4)
    if not theirs.isfinite().all():
        raise AssertionError("diffusers' loop is not finite")
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for k in range(-10, rounds):  # the first ones warm up
        for name in [*candidates, *reversed(candidates)]:
            seconds = _cpu_seconds(candidates[name])
            if k >= 0:
                samples[name].append(seconds)
    return {name: Times(tuple(times)) for name, times in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Host cost of a step beside diffusers' schedulers.")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "scheduler_overhead.md")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    machine = environment()
    lines = [
        "# The host cost of a step beside diffusers' schedulers",
        "",
        f"The same solver, {STEPS} steps, float32, one thread, a network that costs nothing. CPU time of a step in us,",
        f"medians of {2 * asked.rounds} runs, quartiles in brackets; ratios: medians over {asked.rounds} palindromic",
        "rounds, with the 95% interval of the median.",
        "",
        f"| scheduler | latents | {' | '.join(HEADS)} |",
        f"| --- | --- |{' --- |' * len(HEADS)}",
    ]
    for name in PAIRS:
        for shape in SHAPES:
            times = measure(trio(name, shape), asked.rounds)
            whole, stepped, theirs = times.values()
            cells = [*map(_per_step, times.values()), _ratio(whole, theirs), _ratio(stepped, theirs)]
            lines.append(f"| {name} | {list(shape)} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    lines += [
        "",
        f"{machine['cpu']}, {machine['cores']} cores shared with other work; Python {machine['python']}, torch",
        f"{machine['torch']}, diffusers {version('diffusers')}. Made by `python bench/studies/scheduler_overhead.py`.",
    ]
    write_text(asked.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
