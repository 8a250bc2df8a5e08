"""Plain words for the codes that a funnel counts."""

import re

_REASONS = {
    "bad_request": "the endpoint refused the request as malformed",
    "bridges_splits": "its prompt is near rows of two splits; kept out so that neither leaks",
    "broken_line": "a line of the source is not a JSON object",
    "connection": "the connection failed at every try; asked again next time",
    "content_filter": "a content filter or the model declined to answer",
    "duplicate_key": "its key stands twice in the source",
    "empty": "the model's reply was empty",
    "empty_text": "a text that it needs is empty",
    "exact_duplicate": "says the same as an earlier row, but for case, spacing or punctuation",
    "invalid_row": "the source's row does not make a valid record",
    "length": "the reply was cut by the token limit",
    "malformed_body": "the endpoint's reply was not readable; asked again next time",
    "near_duplicate": "means nearly the same as an earlier row",
    "no_verdict": "the judge's reply held no verdict",
    "not_comparable": "not a pair of two single answers, so it cannot be judged",
    "not_json": "the judge's reply was not JSON",
    "not_selected": "the rows that stay already say it",
    "null_value": "a column that it needs is null",
    "one_text": "all answers are the same text: nothing to compare",
    "prefix_mismatch": "its answers do not follow the same prompt",
    "rate_limited": "the endpoint's rate limit held at every try; asked again next time",
    "tie": "no answer is clearly the better one",
    "timeout": "no answer in time at every try; asked again next time",
    "too_few_answers": "fewer models answered than the recipe needs",
    "too_few_verdicts": "fewer verdicts arrived than the recipe needs",
    "truncated": "the better answer was cut by its length",
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
