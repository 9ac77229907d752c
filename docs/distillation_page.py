"""Measures students of the built-in digits, for docs/distillation.md: trains and samples them, writes their scores.

    python docs/distillation_page.py

What is there from an earlier call is not done again, and a training that was stopped goes on. Students may be trained
by calls of their own (`--seeds 0 --methods progressive`); the page is written by the one that finds all of them done.
Times are CPU time of one thread; what a call lost that was killed is not in them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastsample as fs
from fastsample import bench, distill, files, solvers, zoo
from fastsample.zoo.data import digits
from fastsample.zoo.digits import NULL

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs" / "distillation.md", ROOT / "docs" / "distillation.png"
BEGIN, END = "<!-- measured: python docs/distillation_page.py -->", "<!-- end of measured -->"

SEEDS, N, BATCH, SHOWN = (0, 1, 2), 10_000, 500, 16
STEPS = (1, 2, 4, 8)
DONE = "done.json"
SPACING = fs.power_t(1.5)  # of both methods: DDIM in few steps is nearer to its own limit there than on uniform_t
CONVERSION: dict[str, Any] = {"steps": 1000, "lr": 2e-3, "warmup": 50}
ROUNDS: dict[int, int] = {16: 400, 8: 500, 4: 700, 2: 1100, 1: 1600}  # steps of the student: updates
PROGRESSIVE: dict[str, Any] = {"lr": 1e-3, "warmup": 20}
CONSISTENCY: dict[str, Any] = {"times": 32, "distance": "l2", "steps": 4800, "lr": 1e-3, "warmup": 20}
DROP: dict[str, Any] = {"drop": 0.1, "null": {"class_labels": NULL}}


@dataclass(frozen=True)
class Way:
    """How a model is sampled: one row of the table at one number of steps. paired: it adds no noise on the way."""

    label: str
    solver: Callable[..., Any]
    spacing: Any
    paired: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def plan(self, model: fs.Denoiser, steps: int) -> fs.Plan:
        plan = fs.trace(self.solver, fs.grid(model.schedule, steps, self.spacing, **self.options))
        assert plan.nfe == steps, "rows of the table have equal numbers of evaluations"
        return plan


DDIM = Way("DDIM", solvers.ddim, SPACING)
TEACHER = Way("DDIM, uniform_t", solvers.ddim, fs.uniform_t)  # its 50 steps are the unit of the table
LATE = Way("DDIM, power_t(3.0)", solvers.ddim, fs.power_t(3.0))  # a consistency student's second step may come late
AGAIN = Way("re-noising", solvers.consistency, SPACING, paired=False)
SAMPLERS = {"progressive": [DDIM], "consistency": [DDIM, LATE, AGAIN]}
BASELINES = [
    TEACHER,
    DDIM,
    Way("default", solvers.default, fs.default_t, options={"lower_order_final": True}),
    Way("dpmpp_2m, karras", solvers.dpmpp_2m, fs.karras),
    Way("dpmpp_2m, uniform_lam", solvers.dpmpp_2m, fs.uniform_lam),
]


def progressive(teacher: fs.Denoiser, out: Path, seed: int, share: float, **options: Any) -> None:
    """A student of 16, 8, 4, 2 and 1 steps, each in a folder of its own."""
    student = converted(teacher, out, seed, share, **options)
    distill.progressive(
        teacher,
        loader(),
        student=student,
        conversion=0,
        rounds=tuple(ROUNDS),
        updates=[scaled(updates, share) for updates in ROUNDS.values()],
        spacing=SPACING,
        out=out,
        save=fs.save_pretrained,
        seed=seed,
        **DROP,
        **PROGRESSIVE,
        **options,
    )


def consistency(teacher: fs.Denoiser, out: Path, seed: int, share: float, **options: Any) -> None:
    """One student for all steps."""
    student = converted(teacher, out, seed, share, **options)
    given = {**CONSISTENCY, "steps": scaled(CONSISTENCY["steps"], share)}
    method = distill.ConsistencyDistillation(
        student, teacher, spacing=SPACING, distance=given.pop("distance"), times=given.pop("times"), **DROP
    )
    trained = distill.train(method, loader(), out=out / "consistency", seed=seed, **given, **options)
    fs.save_pretrained(trained, out / "model")


METHODS: dict[str, Callable[..., None]] = {"progressive": progressive, "consistency": consistency}


def converted(teacher: fs.Denoiser, out: Path, seed: int, share: float, **options: Any) -> fs.Denoiser:
    """A student that predicts v, where the teacher predicts eps."""
    student = distill.student_of(teacher, predicts="v")
    method = distill.Conversion(student, teacher, **DROP)
    given = {**CONVERSION, "steps": scaled(CONVERSION["steps"], share)}
    return distill.train(method, loader(), out=out / "conversion", seed=seed, **given, **options)


def loader() -> distill.Batches:
    images, labels = digits("train")
    return distill.Batches(images, {"class_labels": labels})


def scaled(updates: int, share: float) -> int:
    return max(1, round(updates * share))


def settings(method: str, share: float) -> dict[str, Any]:
    """What the students of a folder were trained by, as JSON has it."""
    rounds = {str(steps): scaled(updates, share) for steps, updates in ROUNDS.items()}
    own: dict[str, Any] = {
        "progressive": {"rounds": rounds, **PROGRESSIVE},
        "consistency": {**CONSISTENCY, "updates": scaled(CONSISTENCY["steps"], share)},
    }
    shared = {"conversion": CONVERSION, "drop": DROP, "spacing": getattr(SPACING, "__name__", "")}
    return {"share": share, **shared, method: own[method]}


def is_done(folder: Path, method: str, share: float) -> bool:
    """Whether the students in a folder are trained. Raises ValueError where that was by other settings."""
    path = folder / DONE
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    if found != settings(method, share):
        raise ValueError(f"{path} was trained by other settings, {found}; remove {folder} or take another --out")
    return True


def student(out: Path, method: str, seed: int, steps: int) -> fs.Denoiser:
    folder = out / f"{method}-{seed}"
    return fs.from_pretrained((folder / f"steps-{steps}" if method == "progressive" else folder) / "model")


@contextmanager
def cpu_seconds(path: Path) -> Iterator[None]:
    """Adds the CPU time of what runs inside to the number in a file, also where it is interrupted."""
    begin = time.process_time()
    try:
        yield
    finally:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else 0.0
        files.write_text(path, f"{before + time.process_time() - begin:.1f}\n")


@dataclass(frozen=True)
class Measurement:
    """Samples of equal noises, and what they score beside the teacher's 50 steps; all of it kept in a folder."""

    out: Path
    n: int
    teacher: fs.Denoiser

    @cached_property
    def distances(self) -> dict[str, bench.FrechetTo]:
        real = digits("all")[0]
        return {"fd_digits": bench.fd_digits(real), "fd_pixels": bench.fd_pixels(real)}

    @cached_property
    def unit(self) -> Tensor:
        """The teacher's 50 steps of DDIM."""
        return self.samples("teacher-50", self.teacher, TEACHER, 50, kept=self.n)

    @cached_property
    def of_unit(self) -> tuple[float, Tensor]:
        """The debiased distance of the unit, and how much each sample moves it."""
        distance = self.distances["fd_digits"]
        features = distance.features(self.unit)
        return float(distance.score(features).debiased or math.nan), distance.influence(features)

    def samples(self, name: str, model: fs.Denoiser, way: Way, steps: int, *, kept: int) -> Tensor:
        """[n, 1, 8, 8], of which the first `kept` are written; read where there are enough of them."""
        path = self.out / f"{name}.npy"
        if path.exists() and kept == self.n:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        plan, parts = way.plan(model, steps), []
        for k in range(0, self.n, BATCH):
            seeds = range(k, min(k + BATCH, self.n))
            labels = torch.tensor([seed % 10 for seed in seeds])
            noise = fs.noise((1, 8, 8), seeds=seeds)
            parts.append(fs.sample(model, plan, noise, condition={"class_labels": labels}, progress=False))
        made = torch.cat(parts)
        files.write(path.with_suffix(".npy"), lambda temporary: np.save(temporary, made[:kept].numpy()))
        return made

    def cell(self, name: str, model: Callable[[], fs.Denoiser], way: Way, steps: int) -> dict[str, float]:
        """The scores of a model that is sampled in one way, made once."""
        path = self.out / f"{name}-{way.label.replace(', ', '-')}-{steps}.json"
        if not path.exists():
            images = self.samples(path.stem, model(), way, steps, kept=min(SHOWN, self.n))
            files.write_text(path, json.dumps(self.scores(images, paired=way.paired)) + "\n")
        found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def scores(self, images: Tensor, *, paired: bool = True) -> dict[str, float]:
        distance = self.distances["fd_digits"]
        features = distance.features(images)
        score = distance.score(features)
        unit, moves = self.of_unit
        ratio = float(score.debiased or math.nan) / unit
        # of the same noises, so most of what moves the one moves the other
        moved = distance.influence(features) - ratio * moves
        found = {
            "fd": float(score.debiased or math.nan),
            "se": float(score.se or math.nan),
            "ratio": ratio,
            "ratio_se": float(moved.std()) / (abs(unit) * math.sqrt(len(moved))),
            "fd_pixels": float(self.distances["fd_pixels"](images).debiased or math.nan),
        }
        return {**found, "rms": float(bench.endpoint_rms(images, self.unit).value)} if paired else found

    def first(self, name: str, way: Way, steps: int) -> Tensor:
        return torch.from_numpy(np.load(self.out / f"{name}-{way.label.replace(', ', '-')}-{steps}.npy"))[:SHOWN]


