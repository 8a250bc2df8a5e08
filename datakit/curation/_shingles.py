"""Word n-grams as hashes, MinHash bands over them, candidate pairs, and their exact Jaccard.

Source: MinHash with banding (Broder 1997; Leskovec, Rajaraman and Ullman, chapter 3). A word is a
run of letters, digits and marks, one character of a script that is written without spaces, or one
symbol, so that `3 + 4` and `3 - 4` differ; case and width fold. All hashes are our own arithmetic
over the UTF-8 bytes, because they are stored: they must not change with a library.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datakit.text import digest

Hashes = NDArray[np.uint64]
Ints = NDArray[np.int64]

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = rf"[\w--[{_UNSPACED}]]+|[{_UNSPACED}\p{{S}}*/%&#@\\-]"

GRAM_BITS = 48
"""Of an n-gram's hash: beside it a row or pair number of 16 bits fits into one word."""

_GRAM = np.uint64((1 << GRAM_BITS) - 1)
_BLOCK_ROWS = 1 << (64 - GRAM_BITS)
_BLOCK = 1 << 16
"""Words, or n-grams of pairs, that are worked on at a time, near the processor."""

_WAITING = 1 << 22
_CELLS = 1 << 19
_ALL_PAIRS = 32
"""Rows of a bucket up to which all its pairs are candidates; a larger one stays linear."""
_WINDOW = 2

_SYMBOLS = b"$+<=>^`|~*/%&#@\\-"
_KINDS = np.zeros(256, np.uint8)
_KINDS[128:] = 1
_KINDS[list(b"0123456789_abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")] = 1
_KINDS[list(_SYMBOLS)] = 2
_LOWER = np.frombuffer(bytes(range(256)).lower(), np.uint8)

_PRIME = np.uint64(0xFF51AFD7ED558CCD)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
_LOW_BYTES = np.array([(1 << (8 * size)) - 1 for size in range(9)], np.uint64)


def sketch(texts: pl.Series, ngram: int, permutations: int, bands: int) -> pl.DataFrame:
    """What is compared of each text, in their order.

    `grams`: the hashes of its distinct word n-grams, sorted; a text of fewer words has one, of all
    its words, and a text without words one of its characters. `whole`: one hash of that set.
    `bands`: uint32 [bands], each of permutations / bands minimal hashes.
    """
    values: list[Hashes] = []
    sizes: list[Ints] = []
    wholes: list[Hashes] = []
    found: list[NDArray[np.uint32]] = []
    factors = _factors(permutations)
    for hashes, counts in _word_blocks(texts):
        grams, size = _distinct(*_ngrams(hashes, counts, ngram), len(counts))
        starts = np.cumsum(size) - size
        values.append(grams)
        sizes.append(size)
        wholes.append(np.add.reduceat(_mixed(grams), starts))
        found.append(_bands(grams.astype(np.uint32), starts, factors, bands))
    none = np.zeros((0, bands), np.uint32)
    return pl.DataFrame(
        {
            "grams": _lists(
                np.concatenate([np.zeros(0, np.uint64), *values]),
                np.concatenate([np.zeros(0, np.int64), *sizes]),
            ),
            "whole": pl.Series(np.concatenate([np.zeros(0, np.uint64), *wholes]), dtype=pl.UInt64),
            "bands": pl.Series(np.concatenate([none, *found]), dtype=pl.Array(pl.UInt32, bands)),
        }
    )


def _mixed(hashes: Hashes) -> Hashes:
    """Hashes whose every bit depends on every bit of the given ones."""
    hashes = (hashes ^ (hashes >> _HALF)) * _PRIME
    hashes = (hashes ^ (hashes >> np.uint64(29))) * _GOLDEN
    return hashes ^ (hashes >> _HALF)


def _factors(permutations: int) -> NDArray[np.uint32]:
    """Odd factors [permutations], each of which permutes the 32-bit numbers."""
    numbers = _mixed(np.arange(1, permutations + 1, dtype=np.uint64) * _GOLDEN)
    return (numbers >> _HALF).astype(np.uint32) | np.uint32(1)


# -- words and n-grams ---------------------------------------------------------------------------


