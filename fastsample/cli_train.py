"""`fastsample train` and `fastsample distill`: recipes from files. Like cli.py it joins the wings."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import torch
import typer
from torch import Tensor

import fastsample as fs
from fastsample import distill, solvers
from fastsample.cli_common import need, said_shortly, say
from fastsample.distill.recipe import built_in, read_recipe
from fastsample.files import folder
from fastsample.process import first_process

if TYPE_CHECKING:
    from fastsample.bench.measure import Measure
    from fastsample.distill.recipe import Recipe, Stage
    from fastsample.distill.recipe_run import Materials

RecipeName = Annotated[
    str,
    typer.Argument(help=f"A TOML file, or the name of a recipe that is built in: {', '.join(built_in())}."),
]
Out = Annotated[
    Path | None, typer.Option(file_okay=False, help="Folder of the run; without it, the recipe's own `out`.")
]
Change = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value in place of the recipe's, such as stage.consistency.updates=10; repeatable."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print what would be done, train nothing.")]
EvaluateEvery = Annotated[
    int | None, typer.Option(min=1, help="Samples, and the recipe's measure of them, every so many updates.")
]
Resume = Annotated[bool, typer.Option(help="Go on from the last checkpoint in the folder.")]
Progress = Annotated[
    bool | None, typer.Option(help="A bar; without it, on a terminal alone.", show_default=False)
]  # fmt: skip
SHOWN = 64  # samples on a picture


def distill_recipe(
    recipe: RecipeName,
    teacher: Annotated[str | None, typer.Option(help="In place of the recipe's: digits, or a folder.")] = None,
    out: Out = None,
    changes: Change = None,
    dry_run: DryRun = False,
    evaluate_every: EvaluateEvery = None,
    resume: Resume = True,
    progress: Progress = None,
) -> None:
    """Distil a student by a recipe; a killed run goes on when it is run again.

    Exit status: 0 done, 1 failed, 2 the recipe is wrong.
    """
    asked = _read(recipe, changes, teacher)
    if asked.teacher is None:
        _wrong(f"{recipe} has no [teacher] to distil from: run fastsample train {recipe}")
    _run(recipe, asked, out, dry_run, evaluate_every, resume, progress)


def train_recipe(
    recipe: RecipeName,
    out: Out = None,
    changes: Change = None,
    dry_run: DryRun = False,
    evaluate_every: EvaluateEvery = None,
    resume: Resume = True,
    progress: Progress = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates, of `train digits` alone.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the recipe's.")] = None,
) -> None:
    """Train a network by a recipe; a killed run goes on when it is run again. `digits` is the built-in network's own.

    Exit status: 0 done, 1 failed, 2 the recipe is wrong.
    """
    if recipe == "digits":
        _digits(out, steps, seed, resume, changes, dry_run, evaluate_every)
        return
    if steps is not None:
        raise typer.BadParameter("--steps is of `train digits`; give --set stage.NAME.updates=NUMBER")
    asked = _read(recipe, [*(changes or []), *([] if seed is None else [f"seed={seed}"])], None)
    if asked.teacher is not None:
        _wrong(f"{recipe} has a [teacher]: run fastsample distill {recipe}")
    _run(recipe, asked, out, dry_run, evaluate_every, resume, progress)


def _digits(
    out: Path | None, steps: int | None, seed: int | None, resume: bool, changes: Any, dry_run: bool, every: Any
) -> None:
    if changes or dry_run or every:
        raise typer.BadParameter("digits is no file; for --set, --dry-run and --evaluate-every train digits-teacher")
    need("diffusers", "accelerate", "scikit-learn")
    torch.set_num_threads(1)  # sums in one order: the seed alone decides the weights, on any number of cores
    place = out or Path("runs/digits")
    distill.train_digits(place, steps=steps or 8000, seed=seed or 0, resume=resume, progress=True)
    typer.echo(f"trained; use it with: fastsample sample --model {place / 'model'}")


def _run(
    name: str,
    recipe: Recipe,
    out: Path | None,
    dry_run: bool,
    evaluate_every: int | None,
    resume: bool,
    progress: bool | None,
) -> None:
    from fastsample.distill import recipe_run

    place = out or (Path(recipe.out) if recipe.out else None)
    if place is None and not dry_run:
        _wrong(f'{name} says not where the run goes; add out = "runs/NAME" at its top, or give --out')
    every = evaluate_every or recipe.evaluate.get("every")
    if every and recipe.plan is None:
        _wrong(f'{name} says not how to sample what is evaluated; add [plan] with solver = "ddim" and steps = 1')
    need("diffusers", "accelerate", *(["scikit-learn"] if _is_digits(recipe) else []), *(["matplotlib"] * bool(every)))
    begin = time.monotonic()
    with said_shortly():
        if dry_run:
            found = recipe_run.materials(recipe)
            _measure(recipe)
            say(_shown(name, recipe, found))
            return
        assert place is not None
        folder(place)
        measure = _measure(recipe) if every else None
        evaluate = functools.partial(_evaluations, recipe, place, measure) if every else None
        recipe_run.run_recipe(
            recipe, place, evaluate=evaluate, evaluate_every=every, resume=resume, progress=progress, say=say
        )
    say(_summary(recipe, place, time.monotonic() - begin))


def _read(name: str, changes: list[str] | None, teacher: str | None) -> Recipe:
    try:
        return read_recipe(name, solvers=solvers.SOLVERS, changes=changes or [], teacher=teacher)
    except ValueError as error:
        _wrong(str(error))


def _wrong(what: str) -> NoReturn:
    """End with 2; every process of a launcher finds the same fault, and one says it."""
    if not first_process():
        raise typer.Exit(2)
    raise typer.BadParameter(what)


def _is_digits(recipe: Recipe) -> bool:
    return "digits" in (recipe.data["from"], recipe.evaluate.get("reference"))


class Evaluation:
    """What `train` evaluates: samples of fixed noises by a plan, as a picture, and a measure of all of them."""

    def __init__(
        self,
        plan: fs.Plan,
        shape: tuple[int, ...],
        condition: Mapping[str, Tensor],
        place: Path,
        *,
        n: int,
        seed: int = 0,
        measure: Measure | None = None,
        batch: int,
    ):
        self.plan, self.shape, self.condition, self.place = plan, shape, condition, place
        self.n, self.seed, self.measure, self.batch = n, seed, measure, batch

    def __call__(self, model: fs.Denoiser, step: int) -> dict[str, float]:
        from fastsample import bench

        parts = []
        for first in range(0, self.n, self.batch):
            last = min(first + self.batch, self.n)
            noise = fs.noise(self.shape, range(self.seed + first, self.seed + last), device=_device(model))
            given = {key: value[first:last].to(noise.device) for key, value in self.condition.items()}
            parts.append(fs.sample(model, self.plan, noise, condition=given, progress=False).cpu())
        images = torch.cat(parts)
        if self.shape[0] in (1, 3):  # latents are no picture
            rows = {f"seed {self.seed + 8 * k} on": part for k, part in enumerate(images[:SHOWN].split(8))}
            bench.sample_grid(rows, self.place / f"step-{step:06d}.png")
        if self.measure is None:
            return {}
        scores = self.measure.score(self.measure.features(images))
        named = scores if isinstance(scores, Mapping) else {self.measure.name: scores}
        return {name: float(score.centre) for name, score in named.items()}


def _evaluations(
    recipe: Recipe, place: Path, measure: Measure | None, found: Materials
) -> Callable[[Stage], Evaluation]:
    """An `Evaluation` for each stage, of one measure and one set of noises for all."""
    from fastsample.distill.recipe_run import example

    assert found.plan is not None
    batch = example(found)
    shape, size = tuple(batch["x0"].shape[1:]), len(batch["x0"])
    plan, classes = found.plan, _classes(found)
    n = recipe.evaluate.get("n", 1000 if measure else SHOWN)
    if classes is not None:
        condition = {"class_labels": classes[torch.arange(n) % len(classes)]}
    else:
        rows = {key: value for key, value in batch.items() if key not in ("x0", "noise")}
        condition = {key: value[torch.arange(n) % size] for key, value in rows.items()}

    def of(stage: Stage) -> Evaluation:
        samples, seed = place / stage.name / "samples", recipe.evaluate.get("seed", 0)
        given = {**condition, **_told(recipe, stage, n)}
        return Evaluation(plan, shape, given, samples, n=n, seed=seed, measure=measure, batch=size)

    return of


def _told(recipe: Recipe, stage: Stage, n: int) -> dict[str, Tensor]:
    """The teacher's own scale of guidance, for a student that is told it."""
    from fastsample.distill.recipe_keys import used

    scales = used(stage.settings.get("scales"))
    return {} if scales is None else scales.told((recipe.teacher or {})["guidance"], n)


