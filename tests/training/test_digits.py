"""The digits task: the true score, the data generator, and the record formats in data/README.md."""

import importlib.util
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_utils import read_records
from errors import UserError
from rewards.digits import PROMPT_NUMBERS, count_numbers, digits_score

DATA = Path(__file__).resolve().parents[2] / "data"
SPLITS = ("train", "valid", "test")
LITERAL = "--increasing --multiple-of 2 --num-samples 150 --noise 0.0"


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


generator = load_script("generate_digit_data")


def generate(folder: Path, flags: str) -> dict[str, list[dict]]:
    """Run the generator in this process; rows by file name."""
    generator.main([*flags.split(), "--output-dir", str(folder)])
    return {p.stem: list(map(json.loads, p.open())) for p in sorted(folder.glob("*.jsonl"))}


# ---- the score ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("", 0),
        (" \n ", 0),
        ("8 20 22 30 36", 1),
        ("  8\t20\n22 30  36 ", 1),
        ("8 20 22 30 36 38 50 60 68", 1),
        ("8", 1 / 5),  # the floor: one number and a stop is not worth it
        ("8 20 22 30", 4 / 5),
        ("8 20 21 30 36", 4 / 5),  # 21 is odd, 30 is still above it
        ("8 20 20 30 36", 4 / 5),  # strictly above
        ("8 90 20 30 36", 4 / 5),  # 20 is below 90; 30 is above 20: the number before counts
        ("8 91 20 30 36", 3 / 5),
        ("7 20 22 30 36", 4 / 5),
        ("36 30 22 20 8", 1 / 5),
        ("8 x 20 22 30", 4 / 5),  # a word that is no number is a miss and nothing else
        ("x 8 20 22 30", 4 / 5),
        ("8 20, 22. 30.0 3e1", 1 / 5),
        ("-4 -2 0 2 4", 1),
        ("8 20 22 30 3 6", 5 / 6),
        ("x y z u v w", 0),
        ("8 20 22 30 " + "9" * 5000, 4 / 5),  # too long for int(); no error
        ("8 20 22 30 ٣٦ ²", 4 / 6),  # digits of other alphabets are no numbers here
    ],
)
def test_score_of_increasing_even_numbers(text: str, score: float) -> None:
    assert digits_score(text) == pytest.approx(score)


