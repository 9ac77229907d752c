"""A recipe at work: its networks, its data, its stages one after another, and the student at the end."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastsample import files
from fastsample.adapters.diffusers import Sampled, from_diffusers
from fastsample.adapters.pretrained import MANIFEST, from_pretrained, save_pretrained
from fastsample.denoiser import Denoiser, Model
from fastsample.grid import grid
from fastsample.guidance import Guided
from fastsample.plan import Plan
from fastsample.process import first_process, using_threads
from fastsample.schedule import EDM, VP, Flow, Schedule
from fastsample.spacing import uniform_t
from fastsample.tracing import trace
from fastsample.zoo.digits import digits, digits_network

from .boundary import bounded, edm_model
from .checkpoint import differences
from .conversion import student_of
from .data import Stream
from .latent import skipping
from .lora import lora_student, merged, save_lora
from .method import Batch, Method, asked
from .recipe import Recipe, Stage
from .recipe_data import SOURCES, tensors
from .recipe_keys import METHODS, MODELS, OTHERWISE, used
from .scale import Scales, scaled_student
from .trainer import Evaluate, train

RECIPE = "recipe.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Materials:
    """What the stages work on. main: the denoiser below the teacher's guidance, or the network that is trained.

    first: makes the network that the first stage trains, anew each time.
    """

    teacher: Model | None
    main: Denoiser
    first: Callable[[], Denoiser]
    loader: Iterable[Batch]
    plan: Plan | None


@dataclass(frozen=True)
class Cost:
    """Of one stage: rows of a batch, and rows that the networks in training and the teacher are asked for an image."""

    stage: Stage
    batch: int
    trained: float
    asked: float


def run_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    evaluate: Callable[[Materials], Callable[[Stage], Evaluate]] | None = None,
    evaluate_every: int | None = None,
    resume: bool = True,
    progress: bool | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Denoiser:
    """Run all stages into folders of `out`; the student, with what it was trained for, is written to `out`/model.

    The same call again goes on where it was stopped, in a stage or between two, with the weights of an uninterrupted
    run. Under `accelerate launch` every process calls it, and the first one writes.

    evaluate: of the networks and the data, a function that makes for each stage what `train` evaluates every
        `evaluate_every` updates.
    Raises ValueError where `out` holds the work of another recipe, naming what differs.
    """
    folder = files.folder(out)
    _begun(recipe, folder)
    with using_threads(recipe.threads):
        found = materials(recipe, folder)
        for _ in _walk(recipe, found, lambda stage, method: next(iter(method.roles.values()))):
            pass  # what does not fit together is said before the first update
        _begin(recipe, folder)
        evaluates = None if evaluate is None else evaluate(found)

        def trained(stage: Stage, method: Method) -> Denoiser:
            say(f"{stage.name}: {stage.method}, {stage.updates} updates")
            options = _options(stage)
            if evaluates is not None:
                options |= {"evaluate": evaluates(stage), "evaluate_every": evaluate_every or stage.updates}
            return train(
                method,
                found.loader,
                steps=stage.updates,
                out=folder / stage.name,
                seed=stage.seed,
                resume=resume,
                progress=progress,
                **options,
            )

        *_, (_, student) = _walk(recipe, found, trained)
        if first_process():
            _save(recipe, found, student, folder)
    return student


def materials(recipe: Recipe, out: Path | None = None) -> Materials:
    """The networks and the data of a recipe. Raises FileNotFoundError or ValueError where one is missing or wrong.

    out: the folder of the run, where data that are made once go; None makes none, for what only tries the recipe.
    """
    if recipe.teacher is not None:
        main = _teacher(recipe.teacher)
        teacher: Model | None = _guided(main, recipe.teacher)
        first = functools.partial(_student, main, recipe.student)
    else:
        assert recipe.network is not None
        first = functools.partial(_network, recipe.network, recipe.seed)
        main, teacher = first(), None
    source = SOURCES[recipe.data["from"]]
    given = {key: used(value) for key, value in recipe.data.items() if key != "from"}
    inside = {"teacher": teacher or main, "out": out, "solvers": recipe.solvers}
    names = _arguments(source)
    loader = source(**given, **{key: value for key, value in inside.items() if key in names})
    return Materials(teacher, main, first, loader, _plan(recipe, main.schedule))


def costs(recipe: Recipe, found: Materials) -> list[Cost]:
    """What each stage asks of the networks, counted on two images; nothing is trained."""
    batch = example(found)
    few = {key: value[:2] for key, value in batch.items()}
    rows = []

    def count(stage: Stage, method: Method) -> Denoiser:
        own, frozen = list(method.roles.values()), list(method.frozen)
        device = next(iter(own[0].network.parameters())).device  # type: ignore[attr-defined]
        before = [model.count.rows for model in own], [model.count.rows for model in frozen]
        turns = [name for step in range(5) for name in method.turns(step)]
        moved = {key: value.to(device) for key, value in few.items()}
        with torch.no_grad():
            for name in turns:
                method.loss(name, moved, 0)
        spent = [
            sum(model.count.rows - old for model, old in zip(models, olds)) / (5 * len(few["x0"]))
            for models, olds in zip((own, frozen), before)
        ]
        rows.append(Cost(stage, len(batch["x0"]), *spent))
        return own[0]

    with torch.random.fork_rng(devices=[]):
        for _ in _walk(recipe, found, count):
            pass
    return rows


def _walk(
    recipe: Recipe, found: Materials, done: Callable[[Stage, Method], Denoiser]
) -> Iterator[tuple[Stage, Denoiser]]:
    """Each stage, with the student that `done` makes of its method."""
    student = found.first()
    for stage in recipe.stages:
        teacher: Model | None = found.teacher
        if stage.previous:
            teacher, student = student, student_of(student)
        try:
            method = _method(stage, student, teacher)
        except (ValueError, TypeError) as error:
            raise type(error)(f"[stage.{stage.name}]: {error}") from error
        student = done(stage, method)
        yield stage, student


def _method(stage: Stage, student: Denoiser, teacher: Model | None) -> Method:
    kind = METHODS[stage.method]
    own: dict[str, Any] = {"student": student, "model": student, "teacher": teacher}
    names = [name for name in _arguments(kind) if name in MODELS]
    if "critic" in names:
        own["critic"] = student_of(asked(teacher)[0] if teacher is not None else student)
    models = {name: own[name] for name in names if own[name] is not None}
    return kind(**models, **{OTHERWISE.get(key, key): used(value) for key, value in stage.settings.items()})


def _options(stage: Stage) -> dict[str, Any]:
    options = {key: used(value) for key, value in stage.options.items()}
    given = options.get("optimizer")
    if isinstance(given, Mapping):
        settings = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items() if key != "name"}
        options["optimizer"] = functools.partial(getattr(torch.optim, str(given["name"])), **settings)
    return options


def _arguments(made: Callable[..., Any]) -> list[str]:
    import inspect

    return list(inspect.signature(made).parameters)


def _teacher(asked: Mapping[str, Any]) -> Denoiser:
    source, folder = str(asked["from"]), Path(str(asked["from"]))
    if source == "digits":
        model = digits()
    elif (folder / MANIFEST).is_file():
        model = from_pretrained(folder)
    elif (folder / "model_index.json").is_file():
        model = _of_pipeline(folder)
    elif folder.is_dir():
        raise FileNotFoundError(
            f"the teacher's folder {folder} holds neither a {MANIFEST} nor a model_index.json: give one written by "
            f"fs.save_pretrained, or a diffusers pipeline"
        )
    else:
        raise FileNotFoundError(f"there is no teacher {source!r}: neither built in (digits) nor a folder")
    if "dtype" in asked:
        dtype = DTYPES[str(asked["dtype"])]
        model.network.to(dtype)  # type: ignore[attr-defined]
        model.dtype = dtype
    return model


def _of_pipeline(folder: Path) -> Denoiser:
    """The network and the scheduler of a diffusers pipeline on disk."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("this teacher is a diffusers pipeline: pip install 'fastsample[diffusers]'") from error
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        part = "unet" if "unet" in index else "transformer"
        kind = getattr(diffusers, index[part][1])
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder} is no diffusers pipeline with a unet or transformer and a scheduler: {error!r}"
        ) from error
    network = kind.from_pretrained(folder / part, use_safetensors=True, low_cpu_mem_usage=False)
    return from_diffusers(network.eval(), config)


