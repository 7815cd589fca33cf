"""What stands below the bar of a run on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from pav.rl.guards import Alarm, Metrics


def lines(history: Sequence[Metrics], alarms: Sequence[Alarm] = ()) -> list[str]:
    """Four to six lines on the last iteration.

    Args:
        history: metrics of every iteration so far, newest last.
        alarms: what the guards said so far.
    """
    trained = [row for row in history if "train/outcome" in row]
    if not trained:
        return []
    now, found = trained[-1], []
    held_out = [row for row in history if "accuracy" in row]
    if held_out:
        last, best = held_out[-1], max(held_out, key=lambda row: row["accuracy"])
        passed = [f"{k} {last[k]:.3f}" for k in last if k.startswith("pass@")][-1:]
        found.append(
            f"held out  {last['accuracy']:.3f} [{last['accuracy_low']:.3f}, "
            f"{last['accuracy_high']:.3f}] after {last['iteration']:.0f}, best "
            f"{best['accuracy']:.3f} after {best['iteration']:.0f}, "
            + ", ".join([f"greedy {last['greedy']:.3f}", *passed])
        )
    found += [
        f"reward    outcome {now['train/outcome']:.3f}, dense {now['train/dense']:+.3f} a trace, "
        f"{now['train/dense_per_step']:+.3f} a step (spread {now['train/dense_spread']:.3f}), "
        f"dead groups {now['train/dead_groups']:.2f}",
        f"traces    {now['train/steps']:.1f} steps, {now['train/tokens']:.0f} tokens (longest "
        f"{now['train/tokens_max']:.0f}), truncated {now['train/truncated']:.2f}, empty "
        f"{now['train/empty_steps']:.2f}, repeated {now['train/repeated_steps']:.2f}",
        f"policy    KL {now['update/kl_k1']:.2g} (k1) {now['update/kl_k3']:.2g} (k3), entropy "
        f"{now['update/entropy']:.3f}, gradient norm {now['update/gradient_norm']:.3g}, mismatch "
        f"{now['mismatch/mean']:.1g}",
        f"seconds   {split(now)}",
    ]
    if alarms:
        said = ", ".join(f"{alarm.name} (at {alarm.iteration})" for alarm in alarms)
        found.append(f"WARNING   {said}: see rl.html")
    return found


def split(row: Metrics) -> str:
    """Seconds of an iteration by part, the longest first."""
    parts = {k.removeprefix("seconds/"): v for k, v in row.items() if k.startswith("seconds/")}
    total = parts.pop("all", sum(parts.values()))
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{part} {seconds:.2f}" for part, seconds in ordered) + f" (all {total:.2f})"
