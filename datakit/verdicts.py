"""Estimators over raw verdicts. Nothing here is ever stored instead of the verdicts."""

from collections import defaultdict
from collections.abc import Sequence

from datakit.records import Verdict


def mean_scores(verdicts: Sequence[Verdict], responses: int) -> list[float | None]:
    """Mean pairwise score of each response, 0..1; None where no verdict shows it.

    A win counts 1, a tie ½, over all opponents, judges and orders: with both orders asked, a
    verdict that flips with the order counts as the tie that it is.
    """
    found: list[list[float]] = [[] for _ in range(responses)]
    for verdict in verdicts:
        if verdict.form == "pairwise":
            for index, score in zip(verdict.shown, verdict.scores, strict=True):
                found[index].append(score)
    return [sum(scores) / len(scores) if scores else None for scores in found]


def first_share(verdicts: Sequence[Verdict]) -> float | None:
    """Share of decided pairwise verdicts that prefer what was shown first; None without any."""
    decided = [v.scores[0] for v in verdicts if v.form == "pairwise" and v.scores[0] != 0.5]
    return sum(decided) / len(decided) if decided else None


def flip_share(verdicts: Sequence[Verdict]) -> float | None:
    """Share of pairs judged in both orders whose preferred response changes with the order.

    A tie in one order and a preference in the other is no flip. None without such pairs.
    """
    seen: dict[tuple[str, ...], dict[tuple[int, ...], float]] = defaultdict(dict)
    for verdict in verdicts:
        if verdict.form == "pairwise":
            pair = str(sorted(verdict.shown))
            key = (verdict.judge, verdict.template, verdict.aspect, pair)
            low = verdict.shown.index(min(verdict.shown))
            seen[key][verdict.shown] = verdict.scores[low]
    both = [list(scores.values()) for scores in seen.values() if len(scores) == 2]
    return sum(abs(a - b) == 1 for a, b in both) / len(both) if both else None
