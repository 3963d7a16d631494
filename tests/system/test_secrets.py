"""Which texts count as secrets, where they are found, and how they are masked."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from forms import HARMLESS, SECRETS, SHORT, WORD, some
from tune_kd.records.run_folder import Run, create
from tune_kd.study import discover
from tune_kd.study.spec import Study
from tune_kd.system import secrets as privacy
from tune_kd.system.secrets import finds, masked, secrets

TOKEN = SECRETS["GitHub"][0]


@pytest.mark.parametrize("form", SECRETS)
def test_a_secret_is_found_at_its_position_and_masked_completely(form: str) -> None:
    text, hidden = SECRETS[form]
    for before, after in (("", ""), ("see ", " there"), ("Is it\n", "\nnow?"), ("é" * 9000 + " ", " 7 epochs")):
        whole = f"{before}{text}{after}"
        (find,) = finds(whole)
        assert len(before) <= find.start < find.end <= len(before) + len(text)
        left = masked(whole)
        assert hidden not in left and not {hidden[at : at + 6] for at in range(len(hidden) - 5)} & {
            left[at : at + 6] for at in range(len(left) - 5)
        }
        assert left.startswith(before) and left.endswith(after) and "***" in left


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_text_is_not_a_secret(text: str) -> None:
    for said in (text, f"see {text}", f"{text}\n{text}", json.dumps({"question": text})):
        assert finds(said) == [] and masked(said) == said
    assert list(secrets({"question": text, "settings": [f"question={text}"]})) == []


def test_shipped_studies_and_their_records_hold_no_secrets(tmp_path: Path) -> None:
    for name in ("ablation", "tuned"):
        file = discover.find(name)
        for scale in discover.scales(file):
            run = Run("r", tmp_path / f"{name}-{scale}", discover.resolve(file, scale), some(64, "0f"), tmp_path, {})
            create(run)
            assert finds((run.folder / "study.json").read_text()) == []


def test_project_files_hold_no_secrets() -> None:
    root = Path(__file__).parents[2]
    for path in (*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("tune_kd/**/*.py"), Path(__file__)):
        assert finds(path.read_text()) == [], path


def test_a_rejection_names_field_rule_and_position_but_not_the_secret() -> None:
    record = {"study": {"question": f"Is it {TOKEN}?", "levels": [1, None, {"at": ("x", f"https://me:{SHORT}@h/")}]}}
    first, second = secrets(record)
    assert first == (
        "study.question holds what looks like a secret (token of a service, 40 characters at character 7); allowed: "
        "text without a secret, since it is recorded and reported"
    )
    assert second.startswith("study.levels[2].at[1] holds what looks like a secret (password in a URL, 7 characters at")


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({WORD: "correct horse"}, WORD),
        ({"a": [{f"db_{WORD}": SHORT}]}, f"a[0].db_{WORD}"),
        ({"a": {"api_" + "key": some(32, "0f")}}, "a.api_key"),
        ({"client-secret": [some(20)]}, "client-secret[0]"),
        ({"HF_TOKEN": some(30)}, "HF_TOKEN"),
    ],
)
def test_a_field_name_can_mark_its_value_as_a_secret(record: dict[str, object], field: str) -> None:
    (said,) = secrets(record)
    assert said.startswith(f"{field} holds") and "at character 1)" in said


def test_a_secret_in_a_field_name_is_masked_in_the_message() -> None:
    for value in ("deadbeef", "word", 3, None, {"a": SHORT, WORD: SHORT}):
        said = list(secrets({"study": {TOKEN: value}}))
        assert TOKEN not in " ".join(said) and any("***" in sentence for sentence in said)


def test_ordinary_record_fields_are_not_secrets(study: Study) -> None:
    fields = {"weights_digest": some(64, "0f"), "study_sha256": some(64, "0f"), "key": "stem", "token": "class",
              "git_commit": some(40, "0f"), "pass": "2", "secret": "", WORD: ""}  # fmt: skip
    assert list(secrets(fields)) == []
    assert list(secrets(asdict(replace(study, question="\n".join(HARMLESS))))) == []


@given(st.lists(st.sampled_from([*(text for text, _ in SECRETS.values()), *HARMLESS, "aws ", "key '", '"', "=", "@"])))
def test_masking_removes_all_secrets_and_is_idempotent(parts: list[str]) -> None:
    for between in ("", " ", "\n"):
        left = masked(between.join(parts))
        assert finds(left) == [] and masked(left) == left


@given(st.text())
def test_any_text_can_be_masked(text: str) -> None:
    left = masked(text)
    assert finds(left) == []


@given(st.lists(st.from_regex(r"[a-z]{1,12}[,.?]?", fullmatch=True)))
def test_plain_words_are_not_masked(words: list[str]) -> None:
    text = " ".join(words)
    assert masked(text) == text


@pytest.mark.parametrize(("around", "left"), [(2, "see ***."), (20, "***")])
def test_a_text_is_masked_entirely_if_masks_keep_uncovering_secrets(around: int, left: str) -> None:
    text = TOKEN
    for _ in range(around):  # a mask is short enough to fit between the words of the rule
        text = f'aws ------------ {text} key "{some(40)}"'
    assert masked(f"see {text}.") == left


HOSTILE = ["a", "A", "0", "a1", " ", "\n", '"', "'", "`", "=", ":", ".", "-", "_", "/", "\\", "@", "?", "a.", "a-",
           "ey" + "J", "ey" + "Ja.", "ey" + "J-", "ey" + "Jaaaaaaaaaaaa.", "://", "://a", "://a:", "://a:b", "-----",
           f"-----BEGIN {'PRIVATE'} KEY-----", "s" + "k-", "s" + "k-a-", "xox" + "b-1-", "AI" + "za-", "gh" + "p_",
           "?sig=", "bearer ", "Bearer a", "authorization: basic ", WORD, f"{WORD}=", f"{WORD}:", f"{WORD}: ",
           f'{WORD}="', f'{WORD}="a', f'"{WORD}": ', "token=", "token: a", "login ", "login a ", "--a-", "--a",
           f"--{WORD} ", "aws key", "aws", "S" + "G.", "key ", "12345678:"]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("atom", HOSTILE, ids=repr)
def test_no_text_takes_quadratic_time(atom: str) -> None:
    """A hundred thousand characters take a fifth of a second; in quadratic time they would take minutes."""
    finds((atom * 100_000)[:100_000])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("atom", ["ey" + "J-", f"{WORD}:"])
def test_a_million_characters_are_scanned_within_a_minute(atom: str) -> None:
    """Without the rule's bounds, each of these would be scanned to the end of the text from every position."""
    finds(atom * 300_000)


def test_a_token_longer_than_the_library_expects_is_masked_completely() -> None:
    assert masked(f"({SECRETS['key of AWS'][0]}XYZ-9)") == "(***)"


class Counting:
    """A rule of the library that records the text that it receives."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def finditer(self, text: str, start: int, end: int) -> Iterator[re.Match[str]]:
        self.seen.append((start, min(end, len(text))))
        return re.compile("x{1000}").finditer(text, start, end)


def test_library_rules_scan_overlapping_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Counting()
    monkeypatch.setattr(privacy, "_library", lambda: (("x", rule),))
    at = privacy.PIECE - 5  # starts in one piece and ends in the next
    text = " " * at + "x" * 1000 + " " * 1_000_000
    assert finds(text) == [privacy.Find(at, at + 1000, "x")]
    assert max(end - start for start, end in rule.seen) <= privacy.PIECE + privacy.LONGEST
    assert sum(end - start for start, end in rule.seen) < 1.3 * len(text)


def test_all_library_rules_are_loaded_and_none_uses_entropy_or_keywords() -> None:
    names = {name for name, _ in privacy._library()}
    assert len(names) == len(privacy.PLUGINS) and not any("Entropy" in name or "Keyword" in name for name in names)
