"""Distillation with standard networks: the ImageNet stem, starting from torchvision's ImageNet weights.

Question: does distillation help if the stem shrinks 32x32 images to 8x8 before the first block?
Source: the first experiment of the first published study, with its sweeps; seeds and split of `ablation`.
Command: python -m tune_kd run standard_stem [--scale paper|laptop|smoke] [--data cifar10|cifar100]
Cost: paper is 55 trials for GPUs; laptop takes about two minutes on two cores; smoke seconds.
"""

from dataclasses import replace

from search_spaces import cifar_stem
from tune_kd import Compare, Factor, Study


def study() -> Study:
    """Logit: alpha at T = 4, then T at alpha = 0.5. Feature: alpha. In addition, the control."""
    base = _standard(cifar_stem.study())
    return replace(base, cell=replace(base.cell, weights="imagenet"))


def laptop(data: str = "digits") -> Study:
    """The same arms in minutes on two cores, from scratch: there are no ImageNet weights for 1/8 width."""
    return _standard(cifar_stem.laptop(data))


def smoke(data: str = "digits") -> Study:
    """The same arms in seconds, to check an installation. Its numbers mean nothing."""
    return _standard(cifar_stem.smoke(data))


def _standard(base: Study) -> Study:
    method, _, alpha = base.factors
    return replace(
        base,
        name="standard_stem",
        question="Does any distillation help a student with the ImageNet stem, at which alpha and temperature?",
        factors=(method, Factor("temperature", (2.0, 4.0, 8.0)), alpha),
        reference=(("temperature", 4.0), ("alpha", 0.5)),
        cell=replace(base.cell, stem="imagenet"),
        contrasts=(
            *(each for each in base.contrasts if each.factor != "temperature"),
            Compare("temperature", 2.0, 4.0, family="secondary"),
            Compare("temperature", 8.0, 4.0, family="secondary"),
        ),
    )


SCALES = {"paper": study, "laptop": laptop, "smoke": smoke}
