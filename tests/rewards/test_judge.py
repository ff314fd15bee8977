"""judge.py: verdicts over both orders, debates, revisions, going on, bad input."""

import contextlib
import io
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from files import ROOT
from judge_runs import DIGITS, PAIRS, Scripted, lines, run, write
from tiny import tiny_model_folder

import sft
from models.load import load_model
from rewards.constitution import Principle, read_constitution
from rewards.judge import Case, LocalJudge, Unanswered, judge_cases, verdict_text

pytestmark = pytest.mark.usefixtures("in_tmp")

FAIR = Principle("fair", "The better answer is fair.", "What is unfair in it?", "Make it fair.")
CASE = Case("8 20", "22 30 36", "21 7", FAIR)


# ------------------------------------------------------------------------------ P


@pytest.fixture(scope="module", params=["chatml", None])
def local(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges") / "model"
    path = tiny_model_folder(folder, template=request.param) if request.param else DIGITS
    return LocalJudge(load_model(path), batch_size=3)


def test_p_is_the_softmax_over_1_and_2_as_the_next_token(local):
    """By the model's own logits of one text without padding, and the tokenizer alone."""
    texts = [verdict_text(CASE), verdict_text(CASE.swapped()), "1 or 2?", "which?"]
    tokenizer, found = local.loaded.tokenizer, local.first_wins(texts)
    for text, p in zip(texts, found, strict=True):
        if local.chat:
            turns = [{"role": "user", "content": text}]
            asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            blank = ""
        else:
            asked, blank = f"{text}\n\nAnswer:", " "
        one, two = (tokenizer.encode(asked + blank + d) for d in "12")
        assert one[:-1] == two[:-1] and tokenizer.decode([one[-1]]).strip() == "1"
        logits = np.array(local.loaded.model(mx.array([one[:-1]]))[0, -1].astype(mx.float32))
        pair = np.exp(np.float64(logits[[one[-1], two[-1]]] - logits.max()))
        assert p == pytest.approx(pair[0] / pair.sum(), abs=1e-5)  # float32 logits of a batch


@pytest.mark.parametrize("debate", [0, 1])
def test_a_swapped_pair_gives_1_minus_p(local, debate):
    judge_ = LocalJudge(local.loaded, batch_size=4, max_new_tokens=4)
    one, other = judge_cases(judge_, [CASE, CASE.swapped()], debate)
    assert one.p + other.p == pytest.approx(1, abs=1e-6)
    assert one.orders == pytest.approx(other.orders[::-1], abs=1e-6)


def test_a_judge_that_sees_the_place_alone_prefers_neither_answer():
    """One order alone would say .9."""
    (verdict,) = judge_cases(Scripted(lambda text: 0.9), [CASE])
    assert verdict.p == pytest.approx(0.5, abs=1e-12) and not verdict.orders_agree


def test_a_judge_that_sees_the_answers_is_believed():
    scripted = Scripted(lambda text: 0.8 if "Answer 1:\n22 30 36" in text else 0.3)
    verdict, swapped = judge_cases(scripted, [CASE, CASE.swapped()])
    assert verdict.orders == (0.8, 0.3) and verdict.p == pytest.approx(0.75)
    assert verdict.orders_agree and swapped.p == pytest.approx(0.25)
    for text in scripted.verdicts:
        assert "8 20" in text and FAIR.principle in text and "1 or 2" in text
        assert "22 30 36" in text and "21 7" in text


def test_what_cannot_be_answered_costs_its_own_pair_alone():
    failing = Scripted(lambda text: Unanswered("no") if "Answer 1:\n21 7" in text else 0.7)
    other = Case("2", "4", "6", FAIR)
    first, second = judge_cases(failing, [CASE, other])
    assert first == Unanswered("no") and second.p == pytest.approx(0.5)


# ------------------------------------------------------------------------------ debate


def test_in_a_debate_each_side_is_argued_for_and_the_judge_reads_it():
    scripted = Scripted(writes=lambda text: f"argument {len(scripted.asked)}")
    count = iter(range(100))
    scripted.writes = lambda text: f"argument {next(count)}"
    judge_cases(scripted, [CASE], debate=2)
    assert len(scripted.asked) == 2 * 2 * 2  # orders, sides, rounds
    advocates = ["advocate of answer 1" in text for text in scripted.asked]
    assert advocates == [True, True, False, False] * 2
    # The other side and the next round read what was said; so does the verdict.
    assert "argument 0" in scripted.asked[2] and "argument 1" in scripted.asked[3]
    assert "argument 2" in scripted.asked[4] and "argument 3" not in scripted.asked[4]
    for text, own in zip(scripted.verdicts, ((0, 2, 4, 6), (1, 3, 5, 7)), strict=True):
        assert [f"argument {i}" in text for i in range(8)] == [i in own for i in range(8)]
    silent = Scripted()
    judge_cases(silent, [CASE], debate=0)
    assert silent.asked == [] and silent.verdicts == [
        verdict_text(CASE),
        verdict_text(CASE.swapped()),
    ]


def test_no_debate_is_the_same_bytes_and_one_round_changes_what_is_judged():
    words = ["--input", PAIRS, "--max-rows", 3, "--judge", DIGITS, "--output"]
    run(*words, "a.jsonl")
    run(*words, "b.jsonl", "--debate", 0)
    run(*words, "c.jsonl", "--debate", 1, "--judge-max-tokens", 4)
    assert Path("a.jsonl").read_bytes() == Path("b.jsonl").read_bytes()
    plain, debated = lines("a.jsonl"), lines("c.jsonl")
    assert debated[0]["judge"]["debate"] == 1 and "debate" not in plain[0]["judge"]
    assert all(
        a["judge"]["first_wins"] != c["judge"]["first_wins"]
        for a, c in zip(plain, debated, strict=True)
    )


# ------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("share", [0.0, 0.3, 0.98])
def test_a_stopped_run_is_gone_on_with_by_the_same_command(share):
    """A kill leaves whole lines, and a torn one at the most."""
    words = ["--input", PAIRS, "--judge", DIGITS, "--max-rows", 6, "--batch-size", 2]
    run(*words)
    whole = Path("judged.jsonl").read_bytes()
    Path("judged.jsonl").write_bytes(whole[: int(share * len(whole))])
    out, _ = run(*words)
    assert Path("judged.jsonl").read_bytes() == whole
    assert ("goes on after" in out) == (share > 0)


@pytest.mark.parametrize(
    "more, said",
    [
        (["--seed", 3], "was judged with another principle"),
        (["--debate", 1], "was judged with another debate: None, not 1"),
        (["--input", "other.jsonl"], "is about other answers than this input has there"),
        (["--max-rows", 1], "is no row of this input"),
    ],
)
def test_labels_of_another_judge_or_input_are_not_mixed_in(more, said):
    words = ["--input", PAIRS, "--judge", DIGITS, "--max-rows", 3]
    run(*words)
    before = Path("judged.jsonl").read_bytes()
    write("other.jsonl", lines(PAIRS)[3:9])
    _, err = run(*words, *more, status=2)
    assert said in err and "--force begins anew" in err and err.count("error:") == 1
    assert Path("judged.jsonl").read_bytes() == before
    run(*words, *more, "--force")
    assert len(lines("judged.jsonl")) == (1 if "--max-rows" in more else 3)


@pytest.mark.parametrize(
    "words, said",
    [
        ("--input PAIRS --judge-url http://127.0.0.1:9/v1 --judge-retries 0", "refused"),
        ("--prompts PAIRS --model nowhere --ground-truth-reward", "nowhere"),
        ("--input PAIRS --reward-function bad.py:raises", "raised ValueError"),
        ("--input PAIRS --revise --judge-url http://127.0.0.1:9/v1 --judge-retries 0", "refused"),
    ],
)
def test_force_keeps_the_labels_that_are_there_until_there_are_others(words, said):
    """They may have cost money, and a judge that is not there would leave none."""
    Path("bad.py").write_text("def raises(prompts, responses):\n    raise ValueError('no')\n")
    again = ["--input", PAIRS, "--judge", DIGITS, "--max-rows", 2, "--min-confidence", 0.505]
    run(*again, "--output", "judged.jsonl")
    Path("judged.unlabelled.jsonl").write_text('{"prompt": "left"}\n')
    before = {file: Path(file).read_bytes() for file in ("judged.jsonl", "judged.unlabelled.jsonl")}
    words = words.replace("PAIRS", PAIRS).split()
    _, err = run(*words, "--output", "judged.jsonl", "--force", status=2)
    assert said in err and err.count("error:") == 1
    assert {file: Path(file).read_bytes() for file in before} == before
    run("--input", PAIRS, "--ground-truth-reward", "--max-rows", 1, "--force")
    assert len(lines("judged.jsonl")) == 1 and lines("judged.unlabelled.jsonl") == []


def test_a_file_of_something_else_is_left_alone():
    Path("judged.jsonl").write_text('{"prompt": "mine"}\n')
    _, err = run("--input", PAIRS, "--ground-truth-reward", status=2)
    assert "judged.jsonl:1: is no row of this input" in err
    assert Path("judged.jsonl").read_text() == '{"prompt": "mine"}\n'


# ------------------------------------------------------------------------------ revisions


def test_answers_are_criticised_and_written_anew_for_sft():
    words = ["--input", PAIRS, "--max-rows", 2, "--judge", DIGITS, "--revise"]
    run(*words, "--judge-max-tokens", 6)
    rows = lines("revised.jsonl")
    given = lines(PAIRS)[:2]
    answers = [row[side] for row in given for side in ("chosen", "rejected")]
    assert [row["revision"]["answer"] for row in rows] == answers
    assert all(row["completion"].strip() and row["revision"]["critique"] for row in rows)
    assert (
        sft.main(
            "--train --mask-prompt --train-file revised.jsonl --iters 2 --save-every 0 "
            "--steps-per-eval 0".split()
        )
        == 0
    )
    whole = Path("revised.jsonl").read_bytes()
    Path("revised.jsonl").write_bytes(whole[:-20])
    run(*words, "--judge-max-tokens", 6)
    assert Path("revised.jsonl").read_bytes() == whole


def test_the_revision_is_asked_for_with_the_critique():
    from data_utils import Record
    from rewards.revisions import revisions

    scripted = Scripted(writes=lambda text: "it is odd" if "unfair" in text else "4 6")
    record = Record("prompt_completion", "x:1", {}, prompt="2", completion=" 3 5")
    ((row, good),) = revisions(scripted, [(0, record, FAIR)])
    assert good and row["completion"] == "4 6" and row["revision"]["critique"] == "it is odd"
    critique, revision = scripted.asked
    assert "3 5" in critique and "Make it fair." not in critique
    assert "3 5" in revision and "it is odd" in revision and "Make it fair." in revision


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "has no principles"),
        ("principles: []", "has no principles"),
        ("principles:\n", "has no principles"),
        ("rules:\n- name: a\n", "unknown key 'rules'"),
        ("principles: fair\n", "principles must be a list"),
        ("- name: a\n  principle: ''\n", "principle must be a text that is not empty"),
        ("- name: '  '\n  principle: b\n", "name must be a text that is not empty"),
        ("- name: a\n  principle: 3\n", "principle must be a text"),
        ("- name: a\n", "principle is missing"),
        ("- principle: a\n", "name is missing"),
        ("- name: a\n  principle: b\n  weight: 3\n", "unknown key 'weight'"),
        ("- name: a\n  principle: b\n- name: a\n  principle: c\n", "two principles have the name"),
        (
            "- name: 2020-01-01\n  principle: b\n",
            "name must be a text; 2020-01-01 is one in quotes",
        ),
        ("- name: a\n  principle: b\n  name: c\n", "c.yaml:3: not YAML: 'name' stands there twice"),
        ('- name: "a\\0"\n  principle: b\n', "principle 1: name: a NUL character"),
        ('- name: a\n  principle: "\\ud800"\n', "principle 1: principle: half of a surrogate"),
        ("- just a text\n", "principle 1: must have name and principle"),
        ("principles: [\n", "not YAML"),
        ("- !!python/object/apply:os.system [ls]\n", "not YAML"),
    ],
)
def test_a_constitution_that_says_nothing_is_refused(text, said):
    Path("c.yaml").write_text(text)
    _, err = run("--input", PAIRS, "--judge", DIGITS, "--constitution", "c.yaml", status=2)
    assert said in err and err.startswith("error: c.yaml") and err.count("\n") == 1
    assert not Path("judged.jsonl").exists()