def run(
    out: Path, seeds: Sequence[int], methods: Sequence[str], *, n: int, share: float, progress: bool | None
) -> str | None:
    """Train and measure the students of these seeds and methods; the tables, once all students are there."""
    torch.set_num_threads(1)
    teacher = zoo.digits()
    for seed in seeds:
        for name in methods:
            folder = files.folder(out / f"{name}-{seed}")
            if not is_done(folder, name, share):
                with cpu_seconds(folder / "cpu_seconds.json"):
                    METHODS[name](teacher, folder, seed, share, progress=progress)
                files.write_text(folder / DONE, json.dumps(settings(name, share)) + "\n")
            print(f"{name}, seed {seed}: {_minutes(folder):.1f} CPU minutes", flush=True)
    measured = Measurement(files.folder(out / f"measured-{n}"), n, teacher)
    for seed in seeds:
        for name in methods:
            for way in SAMPLERS[name]:
                for steps in STEPS:
                    found = measured.cell(f"{name}-{seed}", partial(student, out, name, seed, steps), way, steps)
                    print(f"{name}, seed {seed}, {way.label}, {steps}: {_multiple(found)}", flush=True)
    missing = [
        f"{name}-{seed}" for seed in SEEDS for name in METHODS if not is_done(out / f"{name}-{seed}", name, share)
    ]
    if missing:
        print(f"no table yet: these are not trained: {', '.join(missing)}")
        return None
    return tables(out, measured)


