"""Check a study and report all its problems at once: the rules of single fields, and the rules across fields."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from keyword import iskeyword

from tune_kd.study.levels import level_problem, numbers
from tune_kd.study.methods import COLUMNS, built_in
from tune_kd.study.rules import LEVELS_LIMIT, MOST_SEEDS, MOST_TAUGHT_SEEDS, MOST_TRIALS, SEED, TRIALS_LIMIT, broken
from tune_kd.study.spec import CELL_FIELDS, RECIPE_FACTORS, WEIGHTED, Compare, Recipe, Screen, Study
from tune_kd.study.tuning import Choice, Integer, Range, Tuning, number
from tune_kd.system.errors import raise_problems


def check(study: Study) -> Study:
    """Return the study itself. Raises `UserError` with all its problems."""
    raise_problems(_oversized(study))  # first: the other checks could take hours
    problems = [
        *broken(study),
        *broken(study.data, "data."),
        *_method_problems(study),
        *_factor_problems(study),
        *_control_problems(study),
        *_contrast_problems(study),
        *_reference_problems(study),
        *_recipe_problems(study.recipe, "recipe."),
        *_recipe_problems(study.teacher_recipe, "teacher_recipe."),
        *broken(study.confirm, "confirm."),
        *_seed_problems(study),
        *_screen_problems(study),
        *(
            f"strata names {name!r}; allowed: {', '.join(study.factor_names)}"
            for name in study.strata
            if name not in study.factor_names
        ),
        *(_tuning_problems(study, study.tuning) if study.tuning else ()),
    ]
    raise_problems(problems)
    return study


def _oversized(study: Study) -> Iterator[str]:
    """Messages for values far above those of any real study. A study may come from an untrusted `study.json`."""
    tuning = study.tuning or Tuning(())
    yield from broken(study, limits=True)
    for name in ("recipe", "teacher_recipe", "screen", "confirm"):
        yield from broken(getattr(study, name), f"{name}.", limits=True)
    yield from broken(tuning, "tuning.", limits=True)
    for method in study.methods:
        yield from broken(method, "methods.", limits=True)
    lists = [(f"factor {each.name!r}", each.levels) for each in study.factors]
    lists += [(f"tuning.ranges has {each.name}, which", each.over.levels)
              for each in tuning.ranges if isinstance(each.over, Choice)]  # fmt: skip
    yield from (LEVELS_LIMIT.problem(name, levels) for name, levels in lists if not LEVELS_LIMIT.holds(levels))
    counts = [("tuning.budget", tuning.budget)] if tuning.budget_unit == "trials" else []
    counts += [(f"tuning.ranges has {each.name}, whose span", each.over.high - each.over.low)
               for each in tuning.ranges if isinstance(each.over, Integer)]  # fmt: skip
    yield from (TRIALS_LIMIT.problem(name, count) for name, count in counts if not TRIALS_LIMIT.holds(count))
    cells = math.prod(max(1, len(each.levels)) for each in study.factors)
    draws = tuning.budget if study.tuning else 0
    if tuning.budget_unit == "epochs":
        draws //= max(1, min((each for each in study.levels("epochs") if isinstance(each, int)), default=1))
    seeds = max(len(study.confirm.seeds), (study.confirm.looks or (0,))[-1])
    trials = cells * (1 + seeds * study.teachers_per_seed + draws + len(study.teacher_seeds))
    if trials > MOST_TRIALS:
        taught = f" and {study.teachers_per_seed} teachers each" if study.teachers_per_seed > 1 else ""
        yield (f"factors have {cells:,} combinations of levels, which with {seeds} seeds{taught} need up to {trials:,} "
               f"trials; allowed: at most {MOST_TRIALS:,}")  # fmt: skip


def _repeated(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _factor_problems(study: Study) -> list[str]:
    names = [factor.name for factor in study.factors]
    problems = [f"factors names {name!r} more than once; allowed: once each" for name in _repeated(names)]
    for factor in study.factors:
        if factor.name not in study.factor_names:
            problems.append(f"factors names {factor.name!r}; allowed: {', '.join(study.factor_names)}")
            continue
        if not factor.levels:
            problems.append(f"factor {factor.name!r} has no levels, so no arm is left; allowed: at least one level")
        if len(set(factor.levels)) < len(factor.levels):
            problems.append(f"factor {factor.name!r} has levels {list(factor.levels)}; allowed: each level once")
        found = (level_problem(study, factor.name, level) for level in factor.levels)
        problems += [f"factor {problem}" for problem in found if problem]
    allowed = ", ".join(study.settings) or "there are none"
    problems += [f"cell.settings names {name!r}; allowed: settings of methods that are not fields of cell ({allowed})"
                 for name in dict(study.cell.settings) if name not in study.settings]  # fmt: skip
    for name in (*CELL_FIELDS, *study.settings):
        value = study.cell.level(name)
        if name not in names and not (value is None and len(study.applies(name)) < len(study.known)):
            problem = level_problem(study, name, value)
            problems += [f"cell.{problem}"] if problem else []
    if study.cell.recipe:
        problems.append("cell.recipe is set; allowed: the study's recipe for all arms, or a factor")
    return problems + _combination_problems(study)


def _method_problems(study: Study) -> Iterator[str]:
    """Messages for the study's own methods."""
    taken = {*CELL_FIELDS, *RECIPE_FACTORS, *COLUMNS} - {"temperature", "beta"}
    for name in _repeated([method.name for method in study.methods]):
        yield f"methods has {name!r} more than once; allowed: once each"
    for position, method in enumerate(study.methods):
        where = f"methods[{position}]"
        yield from broken(method, f"{where}.")
        if method.name in built_in():
            yield f"{where}.name is {method.name!r}, the name of a built-in method; allowed: another name"
        if method.loss is None:
            yield f"{where}.loss is None; allowed: FILE.py:CLASS, or package.module:CLASS"
        for name in _repeated([str(each[0]) for each in method.settings]):
            yield f"{where}.settings has {name!r} more than once; allowed: once each"
        for name, value in method.defaults.items():
            if not name.isidentifier() or len(name) > 100 or iskeyword(name) or name in taken:
                yield (f"{where}.settings has {name!r}; allowed: a Python identifier of at most 100 characters that is "
                       "not the name of another column or factor")  # fmt: skip
            if isinstance(value, bool) or not math.isfinite(value):
                yield f"{where}.settings has {name} {value!r}; allowed: a finite number"


