"""Recipes: what is read, what is refused, and that running one is calling the functions it stands for."""

import dataclasses
import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample import distill, solvers, zoo
from fastsample.distill import recipe_data
from fastsample.distill.recipe import TRAIN, built_in, change, read_recipe
from fastsample.distill.recipe_keys import METHODS, keys_of, keys_of_method
from fastsample.distill.recipe_run import _method, costs, materials, run_recipe

diffusers = pytest.importorskip("diffusers")

RECIPE = """
[teacher]
from = "digits"
[student]
predicts = "v"
[data]
from = "digits"
size = 16
[stages]
save_every = 1
[stage.conversion]
method = "conversion"
updates = 2
[stage.consistency]
method = "consistency"
updates = 3
[plan]
solver = "ddim"
steps = 1
"""


def read(path, *changes, **options):
    return read_recipe(path, solvers=solvers.SOLVERS, changes=changes, **options)


@pytest.fixture
def recipe(tmp_path):
    """recipe(*changes): that of RECIPE, changed."""
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return functools.partial(read, path)


def same(one, other):
    a, b = (list(model.network.parameters()) for model in (one, other))
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("name", built_in())
def test_a_built_in_recipe_reads_and_says_what_it_costs_and_reaches(name):
    found = read(name)
    assert found.title
    assert found.out == f"runs/{name}"
    for text in (found.cost, found.reaches):
        assert "measured" in text or "from the paper" in text or "updates" in text
    json.dumps(found.resolved(), allow_nan=False)


def test_no_key_of_a_method_is_one_of_the_trainer_too():
    for kind in METHODS.values():
        assert not keys_of_method(kind, solvers.SOLVERS).keys() & {*TRAIN, "updates", "method", "rounds"}


def test_every_setting_of_a_method_that_is_a_number_or_a_name_is_a_key():
    left = {"distribution_matching": {"head"}}  # a network of one's own
    for name, kind in METHODS.items():
        fields = {field.name for field in dataclasses.fields(kind) if field.init}
        keys = keys_of(kind, solvers.SOLVERS).keys()
        assert fields - keys - {"student", "model", "teacher", "critic"} == left.get(name, set())


def test_the_recipe_with_the_settings_of_the_demo_is_the_function_bit_for_bit(tmp_path):
    short = ["stage.conversion.updates=1", "stage.conversion.warmup=0", "stage.consistency.updates=2"]
    short += ["stage.consistency.spacing=uniform_t", "plan.spacing=uniform_t", "plan.steps=1"]
    short += [f"stage.consistency.{key}" for key in ("warmup=0", "times=16", "distance=pseudo_huber", "lr=5e-4")]
    teacher = zoo.digits()
    student = run_recipe(read("digits-consistency", *short), tmp_path / "a")
    assert same(student, distill.distill_digits(teacher, tmp_path / "b", updates=0.002))
    loaded = fs.from_pretrained(tmp_path / "a" / "model")
    assert same(loaded, student)
    assert loaded.plan == fs.trace(solvers.ddim, fs.grid(teacher.schedule, 1, fs.uniform_t))
    assert loaded.network.null == 10
    assert len(loaded.card.teacher) == 64


def test_the_recipe_of_the_teacher_is_the_function_bit_for_bit(tmp_path):
    model = run_recipe(read("digits-teacher", "stage.teacher.updates=2", "network.predicts=eps"), tmp_path / "a")
    assert same(model, distill.train_digits(tmp_path / "b", steps=2))


@pytest.mark.slow
def test_the_rounds_of_a_recipe_are_those_of_the_function_bit_for_bit(tmp_path, recipe):
    words = ["stage.halving={method = 'progressive', rounds = [2, 1], updates = [1, 2]}", "stages.drop=0.1"]
    asked = recipe("stage.consistency={method = 'conversion', updates = 1}", *words, "stages.null={class_labels = 10}")
    asked = dataclasses.replace(asked, stages=[asked.stages[0], *asked.stages[2:]])
    student = run_recipe(asked, tmp_path / "a")
    found = materials(asked)
    other = distill.progressive(
        found.teacher, found.loader, updates=[1, 2], rounds=[2, 1], conversion=2, drop=0.1, null={"class_labels": 10}
    )
    assert same(student, other)
    assert (tmp_path / "a" / "halving" / "steps-1" / "step-000002").is_dir()


