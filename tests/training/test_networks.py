"""Networks: their sizes, the sources of their initial weights, and the features that KD compares."""

import hashlib
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from tune_kd.system.errors import UserError
from tune_kd.training import networks


def small(**changes):
    settings = {"stem": "cifar", "classes": 10, "width": 0.125, "seed": 0} | changes
    return networks.build(settings.pop("architecture", "resnet18"), **settings)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("architecture", "stem", "count"),
    [
        ("resnet50", "cifar", 23_520_842),
        ("resnet18", "cifar", 11_173_962),
        ("resnet50", "imagenet", 23_528_522),
        ("resnet18", "imagenet", 11_181_642),
    ],
)
def test_the_study_networks_have_their_known_parameter_counts(architecture, stem, count):
    assert networks.parameter_count(networks.build(architecture, stem=stem, classes=10, seed=0)) == count


def test_frozen_parameters_are_not_counted():
    net = small()
    count = networks.parameter_count(net)
    net.fc.requires_grad_(False)
    assert networks.parameter_count(net) == count - net.fc.weight.numel() - net.fc.bias.numel()


@pytest.mark.parametrize("architecture", networks.ARCHITECTURES)
def test_networks_of_standard_width_have_torchvisions_structure(architecture):
    ours = networks._blueprint(architecture, stem="imagenet", classes=7, width=1.0)
    with torch.device("meta"):
        theirs = torchvision.models.get_model(architecture, weights=None, num_classes=7)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("architecture", networks.ARCHITECTURES)
@pytest.mark.parametrize(
    ("width", "planes"),
    [
        (1.0, (64, 128, 256, 512)),
        (0.125, (8, 16, 32, 64)),
        (0.3, (19, 38, 77, 154)),
        (0.001, (1, 1, 1, 1)),
        (2.0, (128, 256, 512, 1024)),
    ],
)
def test_width_scales_stem_and_all_stages_to_the_nearest_whole_channel(architecture, width, planes):
    net = networks._blueprint(architecture, stem="cifar", classes=10, width=width)
    expansion = 1 if architecture in ("resnet18", "resnet34") else 4
    assert net.conv1.out_channels == planes[0]
    shapes = networks.shapes(architecture, stem="cifar", classes=10, width=width, size=(32, 32))
    assert [channels for channels, _, _ in shapes.taps] == [expansion * count for count in planes]


