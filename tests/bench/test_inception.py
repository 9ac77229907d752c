"""The network of the FID, without its weights: its layout against the published file's, its numbers against a peer."""

import importlib.util
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsample.bench import inception
from fastsample.bench.fid import prepared
from fastsample.bench.resize import resize_tf1

PEER = runpy.run_path(str(Path(__file__).parent / "inception_peer.py"))


def test_every_tensor_has_the_name_and_shape_of_the_published_file():
    wanted = {"fc.bias": (1008,)}
    for name, shape in PEER["layout"]().items():
        if name == "fc":
            wanted["fc.weight"] = shape
            continue
        wanted[f"{name}.conv.weight"] = shape
        wanted |= {f"{name}.bn.{of}": shape[:1] for of in ("weight", "bias", "running_mean", "running_var")}
        wanted[f"{name}.bn.num_batches_tracked"] = ()
    with torch.device("meta"):
        found = {name: tuple(tensor.shape) for name, tensor in inception.Inception().state_dict().items()}
    assert found == wanted
    assert len(found) == 566  # entries of the published file


def test_it_has_23850960_parameters():
    """Convolutions, the two of every normalisation, and the layer of 1008 classes; 21,785,568 without the last."""
    with torch.device("meta"):
        network = inception.Inception()
    assert sum(p.numel() for p in network.parameters()) == 23_850_960
    assert sum(p.numel() for p in network.fc.parameters()) == 1008 * 2049


def test_loading_draws_no_random_numbers_and_leaves_nothing_to_train(inception_file):
    before = torch.get_rng_state()
    network = inception.load_inception(inception_file)
    assert torch.equal(torch.get_rng_state(), before)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    for name, tensor in torch.load(inception_file, weights_only=True).items():
        assert torch.equal(network.state_dict()[name], tensor), name


def test_a_file_of_another_layout_is_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match="Missing key"):
        inception.load_inception(tmp_path / "other.pth")


def pool_branch(block, x):
    """What the pool of a block makes of channel 0 of x, by a branch_pool that only passes that on."""
    weight = torch.zeros_like(block.branch_pool.conv.weight)
    weight[0, 0] = 1
    block.branch_pool.conv.weight.data = weight
    with torch.no_grad():
        return block.eval()(x)[:, -len(weight)] * (1 + 1e-3) ** 0.5  # eps of the normalisation, whose variance is 1


@pytest.mark.parametrize(
    ("block", "channels"),
    [
        (lambda: inception.block_a(192, pooled=32), 192),
        (lambda: inception.block_c(768, inner=128), 768),
        (lambda: inception.block_e(1280, inception.average), 1280),
    ],
    ids=["A", "C", "E1"],
)
def test_averages_leave_the_padding_out(block, channels):
    """With the padding in them, as torchvision has it, corners would be 4/9 and edges 6/9."""
    torch.testing.assert_close(pool_branch(block(), torch.ones(1, channels, 4, 4)), torch.ones(1, 4, 4))


def test_the_last_block_takes_the_greatest_and_the_one_before_it_the_average():
    network = inception.Inception()
    point = torch.zeros(1, 2048, 5, 5)
    point[:, :, 2, 2] = 9
    around = torch.zeros(1, 5, 5)
    around[:, 1:4, 1:4] = 1
    torch.testing.assert_close(pool_branch(network.Mixed_7c, point), 9 * around)
    torch.testing.assert_close(pool_branch(network.Mixed_7b, point[:, :1280]), around)


def test_every_normalisation_has_the_epsilon_of_the_published_graph():
    with torch.device("meta"):
        found = [m.eps for m in inception.Inception().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert found == [1e-3] * 94


def test_features_are_means_over_pixels_and_logits_are_linear_in_them(inception_file):
    network = inception.load_inception(inception_file)
    maps = []
    network.Mixed_7c.register_forward_hook(lambda module, given, made: maps.append(made))
    features = network(torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert maps[0].shape == (2, 2048, 8, 8)
    torch.testing.assert_close(features, maps[0].flatten(2).mean(2))
    weight, bias = network.fc.weight, network.fc.bias
    torch.testing.assert_close(network.logits(features), features @ weight.T + bias)
    torch.testing.assert_close(network.logits(features, bias=False), features @ weight.T)


def agree_with(kinds, images, weights):
    """From bytes on, with the same weights: to float32's rounding through 48 layers, by the size of the greatest."""
    network = inception.load_inception(weights)
    with torch.no_grad():
        features = network(prepared(images / 127.5 - 1))
        ours = {
            "2048": features,
            "logits": network.logits(features),
            "logits_unbiased": network.logits(features, bias=False),
        }
    for kind, found in ours.items():
        wanted = torch.as_tensor(kinds[kind])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_features_and_logits_are_what_torch_fidelity_made_of_the_same_images_and_weights(inception_file):
    with np.load(PEER["KEPT"], allow_pickle=False) as kept:
        agree_with(kept, PEER["random_images"](33, 57), inception_file)


@pytest.fixture
def torch_fidelity():
    """Its modules by name; what it imports is forgotten afterwards."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("needs torch-fidelity: pip install --no-deps torch-fidelity")
    before = set(sys.modules)
    yield PEER["peer"]
    for name in [name for name in sys.modules if name.startswith("torch_fidelity") and name not in before]:
        del sys.modules[name]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (400, 257)])
def test_they_are_those_of_the_torch_fidelity_that_is_installed(torch_fidelity, inception_file, height, width):
    images = PEER["random_images"](height, width)
    agree_with(PEER["peer_features"](images, inception_file), images, inception_file)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 48), (299, 299), (400, 257)])
def test_the_resize_is_that_of_the_torch_fidelity_that_is_installed(torch_fidelity, height, width):
    images = PEER["random_images"](height, width).float()
    resize = torch_fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    wanted = resize(images, size=(299, 299), align_corners=False)
    torch.testing.assert_close(resize_tf1(images, 299, 299), wanted, rtol=0, atol=1e-4)  # float32 of up to 255
