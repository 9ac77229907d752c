"""The command `fastsample`. Exit status: 0 done, 1 failed (the error says why), 2 used wrongly, 130 stopped."""

from __future__ import annotations

import ast
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fastsample as fs
from fastsample import cli_bench, cli_train, solvers
from fastsample.cli_common import MODEL_HELP, OPTIONAL, class_count, load, missing, need, sample_shape

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer(
    help="Fewer steps for diffusion models: sample, print plans, train, distil, and measure latency against quality.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_bench.app, name="bench")
app.command("train")(cli_train.train_recipe)
app.command("distill")(cli_train.distill_recipe)

_Condition = dict[str, "Tensor"]
MOST_SHOWN = 500  # samples on a picture; all of them are in the .npz


def main() -> None:
    """Run the command; a failure is one line on stderr, never a traceback."""
    try:
        app()
    except SystemExit as stop:
        if stop.code == 130:  # how typer ends after Ctrl-C, without a word
            print(
                "stopped; demo, train, distill, tune and bench run go on where they were when they are run again",
                file=sys.stderr,
            )
        raise
    except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
        what = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"error: {what}", file=sys.stderr)
        sys.exit(1)


def _solver(name: str) -> str:
    try:
        solvers.get(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return name


def _spacing(name: str) -> str:
    if name not in fs.SPACINGS:
        raise typer.BadParameter(f"unknown spacing {name!r}; choose one of {', '.join(fs.SPACINGS)}")
    return name


def _picture(path: Path) -> Path:
    if path.suffix.lower() != ".png":  # the numbers go to the same name with .npz, so the ending must be our own
        raise typer.BadParameter(f"{path} is no name for the picture; end it in .png")
    return path


def _options(words: list[str] | None) -> dict[str, Any]:
    """A solver's own options from words such as order=3."""
    found: dict[str, Any] = {}
    for word in words or []:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise typer.BadParameter(f"--option is written name=value, such as order=3, got {word!r}")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value  # a word, such as variable=angle
    return found


Model = Annotated[str, typer.Option(help=MODEL_HELP)]
Solver = Annotated[
    str, typer.Option(callback=_solver, help=f"One of {', '.join(solvers.SOLVERS)}; docs/solvers.md says which when.")
]
Steps = Annotated[int, typer.Option(min=1, help="Intervals of the grid.")]
Spacing = Annotated[str, typer.Option(callback=_spacing, help=f"One of {', '.join(fs.SPACINGS)}.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the first sample; the others count on.")]
Option = Annotated[list[str] | None, typer.Option(help="An option of the solver, as name=value; may be repeated.")]
End = Annotated[float | None, typer.Option(help="Time to stop at, in the schedule's units; without it sigma = 0.")]
LowerOrderFinal = Annotated[
    bool,
    typer.Option(
        "--lower-order-final/--full-order-final", help="Let the order of multistep solvers fall over the last steps."
    ),
]
Label = Annotated[int | None, typer.Option(help="Class of every sample; without it the seeds take turns.")]
Scale = Annotated[float, typer.Option(help="Classifier-free guidance: 1 is none.")]
Null = Annotated[
    int | None, typer.Option(help="Label that means no class, for --scale, where the model does not know it.")
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures, tables and the page.")] = Path("fastsample-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples and a shorter distillation.")] = False,
) -> None:
    """Run the whole path on real digits; ends with a page to open.

    Sample in few steps, distil a student, measure latency against quality.
    """
    need("diffusers", "accelerate", "matplotlib", "scikit-learn")
    from fastsample.demo import run

    run(out, quick=quick)


@app.command()
def sample(
    context: typer.Context,
    model: Model = "digits",
    solver: Solver = "default",
    steps: Steps = 8,
    spacing: Spacing = "default_t",
    plan: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Run this saved plan; solver, steps and spacing are ignored."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many samples.")] = 20,
    option: Option = None,
    lower_order_final: LowerOrderFinal = True,
    label: Label = None,
    scale: Scale = 1.0,
    null: Null = None,
    seed: Seed = 0,
    out: Annotated[
        Path,
        typer.Option(callback=_picture, dir_okay=False, help="Picture to write; the samples go beside it as .npz."),
    ] = Path("samples.png"),
) -> None:
    """Draw samples from a model; write a picture and the numbers.

    A model that was saved with a plan, such as a student, is sampled by it, unless a solver or a grid is named.
    """
    need("diffusers", "matplotlib")
    import numpy as np

    from fastsample import bench
    from fastsample.files import folder, write

    folder(out.parent)
    network = load(model)
    if plan:
        chosen = fs.Plan.load(plan)
    elif network.plan is not None and not _named(context, "solver", "steps", "spacing", "option", "lower_order_final"):
        chosen = network.plan
        typer.echo(f"by the plan of the model: {chosen.solver}, {chosen.nfe} network evaluation{_s(chosen.nfe)}")
    else:
        chosen = _trace(network, solver, steps, spacing, _options(option), lower_order_final=lower_order_final)
    source, noise, condition = _drawn(network, range(seed, seed + count), label, scale, null)
    images = fs.sample(source, chosen, noise, condition=condition)
    write(out.with_suffix(".npz"), lambda path: np.savez(path, images=images.numpy()))
    rows = {f"seed {seed + 10 * k} on": part for k, part in enumerate(images[:MOST_SHOWN].split(10))}
    bench.sample_grid(rows, out)
    shown = f" (the first {MOST_SHOWN} samples; all are in {out.with_suffix('.npz')})" if count > MOST_SHOWN else ""
    typer.echo(f"{count} sample{_s(count)} of {chosen.nfe} network evaluation{_s(chosen.nfe)}: {out}{shown}")