@pytest.mark.parametrize(("stem", "first"), [("cifar", 32), ("imagenet", 8)])
@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_features_come_from_four_stages_that_halve_in_size(architecture, stem, first):
    net = small(architecture=architecture, stem=stem)
    passed = networks.forward_with_features(net, torch.rand(2, 3, 32, 32))
    shapes = networks.shapes(architecture, stem=stem, classes=10, width=0.125, size=(32, 32))
    assert [tuple(stage.shape) for stage in passed.features] == [(2, *tap) for tap in shapes.taps]
    assert [tap[1:] for tap in shapes.taps] == [(first // 2**i, first // 2**i) for i in range(4)]
    assert passed.embedding.shape == (2, shapes.embedding)
    assert passed.logits.shape == (2, shapes.logits)
    torch.testing.assert_close(passed.embedding, passed.features[-1].mean((2, 3)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_collecting_features_before_relu_changes_no_logits_or_features(architecture, training):
    net, twin = (small(architecture=architecture).train(training) for _ in range(2))
    images = torch.rand(4, 3, 32, 32)
    plain, passed = networks.forward_with_features(net, images), networks.forward_with_features(twin, images, True)
    assert torch.equal(passed.logits, plain.logits)
    for before, after, expected in zip(passed.before_relu, passed.features, plain.features, strict=True):
        assert before.min() < 0
        assert torch.equal(torch.relu(before), after)
        assert torch.equal(after, expected)
    assert all(torch.equal(one, other) for one, other in zip(net.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize(
    ("architecture", "needs"), [("resnet18", "features"), ("resnet18", "before_relu"), ("resnet50", "before_relu")]
)
def test_a_wrapped_network_has_the_same_outputs_and_gradients(architecture, needs):
    net, twin = (small(architecture=architecture) for _ in range(2))
    alone, inside = networks.passing(net, needs), networks.passing(wrapped := torch.nn.Sequential(twin), needs)
    images = torch.rand(4, 3, 16, 16)
    for _ in range(2):  # the second pass must replace the values of the first
        expected, passed = alone(net, images), inside(wrapped, images)
        assert len(passed.before_relu) == (4 if needs == "before_relu" else 0)
        tensors = [parts(each) for each in (expected, passed)]
        assert all(torch.equal(one, other) for one, other in zip(*tensors, strict=True))
        for part in tensors:
            sum(each.square().mean() for each in part).backward()
        pairs = zip(net.parameters(), twin.parameters(), strict=True)
        assert all(torch.equal(one.grad, other.grad) for one, other in pairs)


@pytest.mark.parametrize("stem", networks.STEMS)
@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_folding_batch_norms_changes_outputs_only_by_rounding(architecture, stem):
    net = small(architecture=architecture, stem=stem).eval()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for norm in (each for each in net.modules() if isinstance(each, torch.nn.BatchNorm2d)):
            torch.nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(norm.running_var, 0.5, 2)
            torch.nn.init.uniform_(norm.weight, -1, 1)
            torch.nn.init.uniform_(norm.bias, -0.5, 0.5)
        images = torch.rand(4, 3, 32, 32)
    before = {name: each.clone() for name, each in net.state_dict().items()}
    folded = networks.folded(net)
    assert not any(isinstance(each, torch.nn.BatchNorm2d) for each in folded.modules())
    with torch.no_grad():
        for before_relu in (False, True):
            expected, found = (networks.forward_with_features(each, images, before_relu) for each in (net, folded))
            for one, other in zip(parts(expected), parts(found), strict=True):
                scale = one.abs().max()
                torch.testing.assert_close(other / scale, one / scale, rtol=0, atol=1e-5)
    assert all(torch.equal(each, before[name]) for name, each in net.state_dict().items()), "the original stays"


def parts(passed):
    return [passed.logits, passed.embedding, *passed.features, *passed.before_relu]


def test_folding_a_batch_norm_that_follows_no_convolution_raises():
    with pytest.raises(RuntimeError, match="1 does not follow a convolution"):
        networks.folded(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.BatchNorm2d(3)).eval())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stem", networks.STEMS)
def test_logits_returned_with_features_equal_those_of_the_network(stem, training):
    net = small(stem=stem).train(training)
    images = torch.rand(4, 3, 32, 32)
    expected = net(images)
    logits = networks.forward_with_features(net, images).logits
    assert torch.equal(logits, expected)


def test_returned_features_equal_the_outputs_of_the_stages():
    # Guards against a later in-place ReLU or addition that changes a returned feature.
    net = small().eval()
    seen = []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        stage.register_forward_hook(lambda module, arguments, output: seen.append(output.clone()))
    features = networks.forward_with_features(net, torch.rand(2, 3, 32, 32)).features
    assert all(torch.equal(feature, output) for feature, output in zip(features, seen, strict=True))


def test_a_seed_gives_the_same_weights_whatever_was_drawn_before():
    torch.manual_seed(1)
    first = small(seed=5)
    torch.manual_seed(2)
    torch.rand(7)
    assert same_weights(first, small(seed=5))
    assert same_weights(first, small(seed=np.int64(5)))


def test_seeds_give_different_weights():
    assert not same_weights(small(seed=5), small(seed=6))


def test_the_weights_of_a_seed_are_pinned():
    # A trial's id does not cover the random numbers of a seed, so a changed stream would mix two populations.
    net = small(seed=0)
    drawn = [net.conv1.weight[0, 0, 0, 0].item(), net.fc.weight[0, 0].item()]
    assert drawn == pytest.approx([-0.15533717, 0.0019571036], rel=1e-5)


def test_building_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    net = small()
    with networks.stream("projections", 0):
        nn.Conv2d(3, 3, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert net is not None


@pytest.mark.parametrize("stem", networks.STEMS)
def test_initialisation_follows_torchvisions_scheme(stem):
    net = networks.build("resnet18", stem=stem, classes=1000, seed=0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            scaled = module.weight * (fan_out / 2) ** 0.5
            # The standard deviation of n normal draws is 1 with a standard error of 1/sqrt(2n); five of those.
            assert scaled.std().item() == pytest.approx(1, abs=5 / (2 * scaled.numel()) ** 0.5)
            assert scaled.mean().item() == pytest.approx(0, abs=5 / scaled.numel() ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            ones, zeros = torch.ones(module.num_features), torch.zeros(module.num_features)
            assert torch.equal(module.weight, ones)
            assert torch.equal(module.bias, zeros)
            assert torch.equal(module.running_mean, zeros)
            assert torch.equal(module.running_var, ones)
            assert module.num_batches_tracked == 0
    bound = 512**-0.5
    assert 0.99 * bound < net.fc.weight.abs().max() <= bound
    assert 0 < net.fc.bias.abs().max() <= bound


def test_the_streams_of_network_and_projections_differ():
    # With one stream for both, the first projection would repeat the first draws of the stem.
    with networks.stream("network", 0):
        network = torch.rand(8)
    with networks.stream("projections", 0):
        assert not torch.equal(torch.rand(8), network)


def test_a_streams_seed_is_the_sha256_of_its_name_and_numbers():
    seed = int.from_bytes(hashlib.sha256(b"loss 3 2").digest()[:8], "big")
    with networks.stream("loss", 3, 2):
        drawn = torch.rand(8)
    assert torch.equal(drawn, torch.rand(8, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "resnet19"},
        {"stem": "mnist"},
        {"weights": "mine"},
        {"classes": 0},
        {"width": 0.0},
        {"width": float("nan")},
        {"weights": "imagenet"},  # of width 0.125
    ],
)
def test_building_a_network_with_invalid_settings_raises(changes):
    with pytest.raises(AssertionError):
        small(**changes)


def test_importing_networks_does_not_import_torchvision():
    # Reading results should not wait seconds for it.
    code = "import sys, tune_kd.training.networks; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def torch_home(tmp_path, monkeypatch) -> Path:
    """A separate folder for weights, and no network: nothing listens on port 1."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setitem(NAMED, "hash", "0123abcd")
    monkeypatch.setattr(networks, "imagenet_url", lambda name: f"http://127.0.0.1:1/{name}-{NAMED['hash']}.pth")
    return tmp_path


NAMED = {"hash": ""}  # the digest in the published file's name


def save(state) -> Path:
    content = io.BytesIO()
    torch.save(state, content)
    return put(content.getvalue())


def put(content: bytes) -> Path:
    """Write a file as if it were the published one."""
    NAMED["hash"] = hashlib.sha256(content).hexdigest()[:8]
    file = networks.imagenet_file("resnet18")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def test_weights_whose_hash_does_not_match_their_name_are_rejected(torch_home, published):
    file = save(published)
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"has SHA-256 .*; expected .*; remove it, and it is downloaded again"):
        networks.build("resnet18", stem="cifar", classes=10, weights="imagenet", seed=0)


@pytest.fixture(scope="session")
def published() -> dict[str, torch.Tensor]:
    """Random weights in the form of torchvision's file, which has no batch counters."""
    net = torchvision.models.resnet18(weights=None)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.get_buffer("running_mean"))
    return {name: v for name, v in net.state_dict().items() if not name.endswith("num_batches_tracked")}


def test_imagenet_weights_are_looked_up_in_the_folder_of_torch_hub():
    place = Path(torch.hub.get_dir()) / "checkpoints" / "resnet18-f37072fd.pth"
    assert networks.imagenet_file("resnet18") == place


@pytest.mark.parametrize(
    ("stem", "classes", "fresh"),
    [
        ("cifar", 10, {"conv1.weight", "fc.weight", "fc.bias"}),
        ("imagenet", 10, {"fc.weight", "fc.bias"}),
        ("imagenet", 1000, set()),
    ],
)
def test_imagenet_weights_replace_all_but_tensors_of_another_shape(torch_home, published, stem, classes, fresh):
    save(published)
    from_scratch = networks.build("resnet18", stem=stem, classes=classes, seed=4).state_dict()
    net = networks.build("resnet18", stem=stem, classes=classes, weights="imagenet", seed=4)
    state = net.state_dict()
    for name in published:
        assert torch.equal(state[name], from_scratch[name] if name in fresh else published[name]), name


def test_batch_counters_in_the_file_are_accepted(torch_home, published):
    save(torchvision.models.resnet18(weights=None).state_dict())
    networks.build("resnet18", stem="cifar", classes=10, weights="imagenet", seed=0)


def test_a_failed_download_is_reported_with_the_file_and_where_to_copy_it(torch_home):
    with pytest.raises(UserError) as caught:
        networks.build("resnet18", stem="cifar", classes=10, weights="imagenet", seed=0)
    file = torch_home / "hub" / "checkpoints" / "resnet18-0123abcd.pth"
    message = str(caught.value)
    assert "could not be downloaded from http://127.0.0.1:1/" in message
    assert f"download {file.name} on another machine, and copy it to {file}" in message
    assert not list(file.parent.iterdir())


def test_an_unwritable_weights_folder_is_reported_with_the_variable_that_moves_it(torch_home):
    (torch_home / "hub").write_text("in the way")
    with pytest.raises(UserError) as caught:
        networks.fetch_imagenet("resnet18")
    kept = f"cannot be stored in {torch_home}/hub/checkpoints"
    assert f"{kept} (Not a directory); set TORCH_HOME to a writable folder" in str(caught.value)


def test_a_download_is_stored_only_if_its_hash_matches_its_name(torch_home, monkeypatch):
    content = b"weights"
    source = torch_home / "published"
    source.write_bytes(content)
    right = hashlib.sha256(content).hexdigest()[:8]

    def url(architecture: str) -> str:
        # A file: URL with the hash in its name, like torchvision's URLs.
        link = torch_home / f"{architecture}-{right if architecture == 'resnet18' else '00000000'}.pth"
        link.write_bytes(content)
        return link.as_uri()

    monkeypatch.setattr(networks, "imagenet_url", url)
    assert networks.fetch_imagenet("resnet18").read_bytes() == content
    with pytest.raises(UserError, match="invalid hash value"):
        networks.fetch_imagenet("resnet34")
    assert not networks.imagenet_file("resnet34").exists()


def test_an_existing_weights_file_is_not_downloaded_again(torch_home, published):
    file = save(published)
    assert networks.fetch_imagenet("resnet18") == file


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: without(state, "bn1.bias"), "lacks weights of resnet18: 1 in all, the first is bn1.bias"),
        (lambda state: state | {"extra": torch.ones(1)}, "that resnet18 does not have: 1 in all, the first is extra"),
        (
            lambda state: state | {"bn1.bias": torch.ones(3)},
            "another shape than resnet18's: 1 in all, the first is bn1.bias (got (3,), expected (64,))",
        ),
        (lambda state: torch.ones(3), "holds a Tensor; expected a dict of tensors by name"),
        (lambda state: state | {"bn1.bias": Path("x")}, "cannot be read as weights (UnpicklingError)"),
    ],
)
def test_a_weights_file_with_wrong_contents_is_reported_with_its_fault(torch_home, published, damage, message):
    file = save(damage(published))
    with pytest.raises(UserError) as caught:
        networks.build("resnet18", stem="cifar", classes=10, weights="imagenet", seed=0)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 a damaged archive"])
def test_an_unreadable_weights_file_is_reported_by_name(torch_home, content):
    file = put(content)
    with pytest.raises(UserError, match="cannot be read as weights") as caught:
        networks.build("resnet18", stem="cifar", classes=10, weights="imagenet", seed=0)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(("width", "last"), [(1.0, True), (0.125, True), (0.0625, False)])
def test_the_cpu_uses_channels_last_only_if_channels_are_multiples_of_8(width: float, last: bool) -> None:
    """With 4 channels, torch 2.15's gradient corrupts memory in that layout."""
    net = networks.build("resnet18", stem="cifar", classes=10, width=width, seed=0)
    networks.to_device(net, torch.device("cpu"))
    assert net.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last) == last
