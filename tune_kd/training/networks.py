"""torchvision's residual networks with a choice of stem and width, and the features that distillation compares.

Axes in tensor names: B batch, K classes, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import io
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache, partial
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from tune_kd.study.spec import ARCHITECTURES, STEMS, WEIGHTS
from tune_kd.system.environment import make_private
from tune_kd.system.errors import UnexpectedFile, UserError, raise_problems
from tune_kd.system.files import check_regular, read
from tune_kd.training.loss import Shapes

MOST_WEIGHTS_BYTES = 2**30  # the largest of torchvision's ResNets has 242 MB

if TYPE_CHECKING:  # importing torchvision takes seconds, and reading results does not need it
    from torchvision.models import ResNet


def build(
    architecture: str, *, stem: str, classes: int, width: float = 1.0, weights: str = "none", seed: int
) -> ResNet:
    """Build a ResNet on the CPU, with initial weights that depend on the arguments alone.

    Maps images [B, 3, H, W] to logits [B, classes]. The stem `imagenet` is a 7x7 convolution of stride 2 and a 3x3
    max-pool of stride 2; `cifar` is a 3x3 convolution of stride 1 without pooling. `width` multiplies the standard
    channel counts. With weights `imagenet`, parameters come from torchvision's IMAGENET1K_V1, except those of another
    shape, which are initialised: the first convolution for `cifar`, and the classifier unless there are 1,000 classes.

    The study has validated the arguments. Raises `UserError` for weights that cannot be downloaded or read.
    Source: He et al. 2016, "Deep residual learning for image recognition", as torchvision builds it.
    """
    assert architecture in ARCHITECTURES and stem in STEMS and weights in WEIGHTS and classes > 0
    assert 0 < width < math.inf and (weights == "none" or width == 1)
    state = _imagenet_state(architecture) if weights == "imagenet" else {}
    net = _blueprint(architecture, stem, classes, width).to_empty(device="cpu")
    _initialise(net, seed)
    # Missing keys are accepted because torchvision's old files have no batch counters; `_imagenet_state` has checked
    # everything else.
    here = net.state_dict()
    net.load_state_dict({k: v for k, v in state.items() if v.shape == here[k].shape}, strict=False)
    return net


def parameter_count(net: nn.Module) -> int:
    """The number of trainable scalars, without running statistics."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def to_device(net: nn.Module, device: torch.device) -> None:
    """Move a convolutional network to a device, in place, in the fastest safe memory layout.

    That is channels last, except on a CPU if a channel count other than the 3 of the input is not a multiple of 8:
    oneDNN's weight gradient of 4 channels (torch 2.15, AVX2) writes out of bounds.
    """
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    whole = all(each.out_channels % 8 == 0 and each.in_channels % 8 in (0, 3) for each in convolutions)
    last = whole or device.type != "cpu"
    net.to(device)
    if last:
        net.to(memory_format=torch.channels_last)