plan_app = typer.Typer(no_args_is_help=False, rich_markup_mode=None)
app.add_typer(plan_app, name="plan")


@plan_app.callback(invoke_without_command=True)
def show_plan(
    context: typer.Context,
    model: Model = "digits",
    solver: Solver = "default",
    steps: Steps = 8,
    spacing: Spacing = "default_t",
    option: Option = None,
    end: End = None,
    lower_order_final: LowerOrderFinal = True,
    save: Annotated[Path | None, typer.Option(dir_okay=False, help="Also write the plan as JSON.")] = None,
) -> None:
    """Print exactly what a solver will compute; `plan pick` measures which one to take."""
    if context.invoked_subcommand is not None:
        return
    need("diffusers")
    made = _trace(load(model), solver, steps, spacing, _options(option), end, lower_order_final)
    typer.echo(str(made))
    if save:
        made.save(save)
        typer.echo(f"saved to {save}")


@plan_app.command(name="pick")
def pick_plan(
    model: Model = "digits",
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Network evaluations; may be repeated.")] = None,
    count: Annotated[int, typer.Option(min=2, help="How many noises to measure on.")] = 64,
    end: End = None,
    label: Label = None,
    scale: Scale = 1.0,
    null: Null = None,
    seed: Seed = 0,
    out: Annotated[
        Path,
        typer.Option(dir_okay=False, help="Where the best plan goes; for several --steps the number joins the name."),
    ] = Path("plan.json"),
) -> None:
    """Measure hand-made plans on a model; print the ranking and save the best."""
    need("diffusers")
    from fastsample.files import folder

    folder(out.parent)
    budgets = list(dict.fromkeys(steps or [8]))
    network = load(model)
    source, noise, condition = _drawn(network, range(seed, seed + count), label, scale, null)
    reference = solvers.converged(source, noise, end=end, condition=condition)
    for nfe in budgets:
        ranking = solvers.pick(source, nfe, noise, end=end, condition=condition, reference=reference)
        path = out if len(budgets) == 1 else out.with_stem(f"{out.stem}-{nfe}")
        ranking.best.plan.save(path)
        typer.echo(f"{ranking}\nsaved {ranking.best.name} to {path}")


