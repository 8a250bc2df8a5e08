"""What each column of a published table of pairs means."""

from collections.abc import Iterator, Mapping
from typing import Any

_PAIR = {
    "id": "identity of the row, the same from version to version",
    "pair_key": "hash of the prompt and the two answers: a flipped or re-judged label keeps it",
    "prompt": "messages (role, content) up to the last user turn",
    "prompt_rejected": "for pair_kind prompt: the prompt that fits the answer less well",
    "chosen": "the preferred answer, as messages",
    "rejected": "the other answer, as messages",
    "pair_kind": "response: two answers to one prompt; prompt: one answer and two prompts",
    "rationale": "why the chosen answer is better, where a step wrote it",
    "context": "what the preference rests on besides the prompt, where known",
    "strength": "how sure the label is, 0 to 1; empty where not known",
    "chosen_from": "model, sampling, finish reason and reasoning behind the chosen answer",
    "rejected_from": "the same for the rejected answer",
    "parents": "ids of the rows that it was made from",
    "roots": "ids of the source rows at the start of its line",
    "source": "where its first row was read from",
    "license": "licence of that source",
    "split": "the split it belongs to, for good",
    "generator": "what wrote the prompt, where a model did",
    "references": "texts or links that the source gives with the row",
    "signed": "names of the measures whose sign turns when the pair is flipped",
    "origin": "the source's own key, or what the row was derived from",
    "extra": "all other columns of the source, as a JSON object",
    "failures": "what failed in part while the row was kept",
}


def column_lines(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(column, meaning) of every column of the pairs that the report describes."""
    yield from _PAIR.items()
    for name, figures in report["measures"].items():
        yield name, f"measure of step {name.partition('.')[0]} on {figures['n']:,} rows"
    for name, label in report["categories"].items():
        yield f"label.{name}", f"label with {label['distinct']:,} values on {label['rows']:,} rows"
