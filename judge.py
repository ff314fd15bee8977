"""Label pairs of answers without a person: by a model with a constitution, or by any reward.

RLAIF (Bai et al. 2022, Lee et al. 2023): the judge reads a question and both answers, in both
orders, and one principle of the constitution; what it prefers trains a reward model or DPO. Pairs
come from a file, or --model answers every prompt twice. Each label is on the disk before the next
pair is judged: after a kill the same command goes on.

Within seconds on a laptop, on the embedded model's data, with the true score as judge:
    python judge.py --input data/preference_increasing_mult_2_test.jsonl --ground-truth-reward
A real one:
    python judge.py --prompts prompts.jsonl --model MODEL --judge LARGER_MODEL --soft-labels
    python sft.py --reward-model --train --train-file judged.jsonl --soft-labels --model MODEL
"""

import fast_blas

import os
from math import exp
from pathlib import Path

from command_line.data_flags import first_text, settle_date, tokenising, warn_of_model
from command_line.exits import run_main
from command_line.judge_flags import by_model, parse_arguments
from command_line.reward_flags import refuse_sending
from command_line.sampling import sample
from command_line.score_flags import read_input
from command_line.scoring import load_scorer, scoring_rewards
from run_folder.appended import Appended
from run_folder.console import Wait, command, next_lines
from run_folder.secrets import redact, tell

# ------------------------------------------------------------------------------ main


def main(words=None) -> int:
    args = parse_arguments(words)
    records = read_input(args)
    refuse_sending(args)
    fast_blas.tell_of_slowness()
    check_judge(args)
    output = Path(args.output)
    labels = Appended(output, anew=args.force)
    left = Appended(output.with_name(f"{output.stem}.unlabelled.jsonl"), anew=args.force)
    try:
        (revise if args.revise else label)(args, records, labels, left)
    except KeyboardInterrupt:
        how = " without --force" if args.force and labels.rows else ""
        tell(f"stopped after {len(labels.rows)} rows of {output}; the same command{how} goes on")
        raise
    finally:
        labels.close()
        left.close()
    return 0


# ------------------------------------------------------------------------------ judges


def check_judge(args) -> None:
    """Raise UserError for a judge that cannot be loaded, before anything is sampled."""
    from models.load import check_folder, resolve_path

    if args.judge is not None and args.judge_url is None:
        folder = resolve_path(args.judge, with_code=args.trust_remote_code)
        check_folder(folder, args.judge, args.trust_remote_code)


def load_judge(args):
    """The model that judges, here or behind an address; its name goes into every row."""
    judge = unnamed_judge(args)
    judge.name = redact(judge.name)
    return judge


def unnamed_judge(args):
    """`load_judge`, whose name may hold what the environment keeps secret."""
    if args.judge_url is not None:
        from rewards.chat_service import ChatJudge

        return ChatJudge(
            args.judge_url,
            model=args.judge,
            key=os.environ.get(args.judge_key),
            connections=args.judge_connections,
            max_new_tokens=args.judge_max_tokens,
            timeout=args.judge_timeout,
            retries=args.judge_retries,
        )
    from models.load import load_model
    from rewards.judge import LocalJudge

    options = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    loaded = load_model(args.judge, quantize=args.quantize, **options)
    settle_date(args, loaded.tokenizer)
    size = {"batch_size": args.batch_size, "max_new_tokens": args.judge_max_tokens}
    return LocalJudge(loaded, **size)


def principles_of(args, count: int) -> list:
    """The principle of each of so many rows."""
    from rewards.constitution import drawn

    return [drawn(args.principles, args.seed, row) for row in range(count)]


def model_verdicts(args, of):
    """(a function that judges comparisons by a model, what their rows say of it)."""
    from rewards.comparisons import answer_text, question_text
    from rewards.judge import Case, judge_cases

    judge = load_judge(args)
    principles = principles_of(args, len(of))
    about = [{"principle": principle.name, "by": judge.name} for principle in principles]
    if args.debate:
        about = [one | {"debate": args.debate} for one in about]

    def verdicts(part):
        cases = [
            Case(
                question_text(c.prompt, c.first.record.extras),
                *map(answer_text, c.answers),
                principles[c.number],
            )
            for c in part
        ]
        return judge_cases(judge, cases, args.debate)

    return verdicts, about


def reward_verdicts(args, answers, of, tokenizer, reward_model):
    """`model_verdicts` by the rewards of the flags: the higher score wins."""
    from data_utils import columns_of
    from rewards.judge import Verdict
    from rewards.scored_rows import score_pairs

    rewards = scoring_rewards(args, tokenizer, reward_model, answers)
    rewards.check_columns(columns_of(answer.whole for answer in answers))
    about = {"principle": None, "by": redact(str(rewards))}
    if args.soft_labels:
        about["soft"] = True

    def verdicts(part):
        both = [answer for c in part for answer in (c.first, c.second)]
        score_pairs(rewards, both, args.batch_size, lambda count: None)
        found = []
        for c in part:
            gain = c.first.score - c.second.score
            hard = 0.5 + 0.5 * ((gain > 0) - (gain < 0))
            soft = 1 / (1 + exp(-gain)) if gain > -700 else 0.0
            found.append(Verdict(soft if args.soft_labels else hard))
        return found

    return verdicts, [about] * len(of)


# ------------------------------------------------------------------------------ labels


