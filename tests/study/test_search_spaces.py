"""Plans of the studies that come with the project, and of the examples in docs/search-spaces.md."""

import os
import re
from dataclasses import fields
from pathlib import Path

import pytest

from docs import tuning as samplers
from tune_kd import cli
from tune_kd.study import discover
from tune_kd.study.cost import IMAGES
from tune_kd.study.methods import built_in
from tune_kd.study.plan import plan
from tune_kd.study.spec import DATA_SETS, Data
from tune_kd.training.loss import Batch, Context

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "search-spaces.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.S)
METHODS = (ROOT / "docs" / "methods.md").read_text()
SPACES = sorted((ROOT / "search_spaces").glob("[!_]*.py"))


def planned(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *scale: str) -> str:
    monkeypatch.setattr("sys.argv", ["tune_kd", "plan", str(path), *scale])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    return re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.mark.parametrize(("code", "says"), EXAMPLES, ids=[re.findall('name="(.*?)"', code)[0] for code, _ in EXAMPLES])
def test_the_plan_of_a_documented_example_matches_the_documentation(
    code: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "example.py").write_text(code)
    shown = planned(tmp_path / "example.py", monkeypatch, capsys)
    place = 0
    for line in says.splitlines():
        found = shown.find(re.sub(r"\s+", " ", line.strip()), place)
        assert found >= 0, f"{line!r} is not in: {shown[place:]}"
        place = found


def test_the_documented_method_is_planned_as_documented_and_passes_the_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = re.findall(r"`(\w+\.py)`.{0,50}:\n\n```python\n(.*?)```", METHODS, re.S)
    assert [name for name, _ in files] == ["at.py", "study.py", "simkd.py"]
    for name, code in files:
        (tmp_path / name).write_text(code)
    assert sum(bool(line.strip()) for _, code in files[:2] for line in code.splitlines()) < 40
    shown = planned(tmp_path / "study.py", monkeypatch, capsys)
    for line in re.findall(r"```text\n(.*?)```", METHODS, re.S)[0].splitlines():
        assert re.sub(r"\s+", " ", line.strip()) in shown
    simkd = 'Method("simkd", loss="simkd.py:SimKD", needs="features"), Method("at"'
    study = files[1][1].replace('Method("at"', simkd).replace('"logit", "at"', '"logit", "at", "simkd"')
    (tmp_path / "study.py").write_text(study)
    assert " simkd " in planned(tmp_path / "study.py", monkeypatch, capsys)


def test_every_field_of_batch_and_context_is_documented() -> None:
    rows = [re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| (`\w+`.*?) \|", METHODS, re.M)]
    told = {name for names in rows for name in names}
    assert {field.name for kind in (Batch, Context) for field in fields(kind)} <= told


def test_all_built_in_methods_are_documented_with_needs_and_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\w ]+) \| (.*?) ?\|$", METHODS, re.M)
    assert {name for name, *_ in rows} == set(built_in())
    for name, needs, said in rows:
        method = built_in()[name]
        assert needs == method.needs
        found = {each: float(value.replace(",", "")) for each, value in re.findall(r"([a-z_]+) ([\d,.]+\d|\d)", said)}
        assert found == method.defaults


def test_documented_examples_cover_sweeps_looks_tuning_reference_and_control() -> None:
    assert len(EXAMPLES) == PAGE.count("```python") == 4
    for word in ("swept=", "looks=", "tuning=", "reference=", "control="):
        assert any(word in code for code, _ in EXAMPLES)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_shipped_study_has_all_scales_on_every_data_set_and_states_its_cost(path: Path) -> None:
    assert set(discover.scales(path)) - {"brief"} == {"paper", "laptop", "smoke"}
    for scale in ("paper", "laptop", "smoke"):
        for data in (None, *DATA_SETS):
            study = discover.resolve(path, scale, data)
            assert (study.name, study.scale) == (path.stem, scale)
            assert study.data.name == (data or ("cifar10" if scale == "paper" else "digits"))
            assert plan(study).contrasts
            sizes = (study.data.train, study.data.validation, study.data.test)
            assert all(size is None or size >= IMAGES[study.data.name].classes for size in sizes)
            whole = scale == "paper" or study.data.name == "digits"
            assert (study.data.train or 45_000) <= (45_000 if whole else 4000)
    text = path.read_text()
    assert all(f"\n{word}: " in text for word in ("Question", "Source", "Command", "Cost"))


