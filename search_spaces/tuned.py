"""Is a kind of distillation worse, or only badly tuned? Every method is tuned with the same budget, then confirmed.

Question: learning rate, weight decay, loss weights and temperature of every method: the best of each against the tuned
control and against its published default.
Source: methods and recipe of `ablation`; TPE of Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization".
Command: python -m tune_kd run tuned [--scale paper|laptop|smoke] [--data cifar10|cifar100]
Cost: paper is 120 trials to tune and 30 to confirm, for GPUs; laptop takes minutes on two cores; smoke seconds.
"""

from dataclasses import replace

from search_spaces import ablation
from tune_kd import Compare, Factor, LogUniform, Range, Screen, Study, Tuning, Uniform


def study() -> Study:
    """40 draws per arm. Draws differ more than arms: a bad learning rate shows early, so the grace period is short."""
    return _tuned(ablation.study(), Tuning(RANGES, budget=40, startup=10), Screen(grace=10, reduction=3, margin=0.02))


def laptop(data: str = "digits") -> Study:
    """16 draws per arm, in minutes on two cores."""
    base = ablation.laptop(data)
    screen = Screen(grace=3 if data == "digits" else 2, reduction=2, margin=0.1)
    return _tuned(base, Tuning(RANGES, budget=16, startup=6), screen)


def smoke(data: str = "digits") -> Study:
    """4 draws per arm in seconds, to check an installation. Its numbers mean nothing."""
    return _tuned(ablation.smoke(data), Tuning(RANGES, budget=4, startup=2), Screen(grace=1, min_peers=1, margin=0.02))


RANGES = (
    Range("lr", LogUniform(0.01, 1.0)),
    Range("weight_decay", LogUniform(5e-5, 5e-3)),
    Range("alpha", Uniform(0.05, 0.95)),
    Range("temperature", LogUniform(1.0, 16.0)),
    Range("beta", Uniform(0.0, 2.0)),
)


def _tuned(base: Study, tuning: Tuning, screen: Screen) -> Study:
    return replace(
        base,
        name="tuned",
        question="Does a kind of distillation help a small network once every method was tuned with the same budget?",
        factors=(Factor("method", ("none", "logit", "feature")),),
        cell=replace(base.cell, stem="cifar"),
        contrasts=(
            Compare("method", "logit", "none"),
            Compare("method", "feature", "none"),
            Compare("method", "logit", "feature", family="secondary"),
        ),
        moderator=None,
        screen=screen,
        tuning=tuning,
    )


SCALES = {"paper": study, "laptop": laptop, "smoke": smoke}
