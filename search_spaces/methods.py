"""Do newer distillation methods do better than plain distillation from logits?

Question: DKD, RKD, CRD and CTKD against `logit` and no distillation, ResNet-50 to ResNet-18, published loss weights.
Source: Zhao et al. 2022, Park et al. 2019, Tian et al. 2020, Li et al. 2023 (docs/methods.md has the settings).
Command: python -m tune_kd run methods [--scale paper|laptop|smoke] [--data cifar10|cifar100]
Cost: laptop takes minutes on two cores, smoke about one minute; `plan` shows the cost of paper.
"""

from dataclasses import replace

from search_spaces import ablation
from tune_kd import Compare, Factor, Study

TRIED = ("dkd", "rkd", "crd", "ctkd")


def study() -> Study:
    """The study at paper scale: full networks, all of CIFAR-10, five fresh seeds."""
    return _of(ablation.study())


def laptop(data: str = "digits") -> Study:
    """Every stage in minutes on two cores, with the data and networks of `ablation` at laptop scale."""
    return _of(ablation.laptop(data))


def smoke(data: str = "digits") -> Study:
    """Every stage in seconds, to check an installation. Its numbers mean nothing."""
    return _of(ablation.smoke(data))


def _of(base: Study) -> Study:
    """This study with the data, recipes and seeds of a scale of `ablation`."""
    return replace(
        base,
        name="methods",
        question="Do newer distillation methods do better than plain distillation from logits?",
        factors=(Factor("method", ("none", "logit", *TRIED)),),
        # The published weights of all methods except CTKD assume cross-entropy with weight 1.
        cell=replace(base.cell, alpha=None, ce_weight=1.0, kd_weight=1.0),
        reference=(),
        moderator=None,
        contrasts=(
            Compare("method", "logit", "none"),
            *(Compare("method", method, "none") for method in TRIED),
            *(Compare("method", method, "logit", family="secondary") for method in TRIED),
        ),
        screen=replace(base.screen, strata=("stem",)),
    )


SCALES = {"paper": study, "laptop": laptop, "smoke": smoke}