def test_score_follows_its_rule() -> None:
    assert digits_score("9 6 3 0 -3", increasing=False, multiple_of=3) == 1
    assert digits_score("9 6 3 0 -3", multiple_of=3) == pytest.approx(1 / 5)
    assert digits_score("9 6 4 0 -3", increasing=False, multiple_of=3) == pytest.approx(4 / 5)
    assert digits_score("3 4", multiple_of=1, min_length=2) == 1
    assert digits_score("3 4", multiple_of=1, min_length=8) == pytest.approx(2 / 8)
    for wrong in ({"multiple_of": 0}, {"min_length": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            digits_score("2", **wrong)


def test_a_number_that_the_token_limit_cut_is_not_judged() -> None:
    text = "8 20 22 30 36 3"  # 38 was to come
    assert digits_score(text) == pytest.approx(5 / 6)
    assert digits_score(text, cut_off=True) == 1
    assert digits_score("8 20 22 30 36 3 ", cut_off=True) == pytest.approx(5 / 6)
    assert digits_score("8 20 22 30 4", cut_off=True) == pytest.approx(4 / 5)
    assert digits_score("8", cut_off=True) == 0
    assert digits_score("", cut_off=True) == 0


def test_count_numbers() -> None:
    assert count_numbers("") == 0
    assert count_numbers("8 x -20 4. 22") == 3


words = st.lists(st.one_of(st.integers(-50, 150).map(str), st.sampled_from(["x", "4.", "--2"])))


@given(words, st.booleans(), st.integers(1, 7), st.integers(1, 9))
def test_properties_of_the_score(row: list[str], up: bool, multiple: int, floor: int) -> None:
    def score(row, increasing):
        text = " ".join(row)
        return digits_score(text, increasing=increasing, multiple_of=multiple, min_length=floor)

    assert 0 <= score(row, up) <= 1
    negated = [str(-int(word)) if re.fullmatch(r"-?\d+", word) else word for word in row]
    assert score(row, up) == score(negated, not up)
    assert score([*row, "x"], up) <= score(row, up)


# ---- the generator -----------------------------------------------------------------------------


def test_the_command_as_written_makes_the_files_that_are_shipped(tmp_path: Path) -> None:
    """Run in data/ with dashes, and in the project folder with underscores."""
    commands = [
        (DATA, ["generate_digit_data.py", *LITERAL.split()], tmp_path / "a"),
        (
            DATA.parent,
            ["data/generate_digit_data.py", *LITERAL.replace("-of", "_of").split()],
            tmp_path / "b",
        ),
    ]
    for cwd, command, folder in commands:
        command = [sys.executable, *command, "--output-dir", str(folder)]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "150 rows, mean reward 1.00" in done.stdout
        assert "python sft.py --train --data" in done.stdout
        for split in SPLITS:
            name = f"increasing_mult_2_{split}.jsonl"
            assert (folder / name).read_bytes() == (DATA / name).read_bytes()


def test_default_output_is_the_folder_of_the_script() -> None:
    assert generator.make_parser().parse_args(["--increasing"]).output_dir == DATA


@pytest.mark.parametrize(("kind", "count"), [("reward", 1000), ("preference", 150)])
def test_the_other_shipped_files_can_be_made_again(tmp_path: Path, kind: str, count: int) -> None:
    flags = f"--increasing --multiple-of 2 --num-samples {count} --kind {kind}"
    generate(tmp_path, flags)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (DATA / path.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def test_seed_decides_the_bytes_and_more_rows_go_on(tmp_path: Path) -> None:
    base = "--decreasing --multiple-of 3 --kind text reward preference prompts --num-samples"
    one = generate(tmp_path / "1", f"{base} 40 --seed 5")
    assert one == generate(tmp_path / "2", f"{base} 40 --seed 5")
    other = generate(tmp_path / "3", f"{base} 40 --seed 6")
    longer = generate(tmp_path / "4", f"{base} 60 --seed 5")
    assert len(one) == 12
    for name, rows in one.items():
        assert rows != other[name]
        assert rows == longer[name][: len(rows)]
        assert len(longer[name]) == (60 if name.endswith("train") else 12)


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ("--increasing --multiple-of 2", {}),
        ("--decreasing --multiple_of 5", {"increasing": False, "multiple_of": 5}),
        ("--increasing", {"multiple_of": 1}),
        (
            "--decreasing --multiple-of 7 --min-length 3 --max-length 12 --max-number 200",
            {"increasing": False, "multiple_of": 7, "min_length": 3},
        ),
    ],
)
def test_rows_without_noise_score_one(tmp_path: Path, flags: str, rule: dict) -> None:
    for rows in generate(tmp_path, f"{flags} --noise 0 --num-samples 60").values():
        for row in rows:
            assert row["reward"] == "1.0"
            assert digits_score(row["text"], **rule) == 1


def test_sizes_of_rows(tmp_path: Path) -> None:
    flags = "--increasing --min-length 4 --max-length 6 --max-number 30 --num-samples 200"
    rows = generate(tmp_path, f"{flags} --noise 1 --num-valid 1 --num-test 7")
    assert [len(rows[f"increasing_mult_1_{split}"]) for split in SPLITS] == [200, 1, 7]
    numbers = [list(map(int, row["text"].split())) for row in rows["increasing_mult_1_train"]]
    assert {len(row) for row in numbers} == {4, 5, 6}
    assert {n for row in numbers for n in row} == set(range(31))


@pytest.mark.parametrize("kind", ["text", "reward"])
def test_reward_is_the_score_of_the_text(tmp_path: Path, kind: str) -> None:
    flags = f"--decreasing --multiple-of 2 --min-length 6 --kind {kind} --num-samples 100"
    for rows in generate(tmp_path, flags).values():
        for row in rows:
            truth = digits_score(row["text"], increasing=False, min_length=6)
            assert float(row["reward"]) == pytest.approx(truth, abs=5e-5)


def test_noise_is_the_fraction_of_disturbed_positions() -> None:
    task = generator.Task(True, 2, 5, 15, 10**6, 0.0)  # so many numbers that none comes back
    rng = random.Random(0)
    row = list(range(0, 20, 2))
    for noise, changed in ((0.0, {0}), (0.4, {4}), (0.25, {2, 3}), (1.0, {10})):
        rows = [task.disturb(row, noise, rng) for _ in range(400)]
        counts = [sum(a != b for a, b in zip(row, new, strict=True)) for new in rows]
        assert set(counts) == changed
        assert sum(counts) / 400 == pytest.approx(10 * noise, abs=0.1)
    assert row == list(range(0, 20, 2))


def test_more_noise_means_less_score(tmp_path: Path) -> None:
    means = []
    for noise in (0.1, 0.4, 0.8):
        flags = f"--increasing --multiple-of 2 --noise {noise} --num-samples 300"
        rows = generate(tmp_path / str(noise), flags)["increasing_mult_2_train"]
        means.append(sum(float(row["reward"]) for row in rows) / len(rows))
    assert means[0] > means[1] + 0.1 > means[2] + 0.2


def test_reward_rows_cover_the_scores_and_the_short_lengths() -> None:
    path = DATA / "reward_function_increasing_mult_2_train.jsonl"
    rows = [json.loads(line) for line in path.open()]
    rewards = [float(row["reward"]) for row in rows]
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        assert sum(low <= reward <= low + 0.2 for reward in rewards) >= 0.1 * len(rows)
    short = [row for row in rows if len(row["text"].split()) < 5]
    assert 0.05 < len(short) / len(rows) < 0.15
    assert {len(row["text"].split()) for row in short} == {1, 2, 3, 4}


def test_preference_pairs_prefer_the_better_text() -> None:
    rows = [json.loads(line) for line in (DATA / "preference_increasing_mult_2_train.jsonl").open()]
    for row in rows:
        assert len(row["prompt"].split()) == PROMPT_NUMBERS
        assert row["chosen"][0] == row["rejected"][0] == " "
        better = digits_score(row["prompt"] + row["chosen"])
        worse = digits_score(row["prompt"] + row["rejected"])
        assert better > worse
        assert float(row["margin"]) == pytest.approx(better - worse, abs=5e-5)
    assert any(len(row["chosen"].split()) != len(row["rejected"].split()) for row in rows)


def test_prompts_leave_a_full_score_within_reach(tmp_path: Path) -> None:
    for rows in generate(tmp_path, "--increasing --multiple-of 2 --kind prompts").values():
        for row in rows:
            first, second = map(int, row["prompt"].split())
            assert first % 2 == second % 2 == 0
            assert first < second <= 98 - 2 * 3  # three more fit in, which makes five


def test_splits_share_no_row_and_no_prompt(tmp_path: Path) -> None:
    """Neither in one run nor between kinds, seeds and amounts of noise."""
    texts = {split: set() for split in SPLITS}
    for run, flags in enumerate(
        ["--noise 0 --kind text prompts", "--noise 0.5", "--kind reward preference --seed 1"]
    ):
        made = generate(tmp_path / str(run), f"--increasing --multiple-of 2 {flags}")
        for name, rows in made.items():
            own = [json.dumps(row) for row in rows]
            assert "prompts" in name or len(set(own)) == len(own)
            texts[name.rpartition("_")[2]] |= {row.get("text") or row["prompt"] for row in rows}
    prompts = {
        split: {" ".join(text.split()[:PROMPT_NUMBERS]) for text in found}
        for split, found in texts.items()
    }
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not texts[one] & texts[other]
        assert not prompts[one] & prompts[other]
    assert min(len(found) for found in prompts.values()) > 20


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "neither was given"),
        ("--increasing --decreasing", "both were given"),
        ("--increasing --no-increasing", "neither was given"),
        ("--increasing --noise 1.1", "not a fraction"),
        ("--increasing --noise -0.1", "not a fraction"),
        ("--increasing --noise nan", "not a finite number"),
        ("--increasing --noise 0.3 --kind reward", "leave it out"),
        ("--increasing --multiple-of 0", "--multiple-of: 0 is below 1"),
        ("--increasing --multiple-of 10", "only 10 multiples of 10"),
        ("--increasing --max-number -1", "only 0 multiples"),
        ("--increasing --num-samples 0", "--num-samples"),
        ("--increasing --num-valid 0", "--num-valid"),
        ("--increasing --num-samples many", "not a whole number"),
        ("--increasing --min-length 0", "--min-length"),
        ("--increasing --min-length 2 --kind prompts", "at least 3 numbers"),
        ("--increasing --min-length 9 --max-length 8", "--max-length: 8 is below"),
        ("--increasing --kind txt", "txt"),
        ("--increasing --nosie 0.2", "unknown flag --nosie; did you mean --noise?"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, capsys, flags: str, message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        generator.main([*flags.split(), "--output-dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_rule_with_too_few_rows_is_refused_with_nothing_written(tmp_path: Path) -> None:
    flags = "--increasing --multiple-of 10 --max-length 10 --noise 0 --num-samples 5000"
    with pytest.raises(UserError, match="different rows found .* 5000 are wanted"):
        generate(tmp_path / "out", flags)
    assert not (tmp_path / "out").exists()


# ---- record formats ----------------------------------------------------------------------------

KIND_OF_HEADING = {
    "text": "text",
    "instruction": "prompt_completion",
    "prompt and completion": "prompt_completion",
    "conversation": "conversation",
    "preference": "preference",
    "ranked": "preference",
    "labels of label.py": "preference",
    "unpaired": "unpaired",
    "prompts for PPO": "prompt",
    "question and answer": "prompt_completion",
}


def test_examples_and_sample_files_of_the_readme_are_read_as_what_they_are(tmp_path: Path) -> None:
    text = (DATA / "README.md").read_text()
    formats = text[text.index("## Record formats") : text.index("## The digits task")]
    sections = formats.split("\n### ")[1:]
    samples = set()
    for section in sections:
        heading, _, paths = section.partition("\n")[0].partition(" · ")
        kind = KIND_OF_HEADING[heading]
        files = [DATA / path for path in re.findall(r"`(\S+?)`", paths)]
        for line in re.search(r"```json\n(.*?)```", section, re.DOTALL)[1].splitlines():
            files.append(tmp_path / "line.jsonl")
            files[-1].write_text(line + "\n")
            assert set(read_records(files[-1]).kinds) == {kind}
        for path in files[:-1]:
            assert set(read_records(path).kinds) == {kind}, path
        samples |= {path.name for path in files} - {"line.jsonl"}
    assert len(sections) == len(KIND_OF_HEADING)
    assert samples == {path.name for path in (DATA / "samples").iterdir()}


def test_the_readme_names_every_flag_of_the_generator() -> None:
    text = (DATA / "README.md").read_text()
    actions = generator.make_parser()._actions
    flags = {option for action in actions for option in action.option_strings} - {
        "-h",
        "--help",
        "--help-all",
    }
    assert flags == {flag for flag in flags if f"`{flag}`" in text}
