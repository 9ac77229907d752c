"""What is saved loads as the same model; what is damaged is refused by name."""

import json

import pytest
import torch

import fastsample as fs

diffusers = pytest.importorskip("diffusers")


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
        norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return fs.from_diffusers(network.eval(), diffusers.DDPMScheduler(prediction_type="v_prediction"))


def test_a_saved_model_predicts_the_same_after_loading(model, tmp_path):
    fs.save_pretrained(model, tmp_path / "model")
    loaded = fs.from_pretrained(tmp_path / "model")
    x, node = torch.randn(2, 1, 8, 8), fs.node(model.schedule, 500.0)
    assert loaded.schedule == model.schedule
    with torch.no_grad():
        torch.testing.assert_close(loaded.predict(x, node), model.predict(x, node), rtol=0, atol=0)


@pytest.mark.parametrize("schedule", [fs.EDM(), fs.Flow(shift=3.0), fs.VPContinuous()], ids=repr)
def test_every_schedule_survives_saving(model, schedule, tmp_path):
    fs.save_pretrained(fs.Denoiser(model.network, schedule, "x0"), tmp_path)
    loaded = fs.from_pretrained(tmp_path)
    assert loaded.schedule == schedule
    assert loaded.prediction.name == "x0"


def test_diffusers_loads_the_folder_itself(model, tmp_path):
    fs.save_pretrained(model, tmp_path)
    assert diffusers.UNet2DModel.from_pretrained(tmp_path).num_parameters() > 0


def test_others_may_read_what_is_saved(model, tmp_path):
    fs.save_pretrained(model, tmp_path)
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_a_flipped_byte_in_the_weights_is_refused(model, tmp_path):
    fs.save_pretrained(model, tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"safetensors is damaged.*get it again"):
        fs.from_pretrained(tmp_path)


def test_an_unfinished_folder_is_refused(model, tmp_path):
    fs.save_pretrained(model, tmp_path)
    (tmp_path / "fastsample.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no fastsample\.json"):
        fs.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"format": "x"}', '{"format": "fastsample.model", "version": 99}',
        "[" * 100_000, '{"format": "fastsample.model", "version": ' + "1" * 6000 + "}",
    ],
    ids=lambda text: repr(text[:60]),
)  # fmt: skip
def test_a_damaged_manifest_is_refused(model, tmp_path, text):
    fs.save_pretrained(model, tmp_path)
    (tmp_path / "fastsample.json").write_text(text)
    with pytest.raises(ValueError, match=r"fastsample\.json"):
        fs.from_pretrained(tmp_path)


def test_a_class_that_is_no_network_is_refused(model, tmp_path):
    fs.save_pretrained(model, tmp_path)
    manifest = json.loads((tmp_path / "fastsample.json").read_text())
    (tmp_path / "fastsample.json").write_text(json.dumps({**manifest, "network": "DDPMScheduler"}))
    with pytest.raises(ValueError, match="has no network 'DDPMScheduler'"):
        fs.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"sha256": ["a"]},
        {"sha256": None},
        {"schedule": {"type": "VP", "betas": "wrong"}},
        {"schedule": {"type": "VP", "betas": [0.1, 2.0]}},
        {"schedule": {"type": "VP", "betas": [0.1, 10**400]}},
        {"schedule": {"type": "EDM", "sigma_min": "wrong"}},
        {"schedule": {"type": ["VP"]}},
    ],
    ids=str,
)
def test_a_manifest_with_wrong_values_is_refused_by_its_name(model, tmp_path, changes):
    fs.save_pretrained(model, tmp_path)
    manifest = json.loads((tmp_path / "fastsample.json").read_text())
    (tmp_path / "fastsample.json").write_text(json.dumps({**manifest, **changes}))
    with pytest.raises(ValueError, match=r"fastsample\.json is damaged"):
        fs.from_pretrained(tmp_path)


def test_a_compiled_network_is_saved_as_the_one_it_was_made_of(model, tmp_path):
    inner = torch.compile(model.network.network, backend="eager")
    fs.save_pretrained(fs.from_diffusers(inner, diffusers.DDPMScheduler()), tmp_path)
    assert type(fs.from_pretrained(tmp_path).network.network) is diffusers.UNet2DModel


def test_a_schedule_of_ones_own_cannot_be_saved(model, tmp_path):
    class Mine(fs.VPContinuous):
        pass

    with pytest.raises(ValueError, match="schedule of your own, which cannot be saved"):
        fs.save_pretrained(fs.Denoiser(model.network, Mine(), "v"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_plain_network_or_a_time_of_ones_own_cannot_be_saved(model, tmp_path):
    with pytest.raises(ValueError, match="needs a diffusers network"):
        fs.save_pretrained(fs.Denoiser(torch.nn.Identity(), fs.VP.linear()), tmp_path)
    own = fs.Denoiser(model.network, fs.VP.linear(), time=lambda schedule, node: node.t)
    with pytest.raises(ValueError, match="cannot be saved"):
        fs.save_pretrained(own, tmp_path)


def test_a_missing_file_is_called_missing(model, tmp_path):
    fs.save_pretrained(model, tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors is missing"):
        fs.from_pretrained(tmp_path)


@pytest.fixture
def labelled():
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=5,
    )  # fmt: skip
    return fs.from_diffusers(network.eval(), diffusers.DDPMScheduler())


def test_the_label_of_no_class_is_saved_and_kept_when_saved_again(labelled, tmp_path):
    fs.save_pretrained(labelled, tmp_path / "a", null=4)
    loaded = fs.from_pretrained(tmp_path / "a")
    assert loaded.network.null == 4
    fs.save_pretrained(loaded, tmp_path / "b")
    assert fs.from_pretrained(tmp_path / "b").network.null == 4


def test_a_folder_without_a_label_of_no_class_has_none(labelled, tmp_path):
    fs.save_pretrained(labelled, tmp_path)
    assert "null" not in json.loads((tmp_path / "fastsample.json").read_text())
    assert fs.from_pretrained(tmp_path).network.null is None


def test_a_label_that_the_network_has_not_is_refused_as_null(labelled, model, tmp_path):
    for null in (5, -1, 2.0):
        with pytest.raises(ValueError, match=r"null must be one of the network's 5 class labels"):
            fs.save_pretrained(labelled, tmp_path / "new", null=null)
    with pytest.raises(ValueError, match=r"null must be one of the network's 0 class labels"):
        fs.save_pretrained(model, tmp_path / "new", null=0)
    assert not (tmp_path / "new").exists()


def test_a_manifest_with_a_null_that_is_no_label_is_refused(labelled, tmp_path):
    fs.save_pretrained(labelled, tmp_path, null=4)
    manifest = json.loads((tmp_path / "fastsample.json").read_text())
    (tmp_path / "fastsample.json").write_text(json.dumps({**manifest, "null": "none"}))
    with pytest.raises(ValueError, match=r"fastsample\.json is damaged"):
        fs.from_pretrained(tmp_path)