def tables(out: Path, measured: Measurement) -> str:
    teacher, n = measured.teacher, measured.n
    rows: dict[str, list[list[dict[str, float]]]] = {}  # label: by steps, by seed
    for way in BASELINES:
        rows[f"teacher, {way.label}"] = [[measured.cell("teacher", lambda: teacher, way, s)] for s in STEPS]
    for name, ways in SAMPLERS.items():
        for way in ways:
            rows[f"{name}, {way.label}"] = [
                [measured.cell(f"{name}-{seed}", partial(student, out, name, seed, s), way, s) for seed in SEEDS]
                for s in STEPS
            ]
    fifty = {way.label: measured.cell("teacher", lambda: teacher, way, 50) for way in (TEACHER, DDIM)}
    unit = fifty[TEACHER.label]
    heads = " | ".join(f"{steps} step{'s' if steps > 1 else ''}" for steps in STEPS)
    minutes = {name: ", ".join(f"{_minutes(out / f'{name}-{seed}'):.1f}" for seed in SEEDS) for name in METHODS}
    lines = [
        f"![Samples of the teacher in 50 steps and of the students, from the same noises]({PICTURE.name})",
        "",
        f"The teacher's 50 steps of DDIM, the unit, have fd_digits {unit['fd']:.3f} ± {unit['se']:.3f} (debiased, "
        f"n = {n}; fd_pixels {unit['fd_pixels']:.3f}); on {DDIM.plan(teacher, 1).spacing} they have "
        f"{fifty[DDIM.label]['ratio']:.2f} of it. Noises are those of seeds 0 to {n - 1}, the same in every cell, "
        f"classes in turns, without guidance. DDIM without a spacing is on {DDIM.plan(teacher, 1).spacing}.",
        "",
        "**fd_digits as multiples of the unit**; of students the mean of three training seeds and their range, of the "
        "teacher ± one standard error, as the noises are shared:",
        "",
        f"| | {heads} |",
        "| --- |" + " --- |" * len(STEPS),
        *(f"| {label} | {' | '.join(_cell(cells) for cells in row)} |" for label, row in rows.items()),
        "",
        f"**fd_digits ± standard error / fd_pixels / paired RMS** to the unit, from the same noises (students: seed "
        f"{SEEDS[0]}):",
        "",
        f"| | {heads} |",
        "| --- |" + " --- |" * len(STEPS),
        *(f"| {label} | {' | '.join(_numbers(cells[0]) for cells in row)} |" for label, row in rows.items()),
        "",
        "CPU minutes of one thread, conversion included, by training seed: "
        + "; ".join(f"{name} {told}" for name, told in minutes.items())
        + f". torch {torch.__version__}.",
    ]
    pictures = {"teacher 50": measured.unit[:SHOWN]}
    for steps in STEPS:
        for name, ways in SAMPLERS.items():
            for way in ways[: 1 if steps == 1 else None]:
                label = f"{name} {steps}{'' if way is DDIM else ' ' + way.label}"
                pictures[label] = measured.first(f"{name}-{SEEDS[0]}", way, steps)
    bench.sample_grid(pictures, out / "samples.png")
    return "\n".join(lines) + "\n"