def _combination_problems(study: Study) -> list[str]:
    """Messages for levels that are valid alone but not together."""
    problems = []
    if "imagenet" in study.levels("weights") and any(width != 1 for width in study.levels("width")):
        problems.append("weights is 'imagenet' while width is not 1; allowed: torchvision's weights at width 1 only")
    for name in ("teacher", "alpha"):
        needing = [method for method in study.levels("method") if method in study.applies(name)]
        if needing and not study.levels(name):
            problems.append(f"{name} is None while method has {needing[0]!r}; allowed: a value for {name}")
    if "alpha" not in study.weighing and "alpha" in [factor.name for factor in study.factors]:
        given = next(name for name in study.weighing if study.levels(name))
        problems.append(f"alpha is a factor while {given} is set; allowed: alpha, or ce_weight and kd_weight")
    lowest, varied = numbers(study, "lr"), {factor.name for factor in study.factors} & {"lr", "lr_min"}
    if varied and lowest and any(not 0 <= level <= min(lowest) for level in numbers(study, "lr_min")):
        problems.append(f"lr_min is {max(numbers(study, 'lr_min'))} while lr is {min(lowest)}; allowed: lr_min from 0 "
                        "to the smallest lr")  # fmt: skip
    if len(study.levels("epochs")) > 1 and study.screen.strata is not None and "epochs" not in study.screen.strata:
        problems.append("epochs is a factor while screen.strata lacks it; allowed: screen.strata with epochs, since at "
                        "the same epoch an arm with more epochs is behind one with fewer")  # fmt: skip
    return problems


