"""What a run leaves behind: figures of held-out rows, plots, a summary, and what to do next."""

from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from run_folder.console import command, next_lines
from run_folder.run import Run, read_rows


def finish_supervised(
    args: Namespace,
    run: Run,
    loop: Any,
    written: Sequence[Path],
    valid: Any,
    reward_model: Any,
    going_on: str,
    **summary: Any,
) -> None:
    """Loss or agreement on held-out rows, a plot and a summary; say where everything lies.

    `written`: the files so far; `valid`: the rows, if there are any; `reward_model`: what scores
    them, None for a language model; `going_on`: the next command.
    """
    from reports.training_plots import plot_losses

    if reward_model is not None and valid is not None:
        report = agreement(reward_model, valid.rows, run.plots)
        summary |= {f"heldout/{name}": value for name, value in report.items()}
    elif valid is not None:
        found = loop.validation_of()
        show("validation", found)
        summary |= {f"valid/{name}": value for name, value in found.items()}
    unit = "nats per token" if reward_model is None else "loss"
    plot = plot_losses(read_rows(run.folder), run.plots / "loss.png", unit=unit)
    run.finish({"steps": loop.step, "best_valid_loss": loop.best, **loop.totals, **summary})
    say_written(run, [*written, plot], going_on)


def agreement(model: Any, rows: Sequence, plots: Path | None = None) -> dict[str, float]:
    """How far a reward model's scores agree with rewards or preferences; with `plots`, drawn."""
    from reports.reward_evaluation import evaluate_scores

    score = partial(model.score, watched_as="scoring")
    report = evaluate_scores(score, rows, plots, gain=model.gain, offset=model.offset)
    told = [f"{k} {v:,.0f}" if k == "pairs" else f"{k} {v:.3f}" for k, v in report.items()]
    print("held-out rows: " + "  ".join(told))
    return report


def finish_rollouts(
    args: Namespace,
    run: Run,
    loop: Any,
    written: Sequence[Path],
    commands: Sequence[str],
    *,
    metric: str,
    **summary: Any,
) -> None:
    """Plots and a summary of a run on rollouts; say where everything lies.

    `written`: the files so far; `commands`: what to do with them; `metric` names a reward's mean in
    the metrics, from its {name}.
    """
    from reports.training_plots import plot_learned_and_true
    from rewards.learned import GROUND_TRUTH, LEARNED

    written = [*written]
    if args.reward_model and args.true_score:
        names = {"learned": metric.format(name=LEARNED), "true": metric.format(name=GROUND_TRUTH)}
        place = run.plots / "learned_and_true.png"
        written.append(plot_learned_and_true(read_rows(run.folder), place, **names))
    evaluations = {"first": loop.evaluations[:1], "last": loop.evaluations[-1:]}
    run.finish({"steps": loop.step, **summary, "evaluation": evaluations})
    say_written(run, written, *commands)


def finish_ppo(
    args: Namespace,
    run: Run,
    loop: Any,
    written: Sequence[Path],
    commands: Sequence[str],
    **summary: Any,
) -> None:
    """`finish_rollouts` of PPO, with its plot and its last KL."""
    from reports.training_plots import plot_ppo

    rows = read_rows(run.folder)
    adapted = {"kl_target": args.target if args.adap_kl_ctrl else None}
    if args.use_dynamic_kl:
        adapted = {"kl_target": args.kl_target, "kl": "objective/kl_per_token", "unit": "token"}
    plot = plot_ppo(rows, run.plots / "ppo.png", **adapted)
    kls = [row["objective/kl"] for row in rows if row.get("objective/kl") is not None][-10:]
    summary["kl"] = sum(kls) / len(kls) if kls else None
    finish_rollouts(
        args, run, loop, [*written, plot], commands, metric="env/{name}_mean", **summary
    )


def policy_commands(args: Namespace, tuning: Any) -> list[str]:
    """What to do with a policy that was saved."""
    fused = tuning.kind == "prompt" or args.fused_dir
    return [*([] if fused else [fuse_command(args)]), talk_command(args)]


def fuse_command(args: Namespace) -> str:
    made = {"adapter_file": args.save_file, "save_path": "my_model/"}
    return command("fuse.py", **base_words(args), **made)


def talk_command(args: Namespace, file: Any = None) -> str:
    """`file`: an adapter in place of the one that was saved."""
    return command("talk_to_model.py", **base_words(args), resume_file=file or args.save_file)


def base_words(args: Namespace) -> dict[str, Any]:
    """Options that make again, for another script, the base that an adapter was trained on."""
    return {"model": args.model, "tokenizer": args.tokenizer, "quantize": args.quantize}


def say_written(run: Run, written: Iterable[Any], *commands: str) -> None:
    """The last words of a run: where everything lies, and what to do with it."""
    print("wrote " + "\n      ".join(map(str, [*written, run.folder / "metrics.jsonl"])))
    print(next_lines(commands))


def show(what: str, metrics: Mapping[str, float]) -> None:
    """One line of metrics."""
    print(f"{what}: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