def stop_at(stage, step):
    """Evaluations that stop the run, as a signal would, after this step of this stage; before it at 0."""

    class Stop(Exception):
        pass

    def of(found):
        def one(asked):
            if asked.name == stage and step == 0:
                raise Stop

            def evaluate(model, now):
                if asked.name == stage and now == step:
                    raise Stop
                return {}

            return evaluate

        return one

    return Stop, of


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder where the recipe ran without a stop, and its student."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "recipe.toml").write_text(RECIPE)
    return folder / "out", run_recipe(read(folder / "recipe.toml", "threads=1"), folder / "out")


@pytest.mark.parametrize(("stage", "step"), [("conversion", 1), ("consistency", 0), ("consistency", 2)])
def test_a_recipe_that_was_stopped_goes_on_to_the_same_weights(recipe, whole, tmp_path, stage, step):
    out, student = whole
    error, evaluate = stop_at(stage, step)
    with pytest.raises(error):
        run_recipe(recipe(), tmp_path / "cut", evaluate=evaluate, evaluate_every=1)
    assert not (tmp_path / "cut" / "model").exists()
    assert same(run_recipe(recipe(), tmp_path / "cut"), student)
    for file in ("diffusion_pytorch_model.safetensors", "plan.json", "scheduler_config.json"):
        assert (tmp_path / "cut/model" / file).read_bytes() == (out / "model" / file).read_bytes()


def test_a_folder_of_another_recipe_is_refused_by_what_differs(recipe, whole, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "out")
    with pytest.raises(ValueError, match=r"another recipe: stages\.consistency\.times was \"absent\", now 8"):
        run_recipe(recipe("stage.consistency.times=8"), out)
    run_recipe(recipe("stages.save_every=2"), out)  # how often it is saved is no matter of weights
    (out / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match=r"recipe\.json is damaged"):
        run_recipe(recipe(), out)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["stage.consistency.tims=8"], r"unknown key 'tims' in \[stage\.consistency\]; did you mean 'times'"),
        (["stage.consistency.method=consistent"], "did you mean 'consistency'"),
        (["stage.consistency.updates=0"], r"updates in \[stage\.consistency\] must be a whole number, at least 1"),
        (["stage.consistency.updates=[1, 2]"], "only the rounds of progressive distillation have"),
        (["stage.consistency.times=many"], r"times in \[stage\.consistency\] must be a whole number"),
        (["stage.consistency.spacing=cubic"], "unknown spacing .*known: "),
        (["stage.consistency.times={name = 'Dubling', over = 3}"], "did you mean 'Doubling'"),
        (["stage.consistency.times={name = 'Doubling'}"], "lacks over, which Doubling needs"),
        (["stage.consistency.lr=-1"], "must be above 0"),
        (["stage.consistency.optimizer=Adan"], r"optimizer in .stage.consistency.: unknown optimizer 'Adan'"),
        (["stages.optimizer={name = 'AdamW', weight_deca = 0.1}"], "'weight_deca'; did you mean 'weight_decay'"),
        (["stages.optimizer={weight_decay = 0.1}"], "name of optimizer in .* must be a text"),
        (["stage.consistency.spacing={name = 'power_t', rh = 2}"], "unknown key 'rh' in .* did you mean 'rho'"),
        (["stage.consistency.spacing={name = 'power_t', rho = 0}"], "rho of power_t must be positive"),
        (["plan.options.eat=0.5"], r"unknown option of ddim in .plan.: 'eat'; did you mean 'eta'"),
        (["stage.consistency.schedule=liner"], "unknown schedule 'liner'"),
        (["stage.x={method = 'progressive', updates = 3}"], r"\[stage\.x\] lacks steps, or rounds"),
        (["stage.x={method = 'progressive', updates = 3, rounds = [8, 3]}"], "must halve the steps"),
        (["stage.x={method = 'progressive', updates = [3], rounds = [4, 2], steps = 1}"], "rounds and steps"),
        (["stage.x={method = 'progressive', updates = [3, 2, 1], rounds = [4, 2]}"], "3 numbers for 2 rounds"),
        (["stage.x={updates = 3}"], "names no method"),
        (["stage.x={method = 'reflow'}"], "says not how long"),
        (["stages.steps=3"], "'steps' in .stages. is a key of none of the stages"),
        (["stages.sped=3"], "'sped' in .stages. is a key of none"),
        (["data.from=digit"], "unknown from in .data.: 'digit'; did you mean 'digits'"),
        (["data.sise=3"], "did you mean 'size'"),
        (["data={from = 'npz'}"], "lacks file, which npz needs"),
        (["teacher={}"], r"\[teacher\] says not which"),
        (["teacher.null=3"], "are of guidance"),
        (["network={from = 'digits'}"], "this has both"),
        (["student.predicts=u"], "unknown predicts"),
        (["student.dropout=1"], "dropout in .student. is a share of at least 0 and below 1, got 1"),
        (["student.lora={rank = 2}"], "leave out predicts"),
        (["plan.solver=dim"], "did you mean 'ddim'"),
        (["plan={solver = 'ddim'}"], "lacks steps"),
        (["plan.spacing=trailing", "plan.skipping=50"], "a spacing and skipping"),
        (["thread=1"], "did you mean 'threads'"),
        (["plan.steps.x=1"], "is no table"),
        (["plan"], "is written key=value"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_meant_is_refused_by_its_place(recipe, changes, said):
    with pytest.raises(ValueError, match=said) as error:
        recipe(*changes)
    assert "recipe.toml: " in str(error.value)


def test_a_file_that_is_no_toml_is_refused_by_its_line(tmp_path):
    (tmp_path / "x.toml").write_text('seed = 1\n[teacher\nfrom = "digits"\n')
    with pytest.raises(ValueError, match=r"x\.toml: it is no TOML: .*line 2"):
        read(tmp_path / "x.toml")


def test_a_recipe_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ValueError, match=r"no recipe 'digits-consistncy'.*did you mean 'digits-consistency'"):
        read("digits-consistncy")


