"""A sweep from a TOML file: what it asks for, and what is said of a file that cannot be meant."""

import re
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastsample as fs
from fastsample import bench, solvers
from fastsample.bench.sweep import CASES, EXCLUDE, LATENCY, MODEL, SECTIONS, SETTINGS, read_sweep
from fastsample.bench.sweep_quality import DIGITS, MEASURES, PIXELS, Inception, measures, reference

HEAD = 'n = 40\n[model.teacher]\nfrom = "digits"\n'
CASE = '[cases]\nsolver = ["ddim", "heun"]\nsteps = [2, 4]\n'
WHOLE = HEAD + CASE + '[quality.fd_digits]\nreference = "digits"\n'


@pytest.fixture
def read(tmp_path):
    def one(text):
        (tmp_path / "sweep.toml").write_text(text)
        return read_sweep(tmp_path / "sweep.toml", solvers=solvers.SOLVERS)

    return one


@pytest.fixture
def models(toys):
    return {"teacher": toys["toy"](), "student": toys["toy"]()}


def names(cases):
    return [case.name for case in cases]


def test_a_file_says_what_a_product_of_cases_says(read, models):
    text = HEAD + '[model.student]\nfrom = "there"\n' + CASE + 'spacing = ["uniform_t", "karras"]\n[latency]\n'
    found = read(text).cases(models)
    same = bench.Case.product(
        model=models, solver=[solvers.ddim, solvers.heun], steps=[2, 4], spacing=[fs.uniform_t, fs.karras]
    )
    assert names(found) == names(same)
    assert [case.key for case in found] == [case.key for case in same]
    assert [case.plan for case in found] == [case.plan for case in same]


def test_every_way_to_run_a_case_reaches_it(read, models):
    models = {"teacher": fs.Guided(models["teacher"], uncond={"class_labels": 0}, scale=1.0)}
    text = HEAD + (
        '[cases]\nsolver = "multistep"\nsteps = 3\nspacing = "uniform_lam"\nstart = 9.0\nend = 0.1\n'
        'options = { order = 2, variable = "lam" }\nlower_order_final = true\nguidance = 3\ndtype = "bfloat16"\n'
        'compile = true\ngraph = true\nbatch = 7\ndevice = "cuda:1"\n[latency]\n'
    )
    (case,) = read(text).cases(models)
    assert (case.start, case.end, case.options) == (9.0, 0.1, {"order": 2, "variable": "lam"})
    assert (case.guidance, case.dtype, case.compiled, case.graph) == (3.0, torch.bfloat16, True, True)
    assert (case.batch, case.device, case.lower_order_final) == (7, "cuda:1", True)
    assert case.spacing is fs.uniform_lam


def test_include_adds_cases_and_exclude_removes_those_that_match_every_key(read, models):
    text = WHOLE + (
        '[[include]]\nmodel = "teacher"\nsolver = "ddim"\nsteps = [4, 8]\nspacing = "uniform_t"\n'
        '[[exclude]]\nsolver = "heun"\nsteps = [2, 3]\n[[exclude]]\nspacing = "uniform_t"\nsteps = 8\n'
    )
    found = read(text).cases({"teacher": models["teacher"]})
    assert names(found) == ["teacher/ddim/2", "teacher/ddim/4", "teacher/heun/4", "teacher/ddim/4/uniform_t"]


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True),
    names_=st.lists(st.sampled_from(["ddim", "heun", "euler", "deis"]), min_size=1, unique=True),
    gone=st.tuples(st.lists(st.sampled_from(["ddim", "heun", "euler", "deis"])), st.lists(st.integers(1, 9))),
)
def test_what_exclude_leaves_is_the_complement_of_what_matches(tmp_path_factory, steps, names_, gone):
    """Against plain sets."""
    every = set(product(names_, steps))
    out = {(name, count) for name, count in every if name in gone[0] and count in gone[1]}
    pattern = f"[[exclude]]\nsolver = {sorted(set(gone[0]))}\nsteps = {sorted(set(gone[1]))}\n"
    text = HEAD + f"[cases]\nsolver = {names_}\nsteps = {steps}\n[latency]\n" + (pattern if out else "")
    path = tmp_path_factory.mktemp("sweep") / "s.toml"
    path.write_text(text)
    model = fs.Denoiser(lambda x, t: x, fs.VP.linear(), "x0")
    sweep = read_sweep(path, solvers=solvers.SOLVERS)
    if out == every:
        with pytest.raises(ValueError, match="leaves no case"):
            sweep.cases({"teacher": model})
        return
    assert {(case.solver_name, case.steps) for case in sweep.cases({"teacher": model})} == every - out