def _classes(found: Materials) -> Tensor | None:
    """The labels that mean a class, which samples have in turn."""
    network: Any = found.main.network
    count = getattr(network, "config", {}).get("num_class_embeds")
    null = getattr(network, "null", None)
    return None if count is None else torch.tensor([k for k in range(count) if k != null])


def _measure(recipe: Recipe) -> Measure | None:
    name, reference = recipe.evaluate.get("measure"), recipe.evaluate.get("reference")
    if name is None:
        if reference is not None:
            _wrong("reference in [evaluate] is of a measure, and there is none; add measure, such as fd_digits")
        return None
    from fastsample import checks
    from fastsample.bench.sweep_quality import MEASURES, Asked, Inception, measures

    try:
        checks.all_known([name], MEASURES, "measure in [evaluate]")
        if "reference" in MEASURES[name].needs and reference is None:
            raise ValueError(f'measure {name} in [evaluate] needs a reference, such as reference = "digits"')
        kind = MEASURES[name]
        if lacking := [key for key in kind.needs if key != "reference"]:
            raise ValueError(f"measure {name} in [evaluate] needs {lacking[0]}, which only sweeps have; take another")
    except ValueError as error:
        _wrong(str(error))
    keys = {"reference": reference} if "reference" in kind.keys and reference is not None else {}
    return measures({name: Asked(name, name, keys)}, Inception())[name]


