"""Word n-grams that texts share with a set of items: linear in the words, by hashes.

Words are runs of letters, marks and digits after folding case and width; in scripts that put no
spaces between words every letter is one. An n-gram is known by 64 bits: two different ones among
1e8 by 1e5 are taken for one with a chance below 1e-6.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = rf"[{_UNSPACED}]|[[\p{{L}}\p{{N}}\p{{M}}]--[{_UNSPACED}]]+"
_PRIME = np.uint64(0x9E3779B97F4A7C15)  # odd: 2**64 over the golden ratio
_BITS = 22
_TEXTS = 20_000
_CHARACTERS = 16_000_000

MATCHES = pl.Schema(
    {"text": pl.Int64(), "item": pl.Int64(), "share": pl.Float64(), "span": pl.String()}
)
"""The best item of a text that shares an n-gram with any. share: of the item's distinct n-grams;
span: the longest run of the text's words of which the item has every n-gram."""


@dataclass(frozen=True, eq=False)
class Words:
    """The words of texts, one after the other.

    hashes: [m]; ends: [m], where the word's text ends; texts: [m], the number of its text.
    """

    series: pl.Series
    hashes: Hashes
    ends: Ints
    texts: Ints


def words_of(texts: Sequence[str]) -> Words:
    """The words of each text."""
    folded = pl.col("text").str.normalize("NFKC").str.to_lowercase().str.extract_all(_WORD)
    lists = pl.DataFrame({"text": list(texts)}, {"text": pl.String()}).select(folded)["text"]
    counts = lists.list.len().to_numpy().astype(np.int64)
    series = lists.filter(lists.list.len() > 0).explode()
    hashes = series.hash(seed=0).to_numpy() if series.len() else np.zeros(0, np.uint64)
    ends = np.repeat(np.cumsum(counts), counts)
    return Words(series, hashes, ends, np.repeat(np.arange(len(counts)), counts))


def _grams(words: Words, n: int) -> tuple[Ints, Hashes]:
    """Where each n-gram that lies in one text begins, and its hash."""
    size = len(words.hashes) - n + 1
    if size <= 0:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    hashes = np.zeros(size, np.uint64)
    for place in range(n):
        hashes *= _PRIME
        hashes += words.hashes[place : place + size]
    starts = np.flatnonzero(np.arange(n, size + n) <= words.ends[:size])
    return starts, hashes[starts]


@dataclass(frozen=True, eq=False)
class _Table:
    """The distinct n-grams of the items of one n.

    known: sorted hashes; seen: a filter over their first bits; items[first[g]:first[g + 1]]: the
    items that hold n-gram g.
    """

    n: int
    known: Hashes
    seen: Bools
    first: Ints
    items: Ints

    def places(self, hashes: Hashes) -> tuple[Ints, Ints]:
        """Which of the hashes are known (numbers), and which n-gram each of these is."""
        maybe = np.flatnonzero(self.seen[(hashes >> np.uint64(64 - _BITS)).astype(np.int64)])
        at = np.searchsorted(self.known, hashes[maybe]).clip(max=len(self.known) - 1)
        true = self.known[at] == hashes[maybe]
        return maybe[true], at[true]