def test_a_constitution_may_share_its_parts():
    """Merge keys: what stands there again on purpose is no key that stands there twice."""
    text = "- &a\n  name: a\n  principle: p\n- &b\n  <<: *a\n  name: b\n- <<: *b\n  name: c\n"
    Path("c.yaml").write_text(text)
    found = read_constitution("c.yaml")
    assert [(one.name, one.principle) for one in found] == [("a", "p"), ("b", "p"), ("c", "p")]


@pytest.mark.parametrize(
    "words, said",
    [
        (f"--input {PAIRS}", "no judge: give --judge MODEL"),
        ("--judge x", "nothing to judge"),
        (f"--input {PAIRS} --prompts p --judge x", "--input and --prompts: both say"),
        (f"--input {PAIRS} --judge nowhere", "nowhere: no model folder there"),
        (f"--input {PAIRS} --judge .", "not a model folder: config.json is missing"),
        (f"--input {PAIRS} --judge x --ground-truth-reward", "give one judge"),
        (f"--input {PAIRS} --judge x --constitution none.yaml", "cannot read the constitution"),
        ("--input lone.jsonl --ground-truth-reward", "lone.jsonl:1: one answer to its prompt"),
        ("--input prompts.jsonl --ground-truth-reward", "prompts.jsonl:1: a prompt without a resp"),
        ("--input text.jsonl --ground-truth-reward", "text.jsonl:1: plain text has no prompt"),
        ("--input empty.jsonl --ground-truth-reward", "empty.jsonl"),
        (
            f"--input {PAIRS} --ground-truth-reward --debate 1",
            "--debate 1 has no effect on",
        ),
        (f"--input {PAIRS} --ground-truth-reward --revise", "--revise has no effect on rewards"),
        (
            f"--input {PAIRS} --judge x --revise --debate 1",
            "--debate 1 has no effect with",
        ),
        (f"--input {PAIRS} --judge x --judge-retries 1", "no effect without --judge-url"),
        (f"--input {PAIRS} --judge x --min-confidence .4", "--min-confidence: give a probability"),
        (f"--input {PAIRS} --judge x --model y", "--model y has no effect without --prompts"),
        (f"--input {PAIRS} --judge x --top-k 3", "--top-k 3 has no effect without --prompts"),
        (f"--input {PAIRS} --judge-url ftp://x", "judge: a URL like http://host:port/path"),
        (
            f"--input {PAIRS} --judge-url http://x --judge-key NO_KEY",
            "no such environment",
        ),
    ],
)
def test_bad_input_is_one_line(words, said):
    write("lone.jsonl", [{"prompt": "2", "completion": "4"}])
    write("prompts.jsonl", [{"prompt": "2"}])
    write("text.jsonl", [{"text": "2 4"}])
    Path("empty.jsonl").write_text("")
    _, err = run(*words.split(), status=2)
    assert said in err and err.count("error: ") == 1 and "Traceback" not in err, err
    assert not Path("judged.jsonl").exists()