def _word_blocks(texts: pl.Series) -> Iterator[tuple[Hashes, Ints]]:
    """Hashes of the words of some thousand texts, and how many each has (one at least)."""
    start = 0
    for stop in _block_ends(texts.str.len_bytes().to_numpy().astype(np.int64) // 6 + 1):
        some = texts[start:stop]
        hashes, counts = _words(_spaced(some))
        none = np.flatnonzero(counts == 0)
        if len(none):
            marks = [int(digest(text.strip(), 8), 16) for text in some.gather(none)]
            before = (np.cumsum(counts) - counts)[none]
            hashes = np.insert(hashes, before, np.array(marks, np.uint64))
            counts[none] = 1
        yield hashes, counts
        start = stop


def _block_ends(sizes: Ints) -> Iterator[int]:
    """Ends of runs of neighbouring rows that hold about _BLOCK together, or of one longer row."""
    ends = np.cumsum(sizes)
    start, before = 0, 0
    while start < len(sizes):
        stop = int(np.searchsorted(ends, before + _BLOCK, side="right"))
        stop = max(start + 1, min(stop, start + _BLOCK_ROWS))
        yield stop
        start, before = stop, int(ends[stop - 1])


def _spaced(texts: pl.Series) -> pl.Series:
    """Texts beyond ASCII folded, with a space between any two words; the others as they are."""
    wide = texts.str.len_bytes() != texts.str.len_chars()
    if not wide.any():
        return texts
    places = wide.arg_true()
    folded = texts.gather(places).str.normalize("NFKC").str.to_lowercase()
    return texts.scatter(places, folded.str.extract_all(_WORD).list.join(" "))


def _words(texts: pl.Series) -> tuple[Hashes, Ints]:
    """Hashes of all words, and how many each text has; bytes beyond ASCII belong to words."""
    sizes = texts.str.len_bytes().to_numpy().astype(np.int64) + 1
    raw = np.frombuffer((texts.str.join("\n").item() + "\n").encode(), np.uint8)
    padded = np.zeros((len(raw) // 8 + 2) * 8, np.uint8)
    padded[: len(raw)] = _LOWER[raw]
    kinds = _KINDS[raw]
    inside = kinds == 1
    begins = inside.copy()
    begins[1:] &= ~inside[:-1]
    ends = inside.copy()
    ends[:-1] &= ~inside[1:]
    marks = kinds == 2
    starts = np.flatnonzero(begins | marks)
    hashes = _hashes(padded.view("<u8"), starts, np.flatnonzero(ends | marks) + 1 - starts)
    counts = np.diff(np.searchsorted(starts, np.cumsum(sizes)), prepend=0)
    return hashes, counts


def _hashes(eights: Hashes, starts: Ints, sizes: Ints) -> Hashes:
    """Hashes of runs of bytes, taken eight at a time; `eights` holds the bytes and a zero more."""

    def eight(at: Ints, left: Ints) -> Hashes:
        place, shift = at >> 3, ((at & 7) << 3).astype(np.uint64)
        found = eights[place] >> shift
        # A shift by all 64 bits gives 0 here.
        found |= eights[place + 1] << (np.uint64(64) - shift)
        return found & _LOW_BYTES[np.minimum(left, 8)]

    hashes = (eight(starts, sizes) ^ (sizes.astype(np.uint64) * _GOLDEN)) * _PRIME
    hashes ^= hashes >> _HALF
    longer, done = np.flatnonzero(sizes > 8), 8
    while len(longer):
        more = (hashes[longer] ^ eight(starts[longer] + done, sizes[longer] - done)) * _PRIME
        hashes[longer] = more ^ (more >> _HALF)
        done += 8
        longer = longer[sizes[longer] > done]
    return hashes


def _ngrams(hashes: Hashes, counts: Ints, ngram: int) -> tuple[Hashes, Ints]:
    """Hashes of all n-grams, and the row of each; a row of fewer words has one of them all."""
    starts = np.cumsum(counts) - counts
    rows = np.repeat(np.arange(len(counts)), counts)
    left = np.repeat(starts + counts, counts) - np.arange(len(hashes))
    grams = hashes
    values: list[Hashes] = []
    places: list[Ints] = []
    for size in range(1, ngram + 1):
        if size > 1:
            grams = _mixed(grams[:-1]) + hashes[size - 1 :]
        whole = starts[counts == size] if size < ngram else np.flatnonzero(left >= ngram)
        values.append(grams[whole])
        places.append(whole)
    return _mixed(np.concatenate(values)), rows[np.concatenate(places)]


def _distinct(grams: Hashes, rows: Ints, height: int) -> tuple[Hashes, Ints]:
    """The distinct n-grams of each row, sorted, GRAM_BITS of each; and how many it has."""
    keys = (rows.astype(np.uint64) << np.uint64(GRAM_BITS)) | (grams & _GRAM)
    keys.sort()
    keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if len(keys) else keys
    size = np.bincount((keys >> np.uint64(GRAM_BITS)).astype(np.int64), minlength=height)
    return keys & _GRAM, size


def _bands(
    grams: NDArray[np.uint32], starts: Ints, factors: NDArray[np.uint32], bands: int
) -> NDArray[np.uint32]:
    """[rows, bands]: the minima under permutations / bands permutations each, hashed together."""
    lowest = np.empty((len(factors), len(starts)), np.uint32)
    step = max(1, _CELLS // len(grams))
    for start in range(0, len(factors), step):
        permuted = np.multiply.outer(factors[start : start + step], grams)
        np.minimum.reduceat(permuted, starts, axis=1, out=lowest[start : start + step])
    each = lowest.reshape(bands, -1, len(starts))
    hashes = np.zeros((bands, len(starts)), np.uint64)
    for row in range(each.shape[1]):
        hashes = _mixed(hashes ^ each[:, row])
    return (hashes >> _HALF).astype(np.uint32).T


def _lists(values: Hashes, sizes: Ints) -> pl.Series:
    """One list of values for each size."""
    import pyarrow as pa

    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    made: Any = pa.LargeListArray.from_arrays(offsets, pa.array(values))
    return pl.Series(made, dtype=pl.List(pl.UInt64))


# -- candidates and their similarity -------------------------------------------------------------


def candidates(bands: NDArray[np.uint32], rank: Ints, ours: int) -> tuple[Ints, Ints]:
    """Pairs of rows that share a band, each once, first < second and first < `ours`.

    bands [n, b], rank [n]: 0 for the row most worth keeping. Every pair of a bucket of up to
    _ALL_PAIRS rows; in a larger one each row with the best of the bucket and with its neighbours
    in the order of the next band, so that the number of pairs is linear in rows x bands.
    """
    found = np.zeros(0, np.int64)
    waiting: list[Ints] = []
    size = len(bands)
    if not ours:
        return found, found
    for number in range(bands.shape[1]):
        band, following = bands[:, number], bands[:, (number + 1) % bands.shape[1]]
        order = np.argsort(band, kind="stable")
        shared = band[order]
        edge = np.flatnonzero(np.concatenate([[True], shared[1:] != shared[:-1], [True]]))
        counts = np.diff(edge)
        many = np.repeat(counts, counts)
        few = order[(many > 1) & (many <= _ALL_PAIRS)]
        waiting += _within(few, band[few], _ALL_PAIRS - 1, size)
        large = order[many > _ALL_PAIRS]
        if len(large):
            large = large[np.lexsort((rank[large], band[large]))]
            first = np.flatnonzero(np.concatenate([[True], np.diff(band[large]) != 0]))
            lengths = np.diff(np.append(first, len(large)))
            waiting.append(_keys(np.repeat(large[first], lengths), large, size))
            large = large[np.lexsort((rank[large], following[large], band[large]))]
            waiting += _within(large, band[large], _WINDOW, size)
        if sum(map(len, waiting)) > _WAITING or number == bands.shape[1] - 1:
            fresh = np.concatenate([found, *waiting])
            fresh = fresh[(fresh // size < ours) & (fresh // size != fresh % size)]
            found, waiting = np.unique(fresh), []
    return found // size, found % size


def _within(rows: Ints, band: NDArray[np.uint32], distance: int, size: int) -> list[Ints]:
    """Keys of pairs of rows that stand at most `distance` apart in one bucket."""
    found: list[Ints] = []
    at = np.arange(len(rows))
    for apart in range(1, distance + 1):
        at = at[at + apart < len(rows)]
        at = at[band[at] == band[at + apart]]
        if not len(at):
            break
        found.append(_keys(rows[at], rows[at + apart], size))
    return found


def _keys(one: Ints, other: Ints, size: int) -> Ints:
    """Pairs of rows as one number each, the smaller row first."""
    return np.minimum(one, other) * size + np.maximum(one, other)


def jaccard(grams: Hashes, sizes: Ints, one: Ints, other: Ints) -> NDArray[np.float64]:
    """Share of common n-grams in all n-grams of rows one[i] and other[i], exactly.

    grams: the distinct ones of all rows after each other; sizes [rows]: how many each has.
    """
    starts = np.cumsum(sizes) - sizes
    both = sizes[one] + sizes[other]
    common = np.zeros(len(one), np.int64)
    start = 0
    for stop in _block_ends(both):
        pairs = np.arange(stop - start)
        keys = np.concatenate(
            [
                _numbered(grams, starts[side[start:stop]], sizes[side[start:stop]], pairs)
                for side in (one, other)
            ]
        )
        keys.sort()
        twice = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(GRAM_BITS)
        common[start:stop] = np.bincount(twice.astype(np.int64), minlength=len(pairs))
        start = stop
    return common / np.maximum(both - common, 1)


def _numbered(grams: Hashes, starts: Ints, sizes: Ints, numbers: Ints) -> Hashes:
    """The n-grams of runs, each with the number of its run in the bits above GRAM_BITS."""
    ends = np.cumsum(sizes)
    places = np.arange(ends[-1]) + np.repeat(starts - ends + sizes, sizes)
    return (np.repeat(numbers, sizes).astype(np.uint64) << np.uint64(GRAM_BITS)) | grams[places]