def folded(net: ResNet) -> ResNet:
    """A copy of a network in eval mode, with each batch norm folded into the convolution before it.

    Its outputs differ only by rounding. Raises RuntimeError if a batch norm does not follow a convolution.
    """
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    copy = deepcopy(net)
    for parent in list(copy.modules()):
        for (name, before), (norm_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(before, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(before, norm))
                setattr(parent, norm_name, nn.Identity())
    if left := [name for name, each in copy.named_modules() if isinstance(each, nn.BatchNorm2d)]:
        raise RuntimeError(f"{left[0]} does not follow a convolution")
    return copy


def in_layout_of(net: nn.Module, images: Tensor) -> Tensor:
    """Convert images [B, 3, H, W] to the memory layout of a network's weights.

    Otherwise the first convolution converts them twice: in its forward pass and for the gradient of its weights.
    """
    first = next(net.parameters())
    last = first.is_contiguous(memory_format=torch.channels_last)
    return images.contiguous(memory_format=torch.channels_last) if last else images


class Passed(NamedTuple):
    """Outputs of a forward pass. Outputs that were not requested are empty or None."""

    logits: Tensor  # [B, K]
    features: tuple[Tensor, ...] = ()  # outputs of the four stages, [B, C_i, H_i, W_i]
    before_relu: tuple[Tensor, ...] = ()  # the same before each stage's last ReLU
    embedding: Tensor | None = None  # [B, E], input of the classifier


def forward(net: nn.Module, images: Tensor) -> Passed:
    """The logits alone."""
    return Passed(net(images))


def forward_with_features(net: ResNet, images: Tensor, before_relu: bool = False) -> Passed:
    """The logits, exactly those of `net(images)`, with the features of the stages."""
    stage_BCHW = net.maxpool(net.relu(net.bn1(net.conv1(images))))
    features, before = [], []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        if before_relu:
            before.append(_without_last_relu(stage[-1], stage[:-1](stage_BCHW)))
            stage_BCHW = torch.relu(before[-1])
        else:
            stage_BCHW = stage(stage_BCHW)
        features.append(stage_BCHW)
    embedding_BE = torch.flatten(net.avgpool(stage_BCHW), 1)
    return Passed(net.fc(embedding_BE), tuple(features), tuple(before), embedding_BE)


def passing(student: nn.Module, needs: str) -> Callable[[nn.Module, Tensor], Passed]:
    """The forward pass of a student, with the outputs that a method needs. Raises ValueError if it has none."""
    from torchvision.models import ResNet

    if needs not in ("features", "before_relu"):
        return forward
    if isinstance(student, ResNet):
        return partial(forward_with_features, before_relu=needs == "before_relu")
    net = next((each for each in student.modules() if isinstance(each, ResNet)), None)
    if net is None:
        raise ValueError(
            f"the method needs {needs!r}, but the student that it returns, {type(student).__name__}, does not contain "
            "the network that it was given, whose stages are the features"
        )
    return _watched(net, before_relu=needs == "before_relu")


def _watched(net: ResNet, before_relu: bool) -> Callable[[nn.Module, Tensor], Passed]:
    """Like `forward_with_features`, for a student that a method built around a ResNet and that calls its parts."""
    seen: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}
    stages = "layer1", "layer2", "layer3", "layer4"

    def keep(name: str, _: nn.Module, given: tuple[Tensor]) -> Tensor:
        before[name] = given[0]  # the last call wins: a block calls its one ReLU several times
        return given[0].clone()  # since the ReLU works in place

    for name in (*stages, "avgpool"):
        getattr(net, name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        if before_relu and name in stages:
            getattr(net, name)[-1].relu.register_forward_pre_hook(partial(keep, name))

    def forward_watched(student: nn.Module, images: Tensor) -> Passed:
        logits = student(images)
        maps, embedding = tuple(seen[name] for name in stages), torch.flatten(seen["avgpool"], 1)
        return Passed(logits, maps, tuple(before[name] for name in stages) if before_relu else (), embedding)

    return forward_watched


def _without_last_relu(block: nn.Module, images: Tensor) -> Tensor:
    """A block of torchvision's ResNets before the ReLU at its end."""
    parts = dict(block.named_children())
    pairs = [(parts[f"conv{number}"], parts[f"bn{number}"]) for number in (1, 2, 3) if f"conv{number}" in parts]
    out = images
    for number, (convolution, norm) in enumerate(pairs, start=1):
        out = norm(convolution(out))
        out = torch.relu(out) if number < len(pairs) else out
    return out + (parts["downsample"](images) if "downsample" in parts else images)


@lru_cache(maxsize=16)
def shapes(architecture: str, *, stem: str, classes: int, width: float, size: tuple[int, int]) -> Shapes:
    """The output shapes of a network for an image of this height and width, found without computing outputs."""
    net = _blueprint(architecture, stem, classes, width).eval()
    passed = forward_with_features(net, torch.zeros(1, 3, *size, device="meta"))
    taps = tuple((each.shape[1], each.shape[2], each.shape[3]) for each in passed.features)
    return Shapes(taps, net.fc.in_features, classes)


def imagenet_url(architecture: str) -> str:
    """The URL of torchvision's IMAGENET1K_V1 weights. The name ends in the first digits of their SHA-256."""
    from torchvision.models import get_model_weights

    return str(get_model_weights(architecture).IMAGENET1K_V1.url)


def imagenet_file(architecture: str) -> Path:
    """The path of torchvision's weights on this machine, whether or not they exist."""
    return Path(torch.hub.get_dir(), "checkpoints", imagenet_url(architecture).rpartition("/")[2])


def fetch_imagenet(architecture: str) -> Path:
    """The file of torchvision's weights, downloaded and verified if it is missing.

    Raises `UserError`, which says which file to put where, if it cannot be downloaded.
    """
    file, url = imagenet_file(architecture), imagenet_url(architecture)
    if file.exists():
        try:
            check_regular(file, MOST_WEIGHTS_BYTES, through_links=True)
        except UnexpectedFile as error:
            raise UserError(f"{error}; remove it, and it is downloaded again") from error
        return file
    try:
        make_private(file.parent)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise UserError(
            f"weights 'imagenet' of {architecture} cannot be stored in {file.parent} ({error.strerror}); "
            "set TORCH_HOME to a writable folder"
        ) from error
    try:
        # Writes to a temporary name and renames: an interrupted download leaves no partial file.
        torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem.rpartition("-")[2], progress=False)
    except (OSError, RuntimeError, HTTPException) as error:
        raise UserError(
            f"weights 'imagenet' of {architecture} could not be downloaded from {url} ({error}); "
            f"download {file.name} on another machine, and copy it to {file}"
        ) from error
    return file