def _cell(cells: Sequence[dict[str, float]]) -> str:
    if len(cells) == 1:
        return _multiple(cells[0])
    ratios = [one["ratio"] for one in cells]
    return f"**{statistics.mean(ratios):.2f}** ({min(ratios):.2f} .. {max(ratios):.2f})"


def _multiple(found: dict[str, float]) -> str:
    return f"{found['ratio']:.2f} ± {found['ratio_se']:.2f}"


def _numbers(found: dict[str, float]) -> str:
    rms = f"{found['rms']:.3f}" if "rms" in found else "-"
    return f"{found['fd']:.2f} ± {found['se']:.2f} / {found['fd_pixels']:.3f} / {rms}"


def _minutes(folder: Path) -> float:
    return float(json.loads((folder / "cpu_seconds.json").read_text(encoding="utf-8"))) / 60


def placed(page: str, tables: str) -> str:
    """The page with the tables between its marks; at its end where it has none."""
    if BEGIN not in page:
        return f"{page.rstrip()}\n\n{BEGIN}\n\n{tables}\n{END}\n".lstrip()
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{PAGE} has {BEGIN} and no {END} after it; put it back")
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "distillation", help="folder of students, samples")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, choices=SEEDS, help="of the training")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--updates", type=float, default=1.0, help="share of the updates; below 1 no page is written")
    parser.add_argument("-n", type=int, default=N, help=f"samples; other than {N} no page is written")
    parser.add_argument("--quiet", action="store_true", help="no bars")
    given = parser.parse_args()
    progress = False if given.quiet else None
    found = run(given.out, given.seeds, given.methods, n=given.n, share=given.updates, progress=progress)
    if found is None:
        return
    files.write_text(given.out / "tables.md", found)
    print(found)
    if given.updates == 1 and given.n == N:
        page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Distillation\n"
        files.write_text(PAGE, placed(page, found))
        files.write(PICTURE, lambda temporary: temporary.write_bytes((given.out / "samples.png").read_bytes()))
        print(f"wrote {PAGE.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