def label(args, records, labels, left) -> None:
    """Judge every pair that has no label yet, and report on all."""
    from rewards.comparisons import (
        answers_of,
        comparisons,
        earlier,
        may_answer_later,
        neighbours,
        unused_fields,
    )
    from rewards.scored_rows import make_pairs

    answers, tokenizer = sample(args, records, 2) if args.prompts else (None, None)
    pair_up = comparisons if answers is None else neighbours
    if by_model(args):
        of = pair_up(answers or answers_of(records))
        if answers is None and (unused := unused_fields(records)):
            print(f"fields that nothing used: {', '.join(unused)}")
        verdicts, about = model_verdicts(args, of)
    else:
        tokenizer, reward_model = load_scorer(args, tokenizer)
        if answers is None:
            warn_of_model(args, records, tokenizer)
            settle_date(args, tokenizer)
            answers_of(records)  # refuses what has no two answers
            answers, _ = make_pairs(records, tokenizer, tokenising(args))
        of = pair_up(answers)
        verdicts, about = reward_verdicts(args, answers, of, tokenizer, reward_model)
    left.leave_out([row for row in left.rows if may_answer_later(row)])
    done = earlier(labels.rows, str(labels.path), of, about, args.min_confidence)
    done |= earlier(left.rows, str(left.path), of, about, args.min_confidence)
    if done:
        print(f"{labels.path}: goes on after {len(done)} of {len(of)} pairs")
    todo = [c for c in of if c.number not in done]
    done |= judge_all(args, todo, verdicts, about, labels, left)
    finish(args, of, done, labels, left)


def begin(*files) -> None:
    """With --force: rows of before go now that there are others, and not where no judge answers."""
    for file in files:
        file.begin()


def judge_all(args, todo, verdicts, about, labels, left) -> dict:
    """Verdicts on these comparisons, each written before the next batch; rows by number."""
    from rewards.comparisons import not_to_judge, verdict_row
    from rewards.judge import Unanswered

    each = args.batch_size if args.judge_url is None else args.judge_connections
    done = {}
    with Wait("judging", len(todo)) as wait:
        for start in range(0, len(todo), each):
            part = todo[start : start + each]
            found = {c.number: Unanswered(why) for c in part if (why := not_to_judge(c))}
            differ = [c for c in part if c.number not in found]
            found |= zip([c.number for c in differ], verdicts(differ), strict=True)
            begin(labels, left)
            for c in part:
                row, is_label = verdict_row(
                    c, found[c.number], about[c.number], args.min_confidence
                )
                (labels if is_label else left).append(row)
                done[c.number] = row
            wait.advance(len(part))
    return done


def finish(args, of, done, labels, left) -> None:
    """The report, where everything lies, and what to do with it."""
    from rewards.comparisons import may_answer_later, place_warning, report

    print("\n".join(report(done, of)))
    if (warning := place_warning(done.values())) is not None:
        tell(f"warning: {warning}")
    say_unanswered(sum(map(may_answer_later, left.rows)), left)
    say_written(labels, left)
    if labels.rows:
        soft = "--soft-labels" if args.soft_labels else "--no-margins"
        named = to_train(args, labels, [c.first.record for c in of])
        train = command("sft.py", "--reward-model", "--train", soft, **named)
        dpo = ["--soft-labels"] * args.soft_labels
        print(next_lines([train, command("preference_training.py", "--train", *dpo, **named)]))


def to_train(args, labels, records) -> dict:
    """What a command names that trains on the labels: the model and how its prompts are written."""
    asked = ("prompt_template", "token_format")
    own = {name: getattr(args, name) for name in asked if name in args.changed}
    unknown = None if first_text(records) is None else "MODEL"  # the embedded one knows numbers
    return {"model": args.model or unknown, "train_file": labels.path} | own


def say_unanswered(count: int, left) -> None:
    if count:
        tell(f"note: {count} without an answer of the judge; the same command asks for them again")


def say_written(*files) -> None:
    said = [f"{file.path}: {len(file.rows)} rows" for file in files if file.rows]
    print("wrote " + "\n      ".join(said) if said else "wrote nothing: there is no label")


# ------------------------------------------------------------------------------ revisions


def revise(args, records, labels, left) -> None:
    """Critique and rewrite each answer that was not; rows for sft.py."""
    from rewards.comparisons import answers_of, may_answer_later
    from rewards.revisions import earlier_revisions, revisions

    answers = sample(args, records, 1)[0] if args.prompts else answers_of(records)
    judge = load_judge(args)
    principles = principles_of(args, len(answers))
    left.leave_out([row for row in left.rows if may_answer_later(row)])
    done = earlier_revisions(labels, answers, principles, judge.name)
    if done:
        print(f"{labels.path}: goes on after {len(done)} of {len(answers)} answers")
    todo = [i for i in range(len(answers)) if i not in done]
    each = args.batch_size if args.judge_url is None else args.judge_connections
    with Wait("revising", len(todo)) as wait:
        for start in range(0, len(todo), each):
            part = todo[start : start + each]
            cases = [(i, answers[i].record, principles[i]) for i in part]
            made = revisions(judge, cases)
            begin(labels, left)
            for row, is_revision in made:
                (labels if is_revision else left).append(row)
            wait.advance(len(part))
    print(f"answers    {len(answers)}: {len(labels.rows)} revised, {len(left.rows)} left")
    say_unanswered(sum(map(may_answer_later, left.rows)), left)
    say_written(labels, left)
    if labels.rows:
        named = to_train(args, labels, records)
        print(next_lines([command("sft.py", "--train", "--mask-prompt", **named)]))


if __name__ == "__main__":
    run_main(main, tidies=True)
