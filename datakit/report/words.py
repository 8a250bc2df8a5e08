"""Plain words for the codes that a funnel counts."""

import re

_REASONS = {
    "above_max": "its measure is over the bound",
    "bad_request": "the endpoint refused the request as malformed",
    "below_min": "its measure is under the bound",
    "bridges_splits": "its prompt is near rows of two splits; kept out so that neither leaks",
    "broken_line": "a line of the source is not a JSON object",
    "connection": "the connection failed at every try; asked again next time",
    "contaminated": "says what a benchmark asks",
    "content_filter": "a content filter or the model declined to answer",
    "duplicate_key": "its key stands twice in the source",
    "empty": "the model's reply was empty",
    "empty_text": "a text that it needs is empty",
    "empty_turn": "a turn is empty",
    "equal_once_masked": "its answers differ in masked data only",
    "exact_duplicate": "says the same as a row that stays, but for case, spacing or punctuation",
    "invalid_row": "the source's row does not make a valid record",
    "label_conflict": "another input holds the pair with the opposite label",
    "language": "in no language that the recipe allows",
    "length": "the reply was cut by the token limit",
    "listed_words": "holds words of the given list",
    "long_run": "it says one thing over and over",
    "malformed_body": "the endpoint's reply was not readable; asked again next time",
    "mixed_languages": "prompt and answer are in different languages",
    "near_duplicate": "has nearly the words or the meaning of a row that stays",
    "no_measure": "has no such measure",
    "no_score": "has no score for toxicity",
    "no_verdict": "the judge's reply held no verdict",
    "not_comparable": "not a pair of two single answers, so it cannot be judged",
    "not_json": "the judge's reply was not JSON",
    "not_selected": "the rows that stay already say it",
    "not_taken": "a good row beyond its input's share",
    "null_value": "a column that it needs is null",
    "one_sided_refusal": "one of its answers declines and the other does not",
    "one_text": "all answers are the same text: nothing to compare",
    "pii": "holds personal data or secrets",
    "pii_stays": "holds personal data or secrets where they cannot be masked",
    "prefix_mismatch": "its answers do not follow the same prompt",
    "rate_limited": "the endpoint's rate limit held at every try; asked again next time",
    "refusal": "an answer declines",
    "repeated_line_characters": "too much of it is repeated lines",
    "repeated_lines": "too many of its lines are repeated",
    "repeated_ngrams": "too much of it is repeated phrases",
    "repeated_row": "another input, or this one, holds the same row",
    "role_order": "its turns are not in the order of a conversation",
    "template": "holds marks of a chat template",
    "tie": "no answer is clearly the better one",
    "timeout": "no answer in time at every try; asked again next time",
    "too_few_answers": "fewer models answered than the recipe needs",
    "too_few_turns": "fewer turns than the recipe's bound",
    "too_few_verdicts": "fewer verdicts arrived than the recipe needs",
    "too_long": "longer than the recipe's bound",
    "too_many_turns": "more turns than the recipe's bound",
    "too_short": "shorter than the recipe's bound",
    "top_ngram": "one phrase makes up too much of it",
    "toxic_label": "labelled as toxic",
    "toxic_score": "its score for toxicity is over the bound",
    "truncated": "the better answer was cut by its length",
    "undetermined": "its language cannot be told",
    "uneven": "one answer is much longer than the other",
    "unfinished": "pending: its answers were not yet asked for",
    "unjudged": "fewer than two answers have verdicts",
    "unknown_role": "a turn has a role that is neither system, user nor assistant",
    "wrong_type": "a column of the source has another type than it needs",
}
_HTTP = re.compile(r"http_(\d{3})")


def reason_words(code: str) -> str:
    """What a reason code means, in a few words; empty for a code that is not known."""
    status = _HTTP.fullmatch(code)
    if status:
        return f"the endpoint answered with error {status.group(1)}; asked again next time"
    return _REASONS.get(code, "")