def _control_problems(study: Study) -> list[str]:
    methods = study.levels("method")
    if study.control is not None and study.control not in methods:
        levels = ", ".join(str(method) for method in methods)
        return [f"control is {study.control!r}; allowed: None (null in --set) or a level of method ({levels})"]
    if study.contrasts and (study.control is None or study.screen.strata is None):
        field = "control" if study.control is None else "screen.strata"
        return [
            f"{field} is None while contrasts has {len(study.contrasts)} comparisons; allowed: no contrasts, since a "
            "study that only looks for its best student makes no claims"
        ]
    return []


def _contrast_problems(study: Study) -> Iterator[str]:
    varied = [factor.name for factor in study.factors]
    for position, contrast in enumerate(study.contrasts):
        what = f"{contrast.factor} {contrast.treated!r}"
        before = [(each.factor, each.where, {each.treated, each.against}) for each in study.contrasts[:position]]
        yield from broken(contrast, f"contrasts[{position}].")
        if (contrast.factor, contrast.where, {contrast.treated, contrast.against}) in before:
            yield (f"contrasts compares {what} with {contrast.against!r} more than once; allowed: once, and in one "
                   "direction, since each counts as a test")  # fmt: skip
        if contrast.factor not in varied:
            yield f"a contrast compares {contrast.factor!r}; allowed: a factor of the study ({', '.join(varied)})"
            continue
        levels = study.levels(contrast.factor)
        for level in (contrast.treated, contrast.against):
            if level not in levels:
                yield f"a contrast names {contrast.factor} {level!r}; allowed: {', '.join(map(str, levels))}"
        if contrast.treated == contrast.against:
            yield f"a contrast compares {what} with itself; allowed: two levels"
        yield from _where_problems(study, contrast)
    if study.moderator is not None and study.moderator not in varied:
        factors = ", ".join(varied)
        yield f"moderator is {study.moderator!r}; allowed: None (null in --set) or a factor of the study ({factors})"


def _where_problems(study: Study, contrast: Compare) -> Iterator[str]:
    for name in _repeated([str(each[0]) for each in contrast.where]):
        yield f"where of a contrast names {name!r} more than once; allowed: once each"
    for name, level in contrast.held.items():
        if name not in study.factor_names or name == contrast.factor:
            others = ", ".join(each for each in study.factor_names if each != contrast.factor)
            yield f"where of a contrast of {contrast.factor} names {name!r}; allowed: {others}"
        elif level not in (levels := study.levels(name)):
            allowed = ", ".join(map(str, levels)) or f"another factor, since the study has no level of {name}"
            yield f"where of a contrast holds {name} at {level!r}; allowed: {allowed}"


def _reference_problems(study: Study) -> Iterator[str]:
    named = [name for name, _ in study.reference]
    yield from (f"reference names {name!r} more than once; allowed: once each" for name in _repeated(named))
    for name, level in study.reference:
        if name not in study.factor_names:
            yield f"reference names {name!r}; allowed: {', '.join(study.factor_names)}"
        elif (levels := study.levels(name)) and level not in levels:
            yield f"reference {name} is {level!r}; allowed: {', '.join(map(str, levels))}"
    fixed = sorted({*named} & {factor.name for factor in study.factors})
    for name in study.swept:
        if name not in fixed:
            allowed = ", ".join(fixed) or "there are none"
            yield f"swept names {name!r}; allowed: factors that have a reference ({allowed})"


def _recipe_problems(recipe: Recipe, where: str) -> Iterator[str]:
    yield from broken(recipe, where)
    if not 0 <= recipe.lr_min <= recipe.lr:
        yield f"{where}lr_min is {recipe.lr_min!r}; allowed: from 0 to lr ({number(recipe.lr)})"


def _seed_problems(study: Study) -> list[str]:
    problems = []
    confirm, ours = study.confirm, study.screen.seed
    if not confirm.seeds:
        problems.append("confirm.seeds is empty; allowed: at least one seed")
    elif confirm.looks is not None:
        problems += _look_problems(confirm.seeds, confirm.looks)
    if not problems and ours in confirm.all_seeds:
        problems.append(
            f"screen.seed is {ours} and is among confirm.seeds {list(confirm.all_seeds)}; "
            "allowed: a different seed, since the confirmation would otherwise repeat the selection of the screen"
        )
    if not study.teacher_seeds:
        problems.append("teacher_seeds is empty; allowed: at least one seed")
    problems += _layout_problems(study)
    drawn = confirm.all_seeds if confirm.seeds else ()
    for name, listed, used in (
        ("confirm.seeds", confirm.seeds, drawn),
        ("teacher_seeds", study.teacher_seeds, study.teacher_seeds),
    ):
        if len(set(listed)) < len(listed):
            problems.append(f"{name} is {list(listed)}; allowed: each seed once")
        problems += [f"{name} has {seed}; allowed: {SEED.allowed}" for seed in used if not SEED.holds(seed)]
    return problems


