"""From verdicts to preference pairs.

Source: best-versus-worst binarisation as used with UltraFeedback (2310.01377), with ties and
    margins made explicit.
Takes: Judged.
Gives: Pair.
Measures: `score.chosen`, `score.rejected` (0..1: mean pairwise score over all judges and orders),
    `margin` (signed, -1..1: their difference; with one judge and both orders, ½ is a win in one
    order and a tie in the other).
Drops: `tie` where no two responses differ by more than `min_margin`; `unjudged` where fewer than
    two responses have verdicts; `truncated` where only cut answers could be chosen.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from datakit.errors import Rejected
from datakit.kit import Kit
from datakit.records import Generation, Judged, Message, Pair, Response
from datakit.step import RowStep
from datakit.verdicts import mean_scores


class Pairing(RowStep[Judged, Pair]):
    """Pair the responses of a row by their mean scores.

    build: `best_worst` gives one pair, `all` every two responses that differ. min_margin: the score
    difference that a pair must exceed, so that a tie never becomes a pair. An answer that was cut
    by its length is never chosen.
    """

    build: Literal["best_worst", "all"] = "best_worst"
    min_margin: float = Field(default=0.0, ge=0, lt=1)

    async def each(self, row: Judged, kit: Kit) -> Sequence[Pair]:
        scored = [
            (score, response)
            for score, response in zip(
                mean_scores(row.verdicts, len(row.responses)), row.responses, strict=True
            )
            if score is not None
        ]
        if len(scored) < 2:
            raise Rejected("unjudged", f"{len(scored)} of {len(row.responses)} have verdicts")
        ranked = sorted(scored, key=lambda one: -one[0])
        apart = [
            (best, worst)
            for best, worst in itertools.combinations(ranked, 2)
            if best[0] - worst[0] > self.min_margin and best[1].text != worst[1].text
        ]
        if not apart:
            span = ranked[0][0] - ranked[-1][0]
            raise Rejected(
                "tie", f"scores differ by {span:g}, not by more than {self.min_margin:g}"
            )
        whole = [couple for couple in apart if couple[0][1].finish_reason != "length"]
        if not whole:
            raise Rejected("truncated", "the better answer was cut by its length")
        if self.build == "best_worst":
            whole = [max(whole, key=lambda couple: couple[0][0] - couple[1][0])]
        return [self._pair(row, best, worst, kit) for best, worst in whole]

    def _pair(
        self, row: Judged, best: tuple[float, Response], worst: tuple[float, Response], kit: Kit
    ) -> Pair:
        margin = best[0] - worst[0]
        return Pair(
            prompt=row.prompt,
            chosen=(Message(role="assistant", content=best[1].text),),
            rejected=(Message(role="assistant", content=worst[1].text),),
            chosen_from=_generation(best[1]),
            rejected_from=_generation(worst[1]),
            strength=margin,
            measures={
                kit.measure("score.chosen"): best[0],
                kit.measure("score.rejected"): worst[0],
                kit.measure("margin"): margin,
            },
            signed=(kit.measure("margin"),),
        )


def _generation(response: Response) -> Generation:
    return Generation(
        model=response.model,
        sampling=response.sampling,
        finish_reason=response.finish_reason,
        reasoning=response.reasoning,
    )