def test_a_setting_with_a_name_of_the_trainer_has_another_key(recipe):
    table = "stage.x={method = 'continuous', updates = 3, warmup = 1, tangent_warmup = 2}"
    stage = recipe(table).stages[-1]
    assert stage.options["warmup"] == 1
    found = materials(recipe())
    method = _method(stage, distill.student_of(found.main, predicts="v"), found.teacher)
    assert (method.warmup, method.teacher) == (2, found.teacher)


def test_limits_may_be_infinite_and_the_file_of_the_run_is_json(recipe):
    asked = recipe("stage.conversion.limit=inf", "stage.conversion.clip=inf")
    assert asked.stages[0].settings["limit"] == math.inf
    stage = json.loads(json.dumps(asked.resolved(), allow_nan=False))["stages"]["conversion"]
    assert (stage["limit"], stage["clip"]) == ("inf", "inf")
    with pytest.raises(ValueError, match=r"limit in .* must be a finite number"):
        recipe("stage.conversion.limit=nan")


def test_a_spacing_may_be_made_of_a_number(recipe):
    asked = recipe("stage.consistency.spacing={name = 'power_t', rho = 1.5}", "plan={solver = 'ddim', steps = 4, "
                   "spacing = {name = 'power_t', rho = 1.5}}")  # fmt: skip
    found, stage = materials(asked), asked.stages[1]
    assert found.plan == fs.trace(solvers.ddim, fs.grid(found.main.schedule, 4, fs.power_t(1.5)))
    assert asked.resolved()["stages"]["consistency"]["spacing"] == {"name": "power_t", "rho": 1.5}
    assert (
        _method(stage, distill.student_of(found.main, predicts="v"), found.teacher).spacing.__name__ == "power_t(1.5)"
    )


def test_a_change_may_name_a_table_that_is_not_there_yet():
    body = {}
    for text in ("a.b.c=1.5", "a.b.d=word", "a.e=[1, 2]", "f = true"):
        change(body, text)
    assert body == {"a": {"b": {"c": 1.5, "d": "word"}, "e": [1, 2]}, "f": True}


