"""How hard a pair is for a reference model: the likelihood of its two answers.

Source: Preference Learning Algorithms Do Not Learn Rankings (2405.19534). With
    c = log π(rejected|x) − log π(chosen|x) of the reference model π, a model in training ranks the
    pair rightly if and only if its DPO loss on it is at most −log σ(β c). Sums grow with length:
    never filter on them alone. Equal likelihoods are right for the label and for its opposite, as
    c ≤ 0 says of both.
Takes: Pair. All turns of an answer are scored, those of the user that lie between included. Of
    pair_kind `prompt` the one answer is scored after either prompt: the bound on the DPO loss holds
    there too, the idealised ranking does not.
Gives: Pair, the same row with its measures.
Measures: all in nats (natural logarithm) where not said otherwise. `logp.chosen`, `logp.rejected`
    (at most 0: log-probability of all tokens of the side); `per_token.*` (at most 0: their mean);
    `tokens.*` (1 or more: their number); `logratio` (signed: c, above 0 where the rejected side is
    likelier); `logratio_per_token` (signed: the same of the means). Of the following `.chosen`
    speaks of the label as it stands and `.rejected` of the opposite one: `correct.*` (0 or 1:
    whether the model ranks the sides by the label, c ≤ 0; the mean over rows is the ranking
    accuracy); `correct_per_token.*` (the same of the means); `loss_to_flip.*` (0 or more:
    −log σ(β c); an easy pair has a high one). With `votes`: `idealised_logratio` (signed:
    c − log(α/(1−α))/β, with α the share of votes, 0.001 to 0.999: what is left of c in the best
    model that DPO could find) and `idealised.*` (0 or 1: whether that model ranks the sides
    rightly).
Drops: `no_prompt_logprobs`, `another_text`, `no_logprob`, `invalid_logprob` where the reply holds
    no score of the text that was sent; `content_filter`; `template_refuses`, `template_splits`
    where the chat template has no text for the turns; `empty`, `not_text` where there is nothing
    that could be scored; `no_votes` where the row lacks the measure that `votes` names;
    `not_comparable` for pair_kind `prompt` with `votes`.
"""

import math
from collections.abc import Mapping, Sequence

from pydantic import Field

from datakit.errors import Rejected, RowError
from datakit.kit import Kit
from datakit.models.likelihood import Likelihood
from datakit.records import Pair
from datakit.step import ChatRole, RowStep
from datakit.templates import BUILT_IN, check_template, load_template

EPSILON = 0.001  # the paper's, for votes that all agree


class ReferenceLikelihood(RowStep[Pair, Pair]):
    """Score both answers of a pair under a reference model.

    model: a role of a text completions endpoint that echoes log-probabilities (vLLM does; if it
    refuses max_tokens 0, put `max_tokens: 1` into the role's extra_body). template: the chat
    template that makes text of the turns: `chatml`, `llama3`, `plain` (for base models), a .jinja
    file or a model folder; default the model's own, where `model` is the whole path of a folder.
    beta: strength of the pull to the reference model in DPO. votes: a measure whose `.chosen` and
    `.rejected` hold each side's votes or mean score, as `pair.score`. (A pair's `strength` is no
    share of votes.)
    """

    model: ChatRole
    template: str | None = None
    beta: float = Field(default=0.1, ge=1e-6, le=1e6)  # the paper's
    votes: str | None = None

    def fingerprint(self, kit: Kit) -> str:
        # The model's own template is part of its identity.
        if self.template is None:
            return ""
        named = self.template if self.template in BUILT_IN else kit.path(self.template)
        template = load_template(named)
        check_template(template)
        return template.fingerprint()

    async def each(self, row: Pair, kit: Kit) -> Sequence[Pair]:
        agreement = None if self.votes is None else vote_logit(row, self.votes)
        other = row.prompt_rejected if row.pair_kind == "prompt" else row.prompt
        found = await kit.settle(
            kit.score(self.model, prompt, answer, self.template)
            for prompt, answer in ((row.prompt, row.chosen), (other, row.rejected))
        )
        sides = [one for one in found if isinstance(one, Likelihood)]
        errors = [one for one in found if isinstance(one, RowError)]
        if errors:
            # Transient if any was, so that the next run asks again for that alone.
            raise next((error for error in errors if error.transient), errors[0])
        measures, signed = difficulty(sides[0], sides[1], self.beta, agreement)
        named = {kit.measure(name): value for name, value in measures.items()}
        update = {
            "measures": row.measures | named,
            "signed": tuple(dict.fromkeys((*row.signed, *(kit.measure(name) for name in signed)))),
        }
        return [row.model_copy(update=update)]


def difficulty(
    chosen: Likelihood, rejected: Likelihood, beta: float, agreement: float | None = None
) -> tuple[Mapping[str, float], tuple[str, ...]]:
    """The measures of a pair, and which of them are signed.

    agreement: log(α/(1−α)) of the share α of votes for the chosen side.
    """
    ratio = rejected.sum - chosen.sum
    per_token = rejected.per_token - chosen.per_token
    signed = {"logratio": ratio, "logratio_per_token": per_token}
    sided: dict[str, tuple[float, float]] = {
        "logp": (chosen.sum, rejected.sum),
        "per_token": (chosen.per_token, rejected.per_token),
        "tokens": (chosen.tokens, rejected.tokens),
        "correct": (ratio <= 0, ratio >= 0),
        "correct_per_token": (per_token <= 0, per_token >= 0),
        "loss_to_flip": (loss_to_flip(ratio, beta), loss_to_flip(-ratio, beta)),
    }
    if agreement is not None:
        ideal = ratio - agreement / beta
        signed["idealised_logratio"] = ideal
        sided["idealised"] = (ideal < 0, ideal > 0)
    both = {
        f"{name}.{side}": float(value)
        for name, values in sided.items()
        for side, value in zip(("chosen", "rejected"), values, strict=True)
    }
    return signed | both, tuple(signed)


def loss_to_flip(ratio: float, beta: float) -> float:
    """−log σ(β c) in nats: the DPO loss below which a pair is ranked rightly; exact for any c."""
    x = beta * ratio
    return max(0.0, -x) + math.log1p(math.exp(-abs(x)))


def vote_logit(row: Pair, votes: str) -> float:
    """log(α/(1−α)) of the share α of votes for the chosen side, α kept within EPSILON of 0 and 1.

    Raises Rejected (`no_votes`, `not_comparable`).
    """
    if row.pair_kind != "response":
        raise Rejected(
            "not_comparable", "votes rank two answers to one prompt, and this pair has two prompts"
        )
    sides = [row.measures.get(f"{votes}.{side}") for side in ("chosen", "rejected")]
    chosen, rejected = sides
    if chosen is None or rejected is None or min(chosen, rejected) < 0 or chosen == rejected == 0:
        raise Rejected("no_votes", f"{votes}.chosen and {votes}.rejected are {sides}")
    most = math.log((1 - EPSILON) / EPSILON)
    if chosen == 0 or rejected == 0:
        return most if chosen else -most
    # A difference of logarithms, so that the opposite label has exactly the opposite value.
    return max(-most, min(most, math.log(chosen) - math.log(rejected)))