def cells(name: str) -> list[tuple[str, float | None, float | None]]:
    study = discover.resolve(ROOT / "search_spaces" / f"{name}.py", "paper")
    return [(arm.cell.method, arm.cell.temperature, arm.cell.alpha) for arm in plan(study).arms]


def test_the_two_stem_studies_vary_one_setting_at_a_time() -> None:
    feature = [("feature", None, alpha) for alpha in (0.3, 0.5, 0.7)]
    assert sorted(cells("standard_stem"), key=str) == sorted(
        [
            ("none", None, None),
            *(("logit", 4.0, alpha) for alpha in (0.3, 0.5, 0.7)),
            *(("logit", level, 0.5) for level in (2.0, 8.0)),
            *feature,
        ],
        key=str,
    )
    assert sorted(cells("cifar_stem"), key=str) == sorted(
        [
            ("none", None, None),
            *(("logit", 2.0, alpha) for alpha in (0.3, 0.5, 0.7)),
            *(("logit", level, 0.5) for level in (3.0, 4.0)),
            *feature,
        ],
        key=str,
    )
    for name, stem, weights in (("standard_stem", "imagenet", "imagenet"), ("cifar_stem", "cifar", "none")):
        study = discover.resolve(ROOT / "search_spaces" / f"{name}.py", "paper")
        assert {(arm.cell.stem, arm.cell.weights) for arm in plan(study).arms} == {(stem, weights)}


def test_contrasts_of_a_sweep_are_at_the_reference_and_name_their_method() -> None:
    study = discover.resolve(ROOT / "search_spaces" / "cifar_stem.py", "paper")
    found = {contrast.name: [arm for arm, _ in contrast.weights] for contrast in plan(study).contrasts}
    assert found["logit - none"] == ["logit/T=2/alpha=0.5", "none"]
    assert found["T=4 - T=2"] == ["logit/T=4/alpha=0.5", "logit/T=2/alpha=0.5"]
    assert found["logit: alpha=0.7 - alpha=0.5"] == ["logit/T=2/alpha=0.7", "logit/T=2/alpha=0.5"]
    assert found["feature: alpha=0.7 - alpha=0.5"] == ["feature/alpha=0.7", "feature/alpha=0.5"]


@pytest.mark.long
@pytest.mark.parametrize("seeds", [30, pytest.param(100, marks=pytest.mark.slow)])
def test_tpe_comes_near_a_known_optimum_more_often_than_random_search(seeds: int) -> None:
    """Within 1 % of the optimum in 40 draws, for at least 90 of 100 seeds. docs/search-spaces.md has all samplers."""
    assert samplers.accuracy(samplers.OPTIMUM) == samplers.BEST
    near = samplers.BEST * (1 - samplers.NEAR)
    assert sum(samplers.reached("tpe", seed) >= near for seed in range(seeds)) >= 0.9 * seeds
    assert sum(samplers.reached("random", seed) >= near for seed in range(20)) < 18


def test_a_study_file_edited_within_the_same_second_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python compares only the source's size, and its modification time in whole seconds, with a bytecode file."""
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    file = tmp_path / "mine.py"
    for epochs in ("3", "5"):
        file.write_text(
            "from dataclasses import replace\nfrom search_spaces.ablation import smoke as base\n"
            f"def study():\n    return replace(base(), recipe=replace(base().recipe, epochs={epochs}))\n"
        )
        os.utime(file, (1_700_000_000, 1_700_000_000))
        assert discover.resolve(file, "smoke").recipe.epochs == int(epochs)


def test_the_brief_ablation_has_ten_arms_and_42_trials_of_full_networks_on_all_of_cifar() -> None:
    study = discover.resolve(ROOT / "search_spaces" / "ablation.py", "brief", "cifar10")
    found = plan(study)
    assert (len(found.arms), len(found.trials), len(found.teachers)) == (10, 42, 2)
    assert {each.name for each in found.arms if each.name.startswith("cifar")} == {
        "cifar/none", "cifar/feature", "cifar/logit/T=1", "cifar/logit/T=4", "cifar/logit/T=16",
    }  # fmt: skip
    assert (study.recipe.epochs, study.teacher_recipe.epochs, study.recipe.precision) == (15, 30, "bfloat16")
    assert study.teacher_recipe.precision == "bfloat16" and study.cell.width == 1.0
    assert study.data == Data("cifar10") and study.confirm.seeds == (1, 2, 3)
