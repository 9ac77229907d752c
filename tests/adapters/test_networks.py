"""Every class of network: as a model it is the network itself, called as diffusers' pipelines call it."""

import copy
from itertools import pairwise

import pytest
import torch

import fastsample as fs
from fastsample import solvers

from .networks import BATCH, CASES, IMG_IDS, diffusers, embeds, mm, random, text

STEPS = 3


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def model_of(case, **changes):
    return fs.from_diffusers(case.network(**changes), case.scheduler(), **case.options)


def plan_of(model, steps=STEPS):
    return fs.trace(solvers.ddim, fs.grid(model.schedule, steps, spacing=model.spacing))


def by_hand(case, network, nodes, x):
    """DDIM, or Euler for a flow, written out; each call as in the pipeline of this network."""
    condition = {**case.cond, **case.shared, **case.by_hand}
    x = nodes[0].sigma * x
    for s, t in pairwise(nodes):
        told = torch.full((BATCH,), case.time(s), dtype=torch.float32)
        with torch.no_grad():
            output = network(x, timestep=told, **condition).sample
        if network.config.out_channels == 2 * x.shape[1] and x.dim() == 4:
            output = output.chunk(2, dim=1)[0]  # the other half is a variance
        if isinstance(case.scheduler(), diffusers.FlowMatchEulerDiscreteScheduler):
            x = x + (t.sigma - s.sigma) * output
        else:
            x = t.alpha * (x - s.sigma * output) / s.alpha + t.sigma * output
    return x


def test_sampling_is_the_loop_written_by_hand(case):
    model, noise = model_of(case), random(BATCH, *case.shape, seed=0)
    plan = plan_of(model)
    theirs = by_hand(case, model.network.network, [row.node for row in plan.rows] + [plan.end], noise)
    ours = fs.sample(model, plan, noise, condition={**case.cond, **case.shared})
    assert ours.shape == noise.shape
    # eps over an alpha down to 0.006 makes the first x0 large; float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))


def test_guidance_in_one_call_is_guidance_in_two(case):
    model, noise = model_of(case), random(BATCH, *case.shape, seed=0)
    plan = plan_of(model)
    one, two = (
        fs.sample(fs.Guided(model, case.cond, case.uncond, scale=3.0, batched=batched), plan, noise,
                  condition=case.shared)
        for batched in (True, False)
    )  # fmt: skip
    assert not torch.allclose(one, fs.sample(model, plan, noise, condition={**case.cond, **case.shared}))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5 * max(1.0, float(two.abs().max())))


def test_a_saved_network_samples_the_same_after_loading(case, tmp_path):
    model, noise = model_of(case), random(BATCH, *case.shape, seed=0)
    plan = plan_of(model)
    fs.save_pretrained(model, tmp_path)
    loaded = fs.from_pretrained(tmp_path)
    condition = {**case.cond, **case.shared}
    assert (loaded.schedule, loaded.time) == (model.schedule, model.time)
    torch.testing.assert_close(
        fs.sample(loaded, plan, noise, condition=condition), fs.sample(model, plan, noise, condition=condition)
    )


def test_another_number_of_channels_is_refused(case):
    model = model_of(case)
    wrong = (*case.shape[:-1], case.shape[-1] + 4) if case.name.startswith("Flux") else (5, *case.shape[1:])
    with pytest.raises(ValueError, match=r"the network takes x of shape \[B, "):
        fs.sample(model, plan_of(model), random(BATCH, *wrong, seed=0), condition={**case.cond, **case.shared})


def test_a_condition_with_other_rows_is_refused(case):
    model = model_of(case)
    name, value = next(iter(case.cond.items()))
    three = {**case.cond, **case.shared, name: torch.cat([value, value[:1]])}
    with pytest.raises(ValueError, match=f"condition '{name}' has 3 rows for a batch of 2"):
        fs.sample(model, plan_of(model), random(BATCH, *case.shape, seed=0), condition=three)


def test_a_condition_that_lacks_is_named(case):
    model = model_of(case)
    needed = [name for name in case.cond if name != "encoder_attention_mask"]
    for name in needed:
        given = {key: value for key, value in {**case.cond, **case.shared}.items() if key != name}
        with pytest.raises(ValueError, match=f"{case.name} needs the condition '{name}'"):
            fs.sample(model, plan_of(model), random(BATCH, *case.shape, seed=0), condition=given)