def test_a_saved_plan_is_a_case_beside_the_solvers(read, models, tmp_path):
    plan = fs.trace(solvers.ddim, fs.grid(models["teacher"].schedule, 5))
    plan.save(tmp_path / "p.json")
    text = HEAD + f"[cases]\nplan = {{ tuned = '{tmp_path / 'p.json'}' }}\nbatch = [1, 8]\n[latency]\n"
    found = read(text).cases({"teacher": models["teacher"]})
    assert names(found) == ["teacher/tuned/5/batch=1", "teacher/tuned/5/batch=8"]
    assert all(case.plan == plan for case in found)


def test_settings_have_the_defaults_of_run(read):
    import inspect

    sweep, run = read(WHOLE), inspect.signature(bench.run).parameters
    for name in ("batch", "shard", "keep", "floor", "device"):
        assert getattr(sweep, name) == run[name].default, name
    assert sweep.latency is None
    assert read(WHOLE + "[latency]\n").latency == bench.Latency()


@pytest.mark.parametrize("measure", ["fd_digits", "fd_digits_converged", "endpoint_rms"])
def test_the_pictures_may_show_a_part_of_a_measure(read, measure):
    assert read(f"measure = '{measure}'\n" + WHOLE + TRUTH).measure == measure


def test_a_latency_of_no_threads_leaves_those_of_torch(read):
    assert read(WHOLE + '[latency]\nthreads = 0\nrounds = 3\nbaseline = "teacher/ddim/2"\n').latency == bench.Latency(
        rounds=3, threads=None, baseline="teacher/ddim/2"
    )


TRUTH = '[converged]\nsolver = "heun"\nsteps = 9\nspacing = "karras"\n'


def test_a_model_is_held_against_its_own_accurate_solution_or_another_models(read, models):
    head = HEAD + '[model.student]\nfrom = "there"\nconverged = "teacher"\n' + CASE + "[latency]\n"
    sweep = read(head + TRUTH)
    truths = sweep.truths(sweep.cases(models), models)
    assert truths.keys() == {"teacher", "student"}
    assert {(case.name, case.model) for case in truths.values()} == {("teacher/heun/9/karras", models["teacher"])}
    only = read((head + TRUTH).replace('converged = "teacher"', "converged = false"))
    assert list(only.truths(only.cases(models), models)) == ["teacher"]
    without = read(WHOLE)
    assert without.truths(without.cases({"teacher": models["teacher"]}), models) == {}


def test_a_model_that_only_gives_the_truth_is_used_too(read):
    text = HEAD + '[model.student]\nfrom = "there"\nconverged = "teacher"\n[model.idle]\nfrom = "nowhere"\n'
    sweep = read(text + '[cases]\nmodel = "student"\nsolver = "ddim"\nsteps = 2\nguidance = 2\n[latency]\n' + TRUTH)
    assert sweep.used == ["student", "teacher"]
    assert sweep.guided == {"student", "teacher"}