@app.command()
def tune(
    model: Model = "digits",
    steps: Annotated[int, typer.Option(min=1, help="Network evaluations of the plan.")] = 8,
    count: Annotated[int, typer.Option(min=4, help="Noises; a quarter is held out. Fewer than 500 overfit.")] = 512,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for plan.json, the report and the work so far.")
    ] = Path("runs/tune"),
    coefficients: Annotated[
        bool, typer.Option("--coefficients", help="Fit all coefficients too, not the times alone.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the work in the folder.")] = True,
    end: End = None,
    label: Label = None,
    scale: Scale = 1.0,
    null: Null = None,
    seed: Seed = 0,
) -> None:
    """Fit the times of a plan to a model; a killed run goes on."""
    need("diffusers")
    network = load(model)
    source, noise, condition = _drawn(network, range(seed, seed + count), label, scale, null)
    tuned = solvers.tune(
        source,
        steps,
        noise,
        coefficients=coefficients,
        out=out,
        resume=resume,
        end=end,
        condition=condition,
        say=lambda line: typer.echo(line, err=True),
    )
    typer.echo(f"{tuned}\nuse it with: fastsample sample --plan {out / 'plan.json'}")


@app.command()
def doctor() -> None:
    """Show what is installed and what is missing.

    How to get what is missing, and whether the built-in network is whole.
    """
    import torch

    typer.echo(
        f"fastsample {fs.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    typer.echo(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {cuda}")
    for package, extra in OPTIONAL.items():
        remedy = f"missing: pip install 'fastsample[{extra}]'"
        typer.echo(f"  {package:<14} {remedy if missing(package) else importlib.metadata.version(package)}")
    if missing("diffusers"):
        typer.echo("  built-in digits network: not tried without diffusers")
    else:
        load("digits")
        typer.echo("  built-in digits network: whole")
    typer.echo(f"  {cli_bench.inception()}")


def _named(context: typer.Context, *options: str) -> bool:
    """Whether the user wrote one of these options."""
    sources = [context.get_parameter_source(name) for name in options]
    return any(source is not None and source.name != "DEFAULT" for source in sources)


def _s(count: int) -> str:
    return "s" if count > 1 else ""


def _conditions(
    model: fs.Denoiser, seeds: range, label: int | None, null: int | None
) -> tuple[_Condition, tuple[int, ...]]:
    """The conditions of these seeds, and the shape of one sample."""
    import torch

    shape, count = sample_shape(model), class_count(model)
    if count is None:
        if label is not None or null is not None:
            raise typer.BadParameter("the model takes no class labels; leave out --label and --null")
        return {}, shape
    for name, given in (("--label", label), ("--null", null)):
        if given is not None and not 0 <= given < count:
            raise typer.BadParameter(f"{name} {given} is not one of the model's labels, 0 to {count - 1}")
    classes = [k for k in range(count) if k != null]
    labels = [classes[seed % len(classes)] if label is None else label for seed in seeds]
    return {"class_labels": torch.tensor(labels)}, shape


def _drawn(
    network: fs.Denoiser, seeds: range, label: int | None, scale: float, null: int | None
) -> tuple[fs.Model, fs.Noise, _Condition]:
    """The model with its guidance, the noises and the conditions of these seeds."""
    null = getattr(network.network, "null", None) if null is None else null
    condition, shape = _conditions(network, seeds, label, null)
    if scale == 1:
        return network, fs.noise(shape, seeds), condition
    if not condition or null is None:
        need = "a model with class labels" if not condition else "--null, the label that means no class"
        raise typer.BadParameter(f"--scale {scale:g} needs {need}")
    return fs.Guided(network, uncond={"class_labels": null}, scale=scale), fs.noise(shape, seeds), condition


def _trace(
    model: fs.Denoiser,
    solver: str,
    steps: int,
    spacing: str,
    options: dict[str, Any],
    end: float | None = None,
    lower_order_final: bool = False,
) -> fs.Plan:
    grid = fs.grid(model.schedule, steps, fs.SPACINGS[spacing], end=end, lower_order_final=lower_order_final)
    return fs.trace(solvers.get(solver), grid, **options)


if __name__ == "__main__":
    main()