# ------------------------------------------------------------------------------ behaviour


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_labels_by_the_true_score_make_a_reward_model_that_ppo_can_follow(seed):
    """First measured: accuracy 0.936 on 500 pairs; PPO at 0.91 to 0.95."""
    import ppo_training
    from data import generate_digit_data

    generate_digit_data.main(
        "--increasing --multiple-of 2 --num-samples 2500 --kind preference --output-dir .".split()
    )
    run("--input", "preference_increasing_mult_2_train.jsonl", "--ground-truth-reward")
    words = (
        "--reward-model --train --no-margins --train-file judged.jsonl --batch-size 32 --iters 300 "
        f"--learning-rate 3e-3 --lr-schedule linear --steps-per-eval 0 --seed {seed} "
        "--save-file rm.npz --output-dir rm --test "
        "--test-file preference_increasing_mult_2_test.jsonl"
    )
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        sft.main(words.split())
    (line,) = [line for line in out.getvalue().splitlines() if line.startswith("test: loss")]
    assert float(line.split()[line.split().index("accuracy") + 1]) >= 0.9
    words = (
        f"--data {ROOT}/data --reward-model rm.npz --true-score --num-steps 60 --eval-every 0 "
        f"--init-kl-coef 0.3 --save-file ppo.npz --output-dir ppo --seed {seed}"
    )
    ppo_training.main(words.split())
    last = [row["env/ground_truth_mean"] for row in lines("ppo/metrics.jsonl")][-5:]
    assert np.mean(last) >= 0.9