def _layout_problems(study: Study) -> Iterator[str]:
    """Messages for a layout of teachers and seeds that is unbalanced or too large to analyse."""
    per_seed, teachers, confirm = study.confirm.teachers_per_seed, len(study.teacher_seeds), study.confirm
    if teachers > 1 and confirm.seeds and len(confirm.all_seeds) > MOST_TAUGHT_SEEDS:
        yield (f"confirm.seeds has {len(confirm.all_seeds):,} seeds with {teachers} teacher_seeds; allowed: at most "
               f"{MOST_TAUGHT_SEEDS:,} seeds, or one teacher seed")  # fmt: skip
    if per_seed is None or not teachers:
        return
    where = f"confirm.teachers_per_seed is {per_seed} with {teachers} teacher_seeds"
    if per_seed > teachers:
        yield f"{where}; allowed: None (null in --set) for all of them, or at most {teachers}"
    counts = confirm.looks or (len(confirm.seeds),)
    if per_seed < teachers and any(count % teachers for count in counts):
        seeds = ", ".join(map(str, counts))
        yield (f"{where} and {seeds} seeds to confirm; allowed: None (null in --set) for all teachers, or a number of "
               f"seeds (at each look) that is a multiple of {teachers}, so that all teachers have equally many seeds"
               )  # fmt: skip


def _look_problems(seeds: tuple[int, ...], looks: tuple[int, ...]) -> list[str]:
    grows = len(looks) > 0 and all(one < other for one, other in itertools.pairwise(looks))
    if grows and looks[0] >= 2 and len(seeds) <= looks[-1] <= MOST_SEEDS:
        return []
    return [f"confirm.looks is {list(looks)} with {len(seeds)} confirm.seeds; allowed: None (null in --set), or "
            "increasing numbers of seeds, the first at least 2 and the last at least the number of confirm.seeds (at "
            f"most {MOST_SEEDS})"]  # fmt: skip


def _screen_problems(study: Study) -> list[str]:
    screen, epochs = study.screen, study.most_epochs
    problems = list(broken(screen, "screen."))
    if screen.grace > epochs:
        budget = f"recipe.epochs = {epochs}" if len(study.levels("epochs")) == 1 else f"of at most {epochs} epochs"
        problems.append(f"screen.grace is {screen.grace}, longer than the budget {budget}; allowed: 1 to {epochs}")
    elif screen.grace >= 1 and screen.reduction >= 2:  # otherwise there are no rungs
        problems += margin_problems(screen, epochs)
        problems += _rung_problems(screen, epochs, study.recipe.validate_every)
    known = study.factor_names
    unknown = [name for name in screen.strata or () if name not in known]
    if screen.strata == ():
        names = ", ".join(known)
        problems.append(f"screen.strata is empty; allowed: None (null in --set) for one stratum, or some of {names}")
    return problems + [f"screen.strata names {name!r}; allowed: {', '.join(known)}" for name in unknown]


def _rung_problems(screen: Screen, epochs: int, every: int) -> Iterator[str]:
    """A message for rungs at epochs without a validation."""
    rungs = screen.rungs(epochs)
    if every > 1 and any(rung % every for rung in rungs):
        named = ", ".join(map(str, rungs))
        yield (f"screen.grace is {screen.grace} (rungs: {named}) while recipe.validate_every is {every}; allowed: a "
               f"grace that is a multiple of validate_every, or {epochs}, without a rung")  # fmt: skip


