"""Does distillation help a small network, which kind, and with which stem?

Question: ResNet-50 to ResNet-18, stem x method x temperature; compared arms differ in one factor.
Source: Hinton et al. 2015 (logit); FitNets-like stage features with a cosine term (feature).
Command: python -m tune_kd run ablation [--scale paper|brief|laptop|smoke] [--data cifar10|cifar100]
Cost: on one H100 (rates of docs/performance.md), paper takes about 4.5 hours and brief about 16 minutes; on two cores,
laptop takes minutes and smoke under one minute.
"""

from dataclasses import replace

from tune_kd import Cell, Compare, Confirm, Data, Factor, Recipe, Screen, Study


def study() -> Study:
    """The study at paper scale: full networks, all of CIFAR-10, five fresh seeds."""
    temperatures = (1.0, 2.0, 4.0, 8.0, 16.0)
    return Study(
        name="ablation",
        question="Under what conditions does knowledge distillation help a small network, and which kind?",
        factors=(
            Factor("stem", ("imagenet", "cifar")),
            Factor("method", ("none", "logit", "feature")),
            Factor("temperature", temperatures),
        ),
        cell=Cell(student="resnet18", teacher="resnet50", alpha=0.5, beta=0.5),
        control="none",
        reference=(("temperature", 4.0),),
        contrasts=(
            Compare("stem", "cifar", "imagenet", where={"method": "none"}),
            Compare("method", "logit", "none", moderation="primary"),
            Compare("method", "feature", "none"),
            Compare("method", "logit", "feature", family="secondary"),
            *(Compare("temperature", level, 4.0, family="secondary") for level in temperatures if level != 4.0),
        ),
        moderator="stem",
        scale="paper",
        data=Data("cifar10"),
        # TF32 is PyTorch's default for convolutions on a GPU, so published studies used it.
        recipe=Recipe(epochs=100, batch_size=128, lr=0.1, precision="tf32"),
        teacher_recipe=Recipe(epochs=200, batch_size=128, lr=0.1, precision="tf32"),
        # Chosen on published curves (docs/early-stopping.md): stops mostly arms that are worse by more than noise.
        screen=Screen(seed=0, grace=30, reduction=3, margin=0.03),
        confirm=Confirm(seeds=(1, 2, 3, 4, 5)),
        rate=5.4e13,
    )


def brief() -> Study:
    """The same questions in minutes on one GPU: full networks and all of CIFAR-10, three temperatures, short training
    in bfloat16, three fresh seeds."""
    paper = study()
    return replace(
        paper,
        scale="brief",
        factors=(*paper.factors[:2], Factor("temperature", (1.0, 4.0, 16.0))),
        contrasts=(
            *paper.contrasts[:4],
            *(Compare("temperature", level, 4.0, family="secondary") for level in (1.0, 16.0)),
        ),
        recipe=replace(paper.recipe, epochs=15, precision="bfloat16"),
        teacher_recipe=replace(paper.teacher_recipe, epochs=30, precision="bfloat16"),
        screen=replace(paper.screen, grace=10),
        confirm=Confirm(seeds=(1, 2, 3)),
        rate=7.9e13,
    )


def laptop(data: str = "digits") -> Study:
    """Every stage in minutes on two cores: networks of 1/8 width, seven seeds, scikit-learn's digits.

    On CIFAR-10 or CIFAR-100, a fixed subset of 4,000 training images.
    """
    paper = study()
    small = replace(
        paper,
        scale="laptop",
        cell=replace(paper.cell, width=0.125),
        # Controls at this scale vary much between seeds: equal arms can be 6 points apart at epoch 6 of 8, and 30
        # points before epoch 6 (measured with `--margin-from RUN`).
        screen=Screen(seed=0, grace=6, reduction=2, margin=0.06),
        confirm=Confirm(seeds=(11, 12, 13, 14, 15, 16, 17)),  # not the seeds on which the recipe was chosen
        deviation=0.01,
        rate=2e10,
    )
    if data != "digits":
        return replace(
            small,
            data=Data(data, train=4000, validation=1000, test=2000),
            recipe=Recipe(epochs=6, batch_size=128, lr=0.1),
            teacher_recipe=Recipe(epochs=12, batch_size=64, lr=0.1),
            screen=replace(small.screen, grace=4),
            confirm=Confirm(seeds=(1, 2, 3)),
        )
    return replace(
        small,
        data=Data("digits"),
        # With 16 epochs, a student with the ImageNet stem is as good as its teacher, which then has nothing to teach.
        recipe=Recipe(epochs=8, batch_size=64, lr=0.2),
        # More steps with smaller batches than for students. With 20 epochs and batches of 64, the teacher with the
        # ImageNet stem was better or worse than the control, depending on seed and processor.
        teacher_recipe=Recipe(epochs=30, batch_size=32, lr=0.2),
    )


def smoke(data: str = "digits") -> Study:
    """Every stage in seconds, to check an installation. Its numbers mean nothing."""
    base, few = laptop(), 100 if data == "cifar100" else 50  # at least one per class
    return replace(
        base,
        scale="smoke",
        data=Data(data, train=200, validation=few, test=few),
        factors=(base.factors[0], base.factors[1], Factor("temperature", (2.0, 4.0))),
        contrasts=(*base.contrasts[:4], Compare("temperature", 2.0, 4.0, family="secondary")),
        cell=replace(base.cell, width=0.0625),
        recipe=replace(base.recipe, epochs=2),
        teacher_recipe=replace(base.teacher_recipe, epochs=2),
        screen=replace(base.screen, grace=1, min_peers=1, margin=0.02),
        confirm=Confirm(seeds=(1,)),
    )


SCALES = {"paper": study, "brief": brief, "laptop": laptop, "smoke": smoke}