def _guided(model: Denoiser, asked: Mapping[str, Any]) -> Model:
    if "guidance" not in asked:
        return model
    uncond: dict[str, Any] = dict(tensors(asked["uncond"])) if "uncond" in asked else {}
    null = asked.get("null", getattr(model.network, "null", None))
    if not uncond:
        if null is None:
            raise ValueError(
                "guidance of [teacher] needs what means no condition: null, a class label, or uncond, an .npz with the "
                "network's conditions for an empty prompt, one row each"
            )
        uncond = {"class_labels": null}
    return Guided(model, uncond=uncond, scale=float(asked["guidance"]))


def _student(teacher: Denoiser, asked: Mapping[str, Any]) -> Denoiser:
    if "lora" in asked:
        given: dict[str, Any] = {
            key: list(value) if isinstance(value, tuple) else value for key, value in asked["lora"].items()
        }
        model = lora_student(teacher, **given)
    elif "scale_size" in asked:
        model = scaled_student(teacher, asked["scale_size"], predicts=asked.get("predicts"))
    else:
        model = student_of(teacher, predicts=asked.get("predicts"))
    if "dropout" in asked:
        for module in model.network.modules():  # type: ignore[attr-defined]
            if isinstance(module, torch.nn.Dropout):
                module.p = asked["dropout"]
    return bounded(model, asked["boundary"]) if "boundary" in asked else model