def test_a_condition_that_the_network_does_not_take_is_named(case):
    model = model_of(case)
    given = {**case.cond, **case.shared, "prompt": text(1)}
    with pytest.raises(ValueError, match=rf"{case.name} takes no condition 'prompt'; it takes .*(class|encoder)"):
        fs.sample(model, plan_of(model), random(BATCH, *case.shape, seed=0), condition=given)


def test_one_row_of_a_condition_is_for_every_sample(case):
    model, noise = model_of(case), random(BATCH, *case.shape, seed=0)

    def sampled(change):
        cond = {
            name: {key: change(one) for key, one in value.items()} if isinstance(value, dict) else change(value)
            for name, value in case.cond.items()
        }
        return fs.sample(model, plan_of(model), noise, condition={**cond, **case.shared})

    one, all_rows = sampled(lambda v: v[:1]), sampled(lambda v: v[:1].expand(BATCH, *v.shape[1:]))
    torch.testing.assert_close(one, all_rows, rtol=0, atol=0)


def test_half_precision_networks_take_conditions_in_single_precision(case):
    model = fs.from_diffusers(case.network().bfloat16(), case.scheduler(), **case.options)
    x0 = fs.sample(model, plan_of(model), random(BATCH, *case.shape, seed=0), condition={**case.cond, **case.shared})
    assert x0.dtype == torch.float32


def test_the_nested_conditions_of_sdxl_are_checked_row_by_row():
    case = CASES["sdxl"]
    model = model_of(case)
    added = {**case.cond["added_cond_kwargs"], "time_ids": torch.zeros(3, 6)}
    with pytest.raises(ValueError, match="condition 'time_ids' has 3 rows for a batch of 2"):
        model.predict(random(BATCH, 4, 8, 8, seed=0), fs.node(model.schedule, 500.0),
                      **{**case.cond, "added_cond_kwargs": added})  # fmt: skip


# FLUX


def flux_latents():
    return random(BATCH, 4, 6, 8, seed=0)


def test_flux_takes_latents_and_packs_them_as_its_pipeline():
    case = CASES["flux"]
    model, x = model_of(case), flux_latents()
    packed = diffusers.FluxPipeline._pack_latents(x, BATCH, 4, 6, 8)
    torch.testing.assert_close(fs.pack_latents(x), packed, rtol=0, atol=0)
    torch.testing.assert_close(fs.unpack_latents(packed, 6, 8), x, rtol=0, atol=0)
    torch.testing.assert_close(fs.latent_ids(6, 8), IMG_IDS, rtol=0, atol=0)
    plan, condition = plan_of(model), {**case.cond, "guidance": 3.5}
    tokens = fs.sample(model, plan, packed, condition={**condition, "img_ids": IMG_IDS})
    latents = fs.sample(model, plan, x, condition=condition)
    torch.testing.assert_close(fs.pack_latents(latents), tokens, rtol=0, atol=1e-6)  # another order of the sums


def test_flux_guided_needs_no_ids_for_latents():
    case = CASES["flux"]
    model = model_of(case)
    one, two = (
        fs.sample(fs.Guided(model, mm(1), mm(2), scale=2.0, batched=batched), plan_of(model), flux_latents(),
                  condition={"guidance": 1.0})
        for batched in (True, False)
    )  # fmt: skip
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_flux_steps_where_its_pipeline_steps():
    """It asks its scheduler for 1, 1 - 1 / N, ... and shifts those."""
    case = CASES["flux"]
    scheduler = case.scheduler()
    mu = 0.5 + (12 - 256) * 0.65 / 3840
    scheduler.set_timesteps(sigmas=[1 - k / 4 for k in range(4)], mu=mu)
    sigmas = [row.node.sigma for row in plan_of(model_of(case), 4).rows]
    assert sigmas == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-6)


def test_flux_says_that_a_distilled_network_needs_its_guidance_and_another_none():
    case = CASES["flux"]
    x, node = flux_latents(), fs.node(fs.Flow(), 0.5)
    with pytest.raises(ValueError, match=r"needs the condition 'guidance', the scale it was distilled with"):
        model_of(case).predict(x, node, **case.cond)
    with pytest.raises(ValueError, match=r"was not distilled with guidance"):
        model_of(case, guidance_embeds=False).predict(x, node, **case.cond, guidance=3.5)