def margin_problems(screen: Screen, epochs: int) -> list[str]:
    """A message for a list of margins whose length is not the number of rungs."""
    rungs = screen.rungs(epochs)
    if not isinstance(screen.margin, tuple) or len(screen.margin) == len(rungs):
        return []
    named = ", ".join(map(str, rungs)) or "none"
    return [f"screen.margin is {list(screen.margin)}, {len(screen.margin)} margins; allowed: one number, or one for "
            f"each rung ({len(rungs)}: {named})"]  # fmt: skip


def _tuning_problems(study: Study, tuning: Tuning) -> list[str]:
    problems = [problem for each in tuning.ranges for problem in _range_problems(study, each)]
    for method in map(str, study.levels("method")):
        names = [each.name for each in study.ranges(method)]
        problems += [f"tuning.ranges has {name} more than once for the method {method}; allowed: once"
                     for name in _repeated(names)]  # fmt: skip
        if not names and not problems:
            problems.append(f"tuning.ranges has no range for the method {method}; allowed: at least one for every "
                            "method, such as lr, since each arm gets the same budget")  # fmt: skip
    problems += broken(tuning, "tuning.")
    return problems or list(_budget_problems(study, tuning))


def _range_problems(study: Study, each: Range) -> list[str]:
    """Messages for one range."""
    where, over = f"tuning.ranges has {each.name}", each.over
    tunable = ("temperature", "beta", *WEIGHTED, *study.settings, "lr", "weight_decay")
    if each.name not in tunable:
        return [f"tuning.ranges names {each.name!r}; allowed: {', '.join(tunable)}"]
    if each.name in [factor.name for factor in study.factors]:
        return [f"{where}, which is also a factor; allowed: a range or a factor"]
    users = [method for method in study.levels("method") if each in study.ranges(str(method))]
    if not users:
        there = ", ".join(method for method in study.applies(each.name) if method in study.levels("method"))
        return [f"{where} for {', '.join(each.methods or ('every method',))}, but no such method of the study uses "
                f"it; allowed: a range for a method that does ({there or 'there are none'})"]  # fmt: skip
    if over.problem is not None:
        return [f"{where} over {over!r}, which is not a valid range; allowed: {over.problem}"]
    ends = over.levels if isinstance(over, Choice) else (over.low, over.high)
    lowest = max(numbers(study, "lr_min"), default=0.0) if each.name == "lr" else 0.0
    if each.name not in RECIPE_FACTORS:
        problems = [problem for end in ends if (problem := level_problem(study, each.name, end))]
    else:
        problems = [f"{each.name} is {end}; allowed: {number(lowest)} or more" for end in ends if end < lowest]
        problems += [f"lr is {end}; allowed: above 0" for end in ends if each.name == "lr" and end == 0 == lowest]
    defaults = [study.value(each.name, str(method)) for method in users]
    wrong = [value for value in defaults if not isinstance(value, int | float) or not over.holds(value)]
    if not problems and wrong:
        problems = [f"its default {wrong[0]} lies outside {over}; allowed: a range that contains the default, which is "
                    "confirmed too"]  # fmt: skip
    return [f"{where}: {problem}" for problem in problems]


def _budget_problems(study: Study, tuning: Tuning) -> Iterator[str]:
    """Messages for a budget below the sampler's minimum, or above the number of configurations."""
    draws, unit = tuning.budget, ""
    if tuning.budget_unit == "epochs":
        draws, unit = tuning.budget // study.most_epochs, f" (of {study.most_epochs} epochs a trial)"
    least = tuning.startup + 1 if tuning.sampler == "tpe" else 1
    if draws < least:
        why = f", since TPE begins after tuning.startup = {tuning.startup} draws" if tuning.sampler == "tpe" else ""
        yield f"tuning.budget is {tuning.budget} {tuning.budget_unit}; allowed: at least {least} trials{unit}{why}"
    for method in map(str, study.levels("method")):
        values = [each.configurations for each in study.ranges(method)]
        count = math.prod(len(each) for each in values if each is not None) - 1  # the default is confirmed anyway
        if None not in values and (draws > count or tuning.budget_unit == "epochs"):
            yield (f"tuning.budget is {tuning.budget} {tuning.budget_unit}, and tuning.ranges has {count} "
                   f"configurations for the method {method} besides the default; allowed: at most {count} trials, or a "
                   "continuous range")  # fmt: skip