@pytest.mark.parametrize("made", ["nothing", "empty", "weights"])
def test_a_teacher_that_is_not_there_is_named_before_work_starts(recipe, tmp_path, made):
    folder = tmp_path / "teacher"
    if made != "nothing":
        folder.mkdir()
    if made == "weights":
        fs.save_pretrained(zoo.digits(), folder)
        (folder / "diffusion_pytorch_model.safetensors").unlink()
    said = {"nothing": "there is no teacher", "empty": "holds neither", "weights": "safetensors is missing"}
    with pytest.raises(FileNotFoundError, match=said[made]):
        run_recipe(recipe(teacher=str(folder)), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_stages_that_do_not_fit_are_said_before_the_first_update(recipe, tmp_path):
    path = tmp_path / "zero"  # alpha is 0 where an eps network would begin
    network = zoo.digits().network
    fs.save_pretrained(fs.Denoiser(network, fs.VP.scaled_linear().zero_terminal_snr(), "eps", time="index"), path)
    with pytest.raises(ValueError, match=r"\[stage\.conversion\]: .*alpha = 0"):
        run_recipe(recipe(teacher=str(path)), tmp_path / "out")
    spaced = recipe("stage.x={method = 'progressive', updates = 1, steps = 4, spacing = 'karras'}")
    with pytest.raises(ValueError, match=r"\[stage\.x\]: .*two steps of the teacher would not end"):
        run_recipe(spaced, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_costs_count_what_the_networks_are_asked_for_an_image(recipe):
    words = "stage.x={method = 'progressive', updates = 3, rounds = [4, 2]}"
    asked = recipe(words, "teacher.guidance=2.0")
    found = [(one.stage.name, one.batch, one.trained, one.asked) for one in costs(asked, materials(asked))]
    assert found == [
        ("conversion", 16, 1.0, 2.0),  # guidance asks twice
        ("consistency", 16, 2.0, 2.0),
        ("x/steps-4", 16, 1.0, 4.0),
        ("x/steps-2", 16, 1.0, 2.0),  # of a student that needs no guidance
    ]


def test_a_guided_recipe_says_so_in_its_student(recipe, tmp_path):
    run_recipe(recipe("teacher.guidance=2.5"), tmp_path / "out")
    assert fs.from_pretrained(tmp_path / "out" / "model").card.guidance == 2.5


def tiny(tmp_path):
    """Colour images in a file, and changes that make a CIFAR-10 recipe small enough for a test."""
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    network = (
        "network.config={sample_size = 8, in_channels = 3, out_channels = 3, layers_per_block = 1, norm_num_groups = 4,"
        " dropout = 0.1, block_out_channels = [8, 8], down_block_types = ['DownBlock2D', 'DownBlock2D'],"
        " up_block_types = ['UpBlock2D', 'UpBlock2D']}"
    )
    return [f"data={{from = 'npz', file = '{tmp_path / 'images.npz'}', size = 4, flip = true}}"], network


def test_the_recipes_of_cifar10_run_on_a_stand_in(tmp_path):
    data, network = tiny(tmp_path)
    short = [*data, network, "stage.teacher.updates=1", "stage.teacher.precision=no"]
    teacher = run_recipe(read("cifar10-teacher", *short), tmp_path / "edm")
    assert teacher.prediction.name == "karras(0.5)"
    words = [*data, "stage.consistency.updates=1", "stage.consistency.precision=no"]
    asked = read("cifar10-consistency", *words, teacher=str(tmp_path / "edm" / "model"))
    found = materials(asked)
    for model, largest in ((found.main, 0.1), (found.first(), 0.0)):  # of the student alone
        assert max(m.p for m in model.network.modules() if isinstance(m, torch.nn.Dropout)) == largest
    student = run_recipe(asked, tmp_path / "consistency")
    assert isinstance(student, distill.Bounded)
    loaded = fs.from_pretrained(tmp_path / "consistency" / "model")
    assert isinstance(loaded, distill.Bounded)
    assert fs.sample(loaded, loaded.plan, fs.noise((3, 8, 8), seeds=[1])).shape == (1, 3, 8, 8)

    run_recipe(read("cifar10-teacher", *short, "network.schedule=cosine", "network.predicts=v"), tmp_path / "v")
    rounds = ["stage.halving.rounds=[2, 1]", "stage.halving.updates=1"]
    student = run_recipe(
        read("cifar10-progressive", *data, *rounds, teacher=str(tmp_path / "v" / "model")), tmp_path / "progressive"
    )
    assert student.prediction.name == "v"


def test_the_recipe_of_stable_diffusion_runs_on_a_stand_in(tmp_path):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2,
    )  # fmt: skip
    pipeline = tmp_path / "pipeline"
    network.save_pretrained(pipeline / "unet")
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.save_pretrained(pipeline / "scheduler")
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    text = torch.randn(12, 3, 8).numpy()
    np.savez(tmp_path / "latents.npz", x0=3 * torch.randn(12, 4, 8, 8).numpy(), encoder_hidden_states=text)
    np.savez(tmp_path / "empty.npz", encoder_hidden_states=text[:1])
    asked = read(
        "sd15-lcm-lora",
        *(f"data.file={tmp_path / 'latents.npz'}", f"teacher.uncond={tmp_path / 'empty.npz'}", "data.size=4"),
        *("teacher.dtype=float32", "student.lora.rank=2", "stage.lcm.updates=1", "stage.lcm.precision=no"),
        teacher=str(pipeline),
    )
    rows = costs(asked, materials(asked))
    assert [(row.trained, row.asked) for row in rows] == [(2.0, 2.0)]
    run_recipe(asked, tmp_path / "out")
    assert (tmp_path / "out" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    loaded = fs.from_pretrained(tmp_path / "out" / "model")
    assert loaded.card.guidance == (6.0, 16.0)
    assert [row.node.t for row in loaded.plan.rows] == [999, 759, 499, 259]


def test_pairs_are_made_once_and_reflow_learns_from_them(tmp_path):
    _, network = tiny(tmp_path)
    text = """
[teacher]
from = "FOLDER"
[data]
from = "pairs"
count = 6
shape = [3, 8, 8]
steps = 2
size = 3
[stage.reflow]
method = "reflow"
updates = 1
"""
    data, _ = tiny(tmp_path)
    flow = ["stage.teacher.precision=no", "plan.solver=ddim", "plan.spacing=uniform_t"]
    words = [*data, network, "network.schedule=flow", "network.predicts=flow", "stage.teacher.updates=1"]
    run_recipe(read("cifar10-teacher", *words, *flow), tmp_path / "t")
    (tmp_path / "reflow.toml").write_text(text.replace("FOLDER", str(tmp_path / "t" / "model")))
    asked = read(tmp_path / "reflow.toml")
    assert [(row.batch, row.trained, row.asked) for row in costs(asked, materials(asked))] == [(3, 1.0, 0.0)]
    assert not (tmp_path / "out").exists()  # what only tries it makes none
    with pytest.raises(ValueError, match=r"ddpm in \[data\] adds noise, and pairs need a plan that does not"):
        run_recipe(read(tmp_path / "reflow.toml", "data.solver=ddpm"), tmp_path / "none")
    assert not list((tmp_path / "none").rglob("*.json"))
    student = run_recipe(asked, tmp_path / "out")
    assert student.prediction.name == "flow"
    assert (tmp_path / "out" / "pairs" / "pairs.json").is_file()


def test_of_several_processes_the_first_makes_the_pairs_and_the_others_wait(tmp_path, monkeypatch):
    teacher = zoo.digits()
    given = {"teacher": teacher, "solvers": solvers.SOLVERS, "out": tmp_path, "count": 4, "shape": [1, 8, 8]}
    given |= {"classes": 10, "steps": 1, "size": 2}
    waits = []

    def first_process_meanwhile(seconds):
        waits.append(teacher.count.rows)
        monkeypatch.setenv("RANK", "0")
        recipe_data.pairs(**given)
        monkeypatch.setenv("RANK", "1")

    monkeypatch.setattr(recipe_data.time, "sleep", first_process_meanwhile)
    monkeypatch.setenv("RANK", "1")
    assert recipe_data.pairs(**given).count == 4
    assert waits == [0]
    assert teacher.count.rows == 4


def test_a_network_trained_from_nothing_may_be_made_consistent_without_a_teacher(tmp_path):
    data, network = tiny(tmp_path)
    text = """
[network]
from = "UNet2DModel"
schedule = "edm"
boundary = "edm"
[data]
from = "npz"
[stage.training]
method = "consistency_training"
updates = 2
times = { name = "Doubling", first = 2, last = 4, over = 2 }
"""
    (tmp_path / "x.toml").write_text(text)
    student = run_recipe(read(tmp_path / "x.toml", *data, network), tmp_path / "out")
    assert isinstance(student, distill.Bounded)
    with pytest.raises(ValueError, match="needs a teacher, and this recipe trains a"):
        read(tmp_path / "x.toml", *data, network, "stage.training={method = 'consistency', updates = 1}")