def test_flux_says_what_tokens_need():
    case = CASES["flux"]
    with pytest.raises(ValueError, match=r"needs 'img_ids' for tokens \[B, L, C\]: fs\.latent_ids"):
        model_of(case).predict(random(BATCH, *case.shape, seed=0), fs.node(fs.Flow(), 0.5), **mm(1), guidance=1.0)


def test_a_network_that_empties_its_arguments_gets_them_anew_each_time():
    """As FLUX takes its IP-adapter's embeddings out of `joint_attention_kwargs`."""

    class Pops(torch.nn.Module):
        def forward(self, x, timestep, joint_attention_kwargs=None, return_dict=True):
            return (0.1 * joint_attention_kwargs.pop("embeds") * x,)

    model = fs.from_diffusers(Pops(), diffusers.DDIMScheduler())
    given = {"joint_attention_kwargs": {"embeds": 2.0}}
    fs.sample(model, plan_of(model), random(BATCH, 4, seed=0), condition=given)
    assert given == {"joint_attention_kwargs": {"embeds": 2.0}}


# LCM


def test_the_embedding_of_the_guidance_scale_is_that_of_diffusers():
    """Its pipeline gives scale - 1, in the paper's notation."""
    theirs = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, torch.tensor([7.5, 0.0]), embedding_dim=16
    )
    ours = fs.guidance_embedding(torch.tensor([8.5, 1.0]), 16)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)  # angles of thousands in float32
    assert fs.guidance_embedding(8.5, 17, batch=3).shape == (3, 17)
    with pytest.raises(ValueError, match="at least 4 numbers, got size 2"):
        fs.guidance_embedding(8.5, 2)


def test_a_network_distilled_with_guidance_says_how_to_embed_the_scale():
    model = model_of(CASES["lcm"])
    with pytest.raises(ValueError, match=r"needs the condition 'timestep_cond'.*fs\.guidance_embedding\(scale, 16\)"):
        model.predict(random(BATCH, 4, 8, 8, seed=0), fs.node(model.schedule, 500.0), **embeds(1))


# AnimateDiff


def test_a_prompt_for_every_frame_is_taken_too():
    case = CASES["motion"]
    model, x, frames = model_of(case), random(BATCH, *case.shape, seed=0), text(1).repeat_interleave(3, dim=0)
    node = fs.node(model.schedule, 500.0)
    with torch.no_grad():
        torch.testing.assert_close(
            model.predict(x, node, encoder_hidden_states=frames), model.predict(x, node, **case.cond)
        )


# the time


@pytest.mark.parametrize("name", ["Lumina2Transformer2DModel", "ZImageTransformer2DModel"])
def test_networks_told_the_time_backwards_are_refused(name):
    network = type(name, (torch.nn.Module,), {"forward": lambda self, x, timestep, return_dict=True: None})()
    with pytest.raises(ValueError, match=rf"{name} is told its time or predicts the flow with another sign"):
        fs.from_diffusers(network, diffusers.FlowMatchEulerDiscreteScheduler())


def test_the_time_may_be_said():
    case = CASES["sd3"]
    model = fs.from_diffusers(case.network(), case.scheduler(), time="unit")
    assert model.time is fs.TIMES["unit"]


def test_networks_known_by_name_are_those_of_diffusers():
    from fastsample.adapters.diffusers import KNOWN

    assert [name for name in KNOWN if not hasattr(diffusers, name)] == []


def test_a_class_made_of_a_known_one_is_known():
    """As FSDP2 makes one."""
    case = CASES["flux"]
    network = case.network()
    network.__class__ = type("FSDPFluxTransformer2DModel", (type(network),), {})
    assert fs.from_diffusers(network, case.scheduler(), mu=0.5).time is fs.TIMES["unit"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "flux", "motion"])
def test_a_model_compiles_to_one_graph(name):
    case = CASES[name]
    model, x = model_of(case), random(BATCH, *case.shape, seed=0)
    condition = {**case.cond, **case.shared}
    graph = torch.compile(model.network, backend="eager", fullgraph=True)
    t = torch.full((BATCH,), 0.5)
    with torch.no_grad():
        torch.testing.assert_close(graph(x, t, **condition), model.network(x, t, **condition))


def test_a_copy_of_a_model_is_another_network():
    model = copy.deepcopy(model_of(CASES["sd15"]))
    assert model.network.needs.keys() == {"encoder_hidden_states"}
