"""Distillation under the CIFAR stem, from scratch: alpha and temperature, one at a time.

Question: which weight of the distillation loss and which temperature, with a stem that keeps the size of 32x32 images?
Source: the second experiment of the first published study, with its sweeps; seeds and split of `ablation`.
Command: python -m tune_kd run cifar_stem [--scale paper|laptop|smoke] [--data cifar10|cifar100]
Cost: paper is 55 trials for GPUs; laptop takes about two minutes on two cores; smoke seconds.
"""

from dataclasses import replace

from search_spaces import ablation
from tune_kd import Compare, Factor, Study


def study() -> Study:
    """Logit: alpha at T = 2, then T at alpha = 0.5. Feature: alpha. In addition, the control."""
    return _swept(ablation.study())


def laptop(data: str = "digits") -> Study:
    """The same arms in minutes on two cores."""
    return _swept(ablation.laptop(data))


def smoke(data: str = "digits") -> Study:
    """The same arms in seconds, to check an installation. Its numbers mean nothing."""
    return _swept(ablation.smoke(data))


def _swept(base: Study) -> Study:
    return replace(
        base,
        name="cifar_stem",
        question="Which alpha and which temperature help a student with the CIFAR stem?",
        factors=(
            Factor("method", ("none", "logit", "feature")),
            Factor("temperature", (2.0, 3.0, 4.0)),
            Factor("alpha", (0.3, 0.5, 0.7)),
        ),
        swept=("temperature", "alpha"),
        reference=(("temperature", 2.0), ("alpha", 0.5)),
        cell=replace(base.cell, stem="cifar", weights="none"),
        contrasts=(
            Compare("method", "logit", "none"),
            Compare("method", "feature", "none"),
            Compare("method", "logit", "feature", family="secondary"),
            *(Compare("temperature", level, 2.0, family="secondary") for level in (3.0, 4.0)),
            *(Compare("alpha", level, 0.5, family="secondary") for level in (0.3, 0.7)),
        ),
        moderator=None,
    )


SCALES = {"paper": study, "laptop": laptop, "smoke": smoke}