def _device(model: fs.Denoiser) -> torch.device:
    parameters: Iterator[Tensor] = model.network.parameters()  # type: ignore[attr-defined]
    return next(parameters).device


def _shown(name: str, recipe: Recipe, found: Materials) -> str:
    """The resolved recipe, and what it will cost."""
    from fastsample.distill.recipe_run import costs

    lines = [recipe.title or name]
    for label, text in (("cost", recipe.cost), ("reaches", recipe.reaches)):
        lines += [f"{label}: {text}"] if text else []
    lines += ["", *_table(recipe.resolved()), ""]
    total = 0
    for one in costs(recipe, found):
        images = one.stage.updates * one.batch
        rows = images * (one.trained + one.asked)
        total += round(rows)
        lines.append(
            f"{one.stage.name}: {one.stage.updates} updates of {one.batch}, {images:,} images; for each image "
            f"{one.trained:g} evaluation{'s' * (one.trained != 1)} of what is trained, {one.asked:g} of the teacher"
        )
    count = sum(value.numel() for value in found.main.network.parameters())  # type: ignore[attr-defined]
    lines.append(
        f"in all {total:,} evaluations of networks of {count:,} parameters, those that are trained backwards too"
    )
    if found.plan is not None:
        lines.append(
            f"the student is sampled by {found.plan.solver} in {found.plan.nfe} evaluation{'s' * (found.plan.nfe > 1)}"
        )
    return "\n".join(lines)


def _table(values: Mapping[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in values.items():
        if value == {}:
            continue
        if isinstance(value, Mapping) and indent == "":
            lines.append(f"{key}:")
            for inner, one in value.items():
                lines.append(f"  {inner} = {_text(one)}")
        else:
            lines.append(f"{indent}{key} = {_text(value)}")
    return lines


def _text(value: Any) -> str:
    return (
        json.dumps(value) if not isinstance(value, Mapping) else ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    )


def _summary(recipe: Recipe, place: Path, seconds: float) -> str:
    lines = []
    for stage in recipe.stages:
        loss, scores = _last(place / stage.name / "log.jsonl")
        told = "".join(f", {name} {value:.4g}" for name, value in {**loss, **scores}.items())
        lines.append(f"{stage.name}: {stage.updates} updates{told}")
    model = place / "model"
    lines.append(f"done in {seconds:.0f} s: {model}")
    if "lora" in recipe.student:
        lines.append(f"its adapters, for pipe.load_lora_weights: {place / 'lora'}")
    lines.append(f"sample it with: fastsample sample --model {model}")
    lines.append(f'measure it with: fastsample bench run SWEEP.toml, a model of which has from = "{model}"')
    return "\n".join(lines)


def _last(path: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The last losses and scores of a log."""
    loss: dict[str, float] = {}
    scores: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        body = json.loads(line)
        loss = {f"loss of {name}": value for name, value in body.get("loss", {}).items()} or loss
        scores = body.get("evaluation", scores)
    return loss, scores