def test_the_truth_of_guided_cases_has_their_scale_and_several_scales_have_none(read, models):
    models = {"teacher": fs.Guided(models["teacher"], uncond={"class_labels": 0}, scale=1.0)}
    one = read(WHOLE.replace("steps = [2, 4]", "steps = [2, 4]\nguidance = 3") + TRUTH)
    assert one.truths(one.cases(models), models)["teacher"].guidance == 3.0
    two = read(WHOLE.replace("steps = [2, 4]", "steps = [2, 4]\nguidance = [1, 3]") + TRUTH)
    with pytest.raises(ValueError, match=r"scales of guidance 1, 3, .* its own guidance"):
        two.truths(two.cases(models), models)


MISTAKES = {
    "an unknown key at the top": (
        "bacth = 3\n" + WHOLE,
        "unknown key 'bacth' in the top of the file; did you mean 'batch'",
    ),
    "an unknown section": (
        WHOLE + "[qualty.fid]\n",
        "unknown key 'qualty' in the top of the file; did you mean 'quality'",
    ),
    "an unknown key of a model": (
        HEAD + "form = 1\n" + CASE,
        r"unknown key 'form' in \[model.teacher\]; did you mean 'from'",
    ),
    "an unknown key of the cases": (
        WHOLE.replace("steps", "step"),
        r"unknown key 'step' in \[cases\]; did you mean 'steps'",
    ),
    "an unknown key of an include": (
        WHOLE + "[[include]]\nsolvr = 'ddim'\n",
        r"'solvr' in \[\[include\]\] 1; did you mean 'solver'",
    ),
    "an unknown key of an exclude": (WHOLE + "[[exclude]]\nend = 1\n", r"unknown key 'end' in \[\[exclude\]\] 1"),
    "an unknown key of a measure": (
        WHOLE + "[quality.fid]\nreferenc = 'x'\n",
        r"'referenc' in \[quality.fid\]; did you mean 'reference'",
    ),
    "a key of another measure": (
        WHOLE + "splits = 3\n",
        r"unknown key 'splits' in \[quality.fd_digits\]; known: measure, reference",
    ),
    "an unknown key of the latency": (
        WHOLE + "[latency]\nround = 3\n",
        r"'round' in \[latency\]; did you mean 'rounds'",
    ),
    "an unknown key of the truth": (WHOLE + TRUTH + "guidance = 3\n", r"unknown key 'guidance' in \[converged\]"),
    "an unknown solver": (WHOLE.replace("heun", "huen"), r"unknown solver in \[cases\]: 'huen'; did you mean 'heun'"),
    "an unknown spacing": (
        WHOLE.replace("steps", "spacing = 'karas'\nsteps"),
        r"spacing in \[cases\]: 'karas'; did you mean 'karras'",
    ),
    "an unknown dtype": (
        WHOLE.replace("steps", "dtype = 'float8'\nsteps"),
        r"dtype in \[cases\]: 'float8'; did you mean 'float",
    ),
    "an unknown measure": (
        WHOLE + "[quality.fd_digit]\n",
        r"unknown measure 'fd_digit' in \[quality.fd_digit\]; did you mean 'fd_digits'",
    ),
    "an unknown model": (
        WHOLE.replace("[cases]", "[cases]\nmodel = 'techer'"),
        r"unknown model in \[cases\]: 'techer'; did you mean 'teacher'",
    ),
    "an unknown teacher": (HEAD + "teacher = 'x'\n" + CASE, r"teacher in \[model.teacher\] names no model: 'x'"),
    "a device that torch has not": (
        "device = 'gpu'\n" + WHOLE,
        "device in the top of the file is 'gpu', which torch does not know",
    ),
    "no n": (WHOLE.removeprefix("n = 40\n"), "n, the number of samples of each case, is missing"),
    "no model": ("n = 4\n" + CASE + "[latency]\n", "no model: add"),
    "a model without a place": ("n = 4\n[model.a]\n" + CASE, r"\[model.a\] says not where"),
    "no cases": (HEAD + "[latency]\n", r"no cases: add \[cases\]"),
    "a solver without steps": (HEAD + "[cases]\nsolver = 'ddim'\n", r"\[cases\] has solver but no steps"),
    "steps without a solver": (HEAD + "[cases]\nsteps = 3\n", "names no solver and no plan"),
    "nothing to measure": (HEAD + CASE, "nothing to measure: add"),
    "a measure without its reference": (
        HEAD + CASE + "[quality.fd_digits]\n",
        r"\[quality.fd_digits\] needs reference \(or at the top",
    ),
    "a measure without its features": (
        HEAD + CASE + "[quality.prdc]\nreference = 'digits'\n",
        r"\[quality.prdc\] needs features$",
    ),
    "a measure that is no table": (HEAD + CASE + "[quality]\nfid = 'x'\n", r"fid in \[quality\] must be a table"),
    "an include in one bracket": (WHOLE + "[include]\nsolver = 'ddim'\n", r"write \[\[include\]\]"),
    "an empty exclude": (WHOLE + "[[exclude]]\n", "would remove every case"),
    "steps of 0": (WHOLE.replace("[2, 4]", "[2, 0]"), r"steps in \[cases\] must be a whole number, at least 1, got 0"),
    "steps of a half": (WHOLE.replace("[2, 4]", "2.5"), "must be a whole number, at least 1, got 2.5"),
    "steps that are true": (WHOLE.replace("[2, 4]", "true"), "must be a whole number, at least 1, got True"),
    "no steps": (WHOLE.replace("[2, 4]", "[]"), r"steps in \[cases\] is an empty list"),
    "steps twice": (WHOLE.replace("[2, 4]", "[2, 2]"), r"steps in \[cases\] has 2 twice"),
    "a solver that is no text": (
        WHOLE.replace('["ddim", "heun"]', "3"),
        r"solver in \[cases\] must be a text in quotes, got 3",
    ),
    "a scale without end": (WHOLE.replace("steps", "guidance = inf\nsteps"), "must be a finite number, got inf"),
    "an interval of one": (HEAD + "guidance = 2\ninterval = [1]\n" + CASE, r"must be \[low, high\], got \[1\]"),
    "an interval without guidance": (
        HEAD + "interval = [0, 1]\n" + CASE,
        r"interval in \[model.teacher\] is of guidance",
    ),
    "updates without a teacher": (HEAD + "updates = 0.5\n" + CASE, "no teacher is named"),
    "a truth without a solution": (
        HEAD + "converged = 'teacher'\n" + CASE + "[latency]\n",
        r"needs to know what an accurate solution is: add \[converged\]",
    ),
    "a truth of two solvers": (
        WHOLE + "[converged]\nsolver = ['ddim', 'heun']\nsteps = 3\n",
        r"\[converged\] needs one solver",
    ),
    "a measure of the pictures that is none": (
        "measure = 'fd_digit'\n" + WHOLE,
        r"measure in the top of the file is 'fd_digit', which no \[quality.NAME\] measures; did you mean 'fd_digits'",
    ),
    "no TOML": ("n = \n", "it is no TOML"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_told_with_its_file_its_place_and_the_remedy(read, what):
    text, said = MISTAKES[what]
    with pytest.raises(ValueError, match=said) as raised:
        read(text)
    assert "sweep.toml: " in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bytes_that_are_no_text_are_told(tmp_path):
    (tmp_path / "sweep.toml").write_bytes(b"n = 3 # \xff\xfe")
    with pytest.raises(ValueError, match=r"sweep.toml: it is no text in UTF-8 .* byte 8"):
        read_sweep(tmp_path / "sweep.toml", solvers=solvers.SOLVERS)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("[[include]]\nsolver = 'ddim'\nsteps = 4\n", r"\[\[include\]\] 1 asks for teacher/ddim/4, which stands there"),
        ("[[exclude]]\nsolver = 'deis'\n", r"\[\[exclude\]\] 1 \(solver = deis\) removes no case"),
        ("[[exclude]]\nmodel = 'teacher'\n", "leaves no case"),
        (
            "[latency]\nbaseline = 'teacher/ddim/3'\n",
            r"'teacher/ddim/3' in \[latency\] is no case; did you mean 'teacher/",
        ),
    ],
)
def test_what_only_the_cases_show_is_told_too(read, models, more, said):
    with pytest.raises(ValueError, match=said):
        read(WHOLE + more).cases({"teacher": models["teacher"]})