def _network(asked: Mapping[str, Any], seed: int) -> Denoiser:
    """An untrained network; the same seed gives the same weights."""
    source = str(asked["from"])
    if source == "digits":
        if extra := sorted(asked.keys() - {"from", "predicts"}):
            raise ValueError(f"{extra[0]} in [network] cannot be chosen for digits, which is built in")
        return digits_network(str(asked.get("predicts", "eps")), seed=seed)
    network = Sampled(_untrained(source, asked.get("config", {}), seed), null=asked.get("null"))
    name = str(asked.get("schedule", "linear"))
    schedules: dict[str, Callable[[], Schedule]] = {
        "linear": VP.linear, "scaled_linear": VP.scaled_linear, "cosine": VP.cosine, "edm": EDM, "flow": Flow
    }  # fmt: skip
    schedule = schedules[name]()
    if name == "edm":
        if "predicts" in asked:
            raise ValueError("predicts in [network] is fixed by schedule = 'edm', whose scalings it has; leave it out")
        return edm_model(network, schedule, sigma_data=asked.get("sigma_data", 0.5), boundary=asked.get("boundary"))
    if "sigma_data" in asked:
        raise ValueError(f"sigma_data in [network] is of schedule = 'edm', and this is {name!r}; leave it out")
    model = Denoiser(network, schedule, str(asked.get("predicts", "eps")), time="index")
    return bounded(model, asked["boundary"]) if "boundary" in asked else model


def _untrained(source: str, config: Mapping[str, Any], seed: int) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("this network is a diffusers model: pip install 'fastsample[diffusers]'") from error
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            source = str(read["_class_name"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no configuration of a diffusers network: {error!r}") from error
        config = {**{key: value for key, value in read.items() if not key.startswith("_")}, **config}
    kind = getattr(diffusers, source, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise ValueError(
            f"[network] from = {source!r} is neither digits, nor a class of diffusers such as UNet2DModel, nor the "
            f"config.json of one"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return kind(**config)
        except TypeError as error:
            raise ValueError(f"[network.config] does not fit {source}: {error}") from error


def _plan(recipe: Recipe, schedule: Schedule) -> Plan | None:
    asked = recipe.plan
    if asked is None:
        return None
    spacing = skipping(asked["skipping"]) if "skipping" in asked else used(asked.get("spacing", uniform_t))
    try:
        nodes = grid(schedule, asked["steps"], spacing, end=asked.get("end"))
        return trace(recipe.solvers[asked["solver"]], nodes, **asked.get("options", {}))
    except (ValueError, TypeError) as error:
        raise ValueError(f"[plan]: {error}") from error


def _save(recipe: Recipe, found: Materials, student: Denoiser, folder: Path) -> None:
    if "lora" in recipe.student:
        save_lora(student, folder / "lora")
        student = merged(student)
    null = getattr(found.main.network, "null", None) if isinstance(student.network, Sampled) else None
    scales = [used(stage.settings.get("scales")) for stage in recipe.stages]
    drawn = next((one for one in reversed(scales) if isinstance(one, Scales)), None)
    guidance = (drawn.low, drawn.high) if drawn else (recipe.teacher or {}).get("guidance")
    save_pretrained(student, folder / "model", null=null, plan=found.plan, guidance=guidance, teacher=found.teacher)


def _begun(recipe: Recipe, folder: Path) -> None:
    """Raise ValueError where the folder holds the work of another recipe."""
    path = folder / RECIPE
    if not path.is_file():
        return
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, or choose another folder") from error
    if found := differences(then, json.loads(json.dumps(recipe.resolved()))):
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(
            f"{folder} holds the work of another recipe: {'; '.join(found[:5])}{more}. Give another --out, or the "
            f"recipe that it was begun with"
        )


def _begin(recipe: Recipe, folder: Path) -> None:
    if first_process() and not (folder / RECIPE).is_file():
        files.write_text(folder / RECIPE, json.dumps(recipe.resolved(), indent=1) + "\n")


def example(found: Materials) -> Batch:
    """A batch of the data, the same one each time; nothing else draws otherwise for it."""
    with torch.random.fork_rng(devices=[]):
        return Stream(found.loader, seed=0).first()