class Index:
    """The n-grams of items, made once for all texts.

    An item of fewer than n words is one n-gram as long as itself, but one of fewer than `shortest`
    words is not looked for: too many texts say the same by chance.
    """

    def __init__(self, items: Sequence[str], n: int, shortest: int) -> None:
        words = words_of(items)
        lengths = np.bincount(words.texts, minlength=len(items))
        lengths_used = np.where(lengths < min(shortest, n), 0, np.minimum(lengths, n))
        self.sizes = np.zeros(len(items), np.int64)
        self.tables: list[_Table] = []
        self.lengths = lengths_used
        for one in np.unique(lengths_used[lengths_used > 0]).tolist():
            starts, hashes = _grams(words, one)
            owner = words.texts[starts]
            mine = lengths_used[owner] == one
            pairs = pl.DataFrame({"gram": hashes[mine], "item": owner[mine]}).unique()
            pairs = pairs.sort("gram", "item")
            held = pairs["item"].to_numpy()
            known, first = np.unique(pairs["gram"].to_numpy(), return_index=True)
            self.sizes += np.bincount(held, minlength=len(items))
            seen = np.zeros(1 << _BITS, np.bool_)
            seen[(known >> np.uint64(64 - _BITS)).astype(np.int64)] = True
            bounds = np.append(first, len(held)).astype(np.int64)
            self.tables.append(_Table(one, known, seen, bounds, held))

    def match(self, texts: Sequence[str]) -> pl.DataFrame:
        """MATCHES, by text."""
        found = [pl.DataFrame(schema=MATCHES)]
        for start, some in _runs(texts):
            found.append(self._matched(some).with_columns(pl.col("text") + start))
        return pl.concat(found)

    def _matched(self, texts: Sequence[str]) -> pl.DataFrame:
        words = words_of(texts)
        hits = [np.zeros((0, 3), np.int64)]
        for table in self.tables:
            starts, hashes = _grams(words, table.n)
            which, grams = table.places(hashes)
            many = np.diff(table.first)[grams]
            # Every item that holds the n-gram, for each place where it stands.
            offset = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
            items = table.items[np.repeat(table.first[grams], many) + offset]
            begins = np.repeat(starts[which], many)
            unique = np.repeat(hashes[which].view(np.int64), many)
            hits.append(np.stack([begins, items, unique], axis=1))
        begins, items, grams = np.concatenate(hits).T
        frame = pl.DataFrame(
            {"text": words.texts[begins], "item": items, "begin": begins, "gram": grams}
        )
        best = self._best(frame)
        return _with_spans(frame.join(best, on=["text", "item"]), best, words, self.lengths)

    def _best(self, frame: pl.DataFrame) -> pl.DataFrame:
        """`text`, `item` and `share` of the item that a text holds most of; ties: the first."""
        counts = frame.group_by("text", "item").agg(count=pl.col("gram").n_unique())
        sizes = self.sizes[counts["item"].to_numpy()]
        return (
            counts.with_columns(share=pl.col("count") / pl.Series(sizes, dtype=pl.Int64()))
            .sort("text", "share", "count", "item", descending=[False, True, True, False])
            .unique("text", keep="first", maintain_order=True)
            .select("text", "item", "share")
        )


def _with_spans(
    frame: pl.DataFrame, best: pl.DataFrame, words: Words, lengths: Ints
) -> pl.DataFrame:
    """The best items with the longest run of shared n-grams as words, the first of equals."""
    runs = (
        frame.select("text", "item", "begin")
        .unique()
        .sort("text", "begin")
        .with_columns(run=pl.col("begin") - pl.int_range(pl.len()).over("text"))
        .group_by("text", "item", "run")
        .agg(begin=pl.col("begin").min(), grams=pl.len())
        .sort("text", "grams", "begin", descending=[False, True, False])
        .unique("text", keep="first", maintain_order=True)
    )
    sizes = runs["grams"].to_numpy() + lengths[runs["item"].to_numpy()] - 1
    spans = [
        " ".join(words.series[begin : begin + size])
        for begin, size in zip(runs["begin"].to_list(), sizes.tolist(), strict=True)
    ]
    told = runs.select("text", span=pl.Series(spans, dtype=pl.String()))
    return best.join(told, on="text", maintain_order="left").select(MATCHES.names()).cast(MATCHES)  # type: ignore[arg-type]


def _runs(texts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    """Texts some at a time, with the number of the first, so that memory stays flat."""
    start, size = 0, 0
    for place, text in enumerate(texts):
        if place > start and (place - start == _TEXTS or size + len(text) > _CHARACTERS):
            yield start, texts[start:place]
            start, size = place, 0
        size += len(text)
    if len(texts) > start:
        yield start, texts[start:]