def test_every_key_is_explained_in_the_documentation():
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "bench.md").read_text(encoding="utf-8")
    for key in (
        *SECTIONS,
        *SETTINGS,
        *MODEL,
        *CASES,
        *EXCLUDE,
        *LATENCY,
        *(k for m in MEASURES.values() for k in m.keys),
    ):
        assert re.search(rf"`(\[+\w*\.?)?{key}", page), key
    for measure in MEASURES:
        assert f"`{measure}`" in page, measure


IMAGES = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


@pytest.fixture
def images(tmp_path):
    import numpy as np

    np.savez(tmp_path / "images.npz", images=IMAGES.numpy())
    return tmp_path / "images.npz"


def test_measures_are_made_by_name_and_share_their_reference(read, images):
    text = f"reference = '{images}'\n{HEAD}{CASE}[quality.fd_digits]\n[quality.pixels_too]\nmeasure = 'fd_pixels'\n"
    text += "[quality.prdc]\nfeatures = 'digits'\nnear = 2\n[quality.sliced_wasserstein]\nfeatures = 'pixels'\np = 1\n"
    text += "[quality.kernel_distance]\nfeatures = 'digits'\n"
    found = measures(read(text).quality, Inception())
    assert [one.name for one in found.values()] == list(found)
    assert [one.features for one in found.values()] == [DIGITS, PIXELS, DIGITS, PIXELS, DIGITS]
    assert (found["prdc"].near, found["prdc"].wide, found["sliced_wasserstein"].p) == (2, 5, 1)
    assert found["fd_digits"].reference is found["prdc"].reference is found["kernel_distance"].reference
    other = IMAGES.flip(0)[:50]
    torch.testing.assert_close(
        found["fd_digits"](other).value, bench.fd_digits(IMAGES)(other).value, rtol=1e-12, atol=0
    )  # the same numbers, summed alike