def _blueprint(architecture: str, stem: str, classes: int, width: float) -> ResNet:
    """The network on the meta device: shapes without memory or random draws."""
    from torchvision.models import get_model

    with torch.device("meta"):
        net = get_model(architecture, weights=None, num_classes=classes)
        channels = [max(1, round(standard * width)) for standard in (64, 128, 256, 512)]
        if stem == "cifar":
            net.conv1 = nn.Conv2d(3, channels[0], kernel_size=3, stride=1, padding=1, bias=False)
            net.maxpool = nn.Identity()
        else:
            net.conv1 = nn.Conv2d(3, channels[0], kernel_size=7, stride=2, padding=3, bias=False)
        net.bn1 = nn.BatchNorm2d(channels[0])
        # torchvision fixes the channel counts, so `_make_layer` rebuilds the stages, each with the same kind and number
        # of blocks. It reads and updates `inplanes`.
        net.inplanes = channels[0]
        for name, planes, stride in zip(("layer1", "layer2", "layer3", "layer4"), channels, (1, 2, 2, 2), strict=True):
            standard_stage = getattr(net, name)
            block = type(standard_stage[0])
            setattr(net, name, net._make_layer(block, planes, len(standard_stage), stride))
        net.fc = nn.Linear(net.inplanes, classes)
    return net


def _initialise(net: nn.Module, seed: int) -> None:
    """Initialise like torchvision's ResNets: Kaiming-normal convolutions, batch norms at 1 and 0."""
    with stream("network", seed):
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()


@contextmanager
def stream(name: str, *seeds: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed draws on the CPU, and on `device` if that is a GPU, by `name` and `seeds` inside the context.

    The CPU's global generator is restored at the end. A GPU's is not: only losses draw from it.
    """
    digest = hashlib.sha256(" ".join([name, *map(str, seeds)]).encode()).digest()
    seed = int.from_bytes(digest[:8], "big")
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also reseed the other accelerators without restoring them.
        torch.default_generator.manual_seed(seed)
        if device is not None and device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield


def _imagenet_state(architecture: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights by name, checked against the network."""
    file = fetch_imagenet(architecture)
    expected = file.stem.rpartition("-")[2]
    content = read(file, MOST_WEIGHTS_BYTES)
    found = hashlib.sha256(content).hexdigest()
    if not found.startswith(expected):
        raise UserError(f"{file} has SHA-256 {found[:8]}; expected {expected}; remove it, and it is downloaded again")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any layer of its encoding
        raise UserError(f"{file} cannot be read as weights ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise UserError(f"{file} holds a {type(state).__name__}; expected a dict of tensors by name")
    net = _blueprint(architecture, stem="imagenet", classes=1000, width=1.0)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    got = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    needed = {name for name in shapes if not name.endswith("num_batches_tracked")}
    findings = {
        f"lacks weights of {architecture}": sorted(needed - got.keys()),
        f"holds weights that {architecture} does not have": sorted(map(str, got.keys() - shapes.keys())),
        f"holds weights of another shape than {architecture}'s": [
            f"{name} (got {got[name]}, expected {shapes[name]})"
            for name in shapes
            if name in got and got[name] != shapes[name]
        ],
    }
    problems = [
        f"{file} {finding}: {len(names)} in all, the first is {names[0]}"
        for finding, names in findings.items()
        if names
    ]
    raise_problems(problems)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