def test_a_statistics_file_is_a_reference_too_and_a_foreign_one_needs_its_n(images, tmp_path):
    import numpy as np

    made = reference(images, DIGITS)
    made.save(tmp_path / "stats.npz")
    read = reference(tmp_path / "stats.npz", DIGITS)
    assert read.dataset == made.dataset
    np.savez(tmp_path / "theirs.npz", mu=made.mean.numpy(), sigma=made.cov.numpy())
    with pytest.raises(ValueError, match="of how many images"):
        reference(tmp_path / "theirs.npz", DIGITS)
    assert reference(tmp_path / "theirs.npz", DIGITS, n=60).n == 60
    with pytest.raises(ValueError, match="n_reference is of statistics files"):
        reference(images, DIGITS, n=60)
    with pytest.raises(FileNotFoundError, match="no reference nowhere; give digits"):
        reference("nowhere", DIGITS)


def test_unknown_features_are_told_with_the_name_of_the_measure(read, images):
    text = f"reference = '{images}'\n{HEAD}{CASE}[quality.prdc]\nfeatures = 'dino'\n"
    with pytest.raises(ValueError, match=r"\[quality.prdc\]: unknown features 'dino'; choose one of digits, pixels"):
        measures(read(text).quality, Inception())


def test_the_weights_of_inception_are_asked_for_before_anything_is_sampled(read, images, tmp_path):
    text = f"reference = '{images}'\n{HEAD}{CASE}[quality.fid]\n"
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth.*https://.*SHA-256"):
        measures(read(text).quality, Inception(tmp_path / "nowhere.pth"))
