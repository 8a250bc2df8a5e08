"""The report's numbers against counts made another way, and its texts against hostile rows."""

import html.parser
import itertools
import json
import math
import random
import statistics

import numpy as np
import polars as pl
import pytest
import yaml
from markdown_it import MarkdownIt

from datakit.recipe import Bound
from datakit.records import (
    KINDS,
    Candidates,
    Conversation,
    Edit,
    Failure,
    Generation,
    Judged,
    Label,
    Message,
    Pair,
    Prompt,
    Response,
    Verdict,
)
from datakit.report.card import code, inert, render_card
from datakit.report.figures import bin_edges, judge_figures, summary, verdict_lines, wilson
from datakit.report.numbers import gate, lookup, report_numbers
from datakit.report.page import duels, percent, render_page, short_number
from datakit.report.samples import samples
from datakit.report.tally import Tally
from datakit.tables import to_frame
from datakit.verdicts import first_share, flip_share, mean_scores
from datakit.versions import Manifest, ModelCard, Parent, PublishedFile, StepCount

HOSTILE = (
    "</style><script>alert(1)</script><iframe src=//x.y></iframe>"
    '<img src=x onerror="alert(1)"> " onclick=alert(1) x="'
    "\x1b[31mred\u202egnp.exe\u2066 | `code` ```\n---\n# head\nlicense: mit\n"
    "{{ 7 * 7 }} {% raw %} [a](javascript:alert(1)) ![i](https://x.y/z.png) www.x.y *b* _c_ $d$ @e"
)


def user(text):
    return (Message(role="user", content=text),)


def assistant(text):
    return (Message(role="assistant", content=text),)


def made_judged(n=30, seed=5):
    """Rows of two models, each pair judged in both orders, by a judge that leans to the first."""
    rng = random.Random(seed)
    rows = []
    for place in range(n):
        responses = tuple(
            Response(text=word * rng.randrange(1, 12), model=model)
            for word, model in (("ab ", "big"), ("cd ", "small"))
        )
        verdicts = []
        for shown in ((0, 1), (1, 0)):
            first = rng.choices((1.0, 0.0, 0.5), (5, 3, 2))[0]
            verdicts.append(
                Verdict(
                    judge=rng.choice(("j1", "j2")) if place % 7 == 0 else "j1",
                    template="t@1",
                    form="pairwise",
                    shown=shown,
                    scores=(first, 1 - first),
                    reason=f"because {place}",
                )
            )
        prompt = Prompt(
            messages=user(f"prompt {place // 2}"),
            source="a.jsonl" if place % 3 else "b.jsonl",
            license="MIT" if place % 3 else "",
            labels={"category": f"c{place % 4}", "language": "en"},
        ).identified(str(place))
        row = Judged(
            prompt=prompt.messages,
            responses=responses,
            verdicts=tuple(verdicts),
            split="test" if place % 10 == 0 else "train",
        )
        rows.append(row.derived([prompt], "judge", 0))
    return rows


def made_pairs(judged):
    pairs = []
    for row in judged:
        one, other = mean_scores(row.verdicts, 2)
        if one == other:
            continue
        sides = row.responses if one > other else row.responses[::-1]
        made = [Generation(model=side.model) for side in sides]
        pair = Pair(
            prompt=row.prompt,
            chosen=assistant(sides[0].text),
            rejected=assistant(sides[1].text),
            chosen_from=made[0],
            rejected_from=made[1],
            measures={"pair.margin": abs(one - other), "pair.score.chosen": max(one, other)},
            signed=("pair.margin",),
        )
        pairs.append(pair.derived([row], "pair", 0))
    return pairs


def step(alias, rows_in, kept, unanswered=0, failed=0, **reasons):
    return StepCount(
        alias=alias,
        step=f"annotation.{alias}",
        kind="Prompt",
        rows_in=rows_in,
        kept=kept,
        dropped=sum(reasons.values()),
        reasons=reasons,
        failed=failed,
        unanswered=unanswered,
    )


def numbers_of(kind, rows, judged=None, funnel=(), part=7):
    """The report of a table that comes in parts."""

    def find(table):
        return lambda ids: table.filter(pl.col("id").is_in(ids))

    tally = Tally(kind)
    for frame in rows.iter_slices(part):
        tally.add(frame)
    for frame in () if judged is None else judged.iter_slices(part):
        tally.add_judged(frame)
    shown = samples(tally, find(rows), None if judged is None else find(judged))
    return report_numbers(tally, shown, funnel)


def report_of(pairs, judged, funnel=()):
    return numbers_of(Pair, to_frame(Pair, pairs), to_frame(Judged, judged), funnel)


def manifest_of(report, **changes):
    base = {
        "name": "set",
        "version": "1.2.0",
        "digest": "d1",
        "parent": Parent(version="1.1.0", digest="d0"),
        "change": "rows: 3 added",
        "created": "2026-01-02T03:04:05+00:00",
        "datakit": "0.1.0",
        "description": "Pairs.",
        "licenses": report["licenses"],
        "recipe": {"name": "set", "gate": {"rows": {"min": 1, "max": None}}},
        "recipe_digest": "r1",
        "run_digest": "r2",
        "limit": None,
        "models": {"judge": ModelCard(identity="j1", kind="openai", sampling={"top_p": 0.9})},
        "funnel": (),
        "configs": {"default": report["kind"]},
        "splits": report["splits"],
        "gate": gate(report, {"rows": Bound(min=1)}),
        "files": tuple(
            PublishedFile(
                path=f"default/{split}-00000-of-00001.parquet",
                config="default",
                split=split,
                rows=rows,
                bytes=10,
                sha256="ab",
            )
            for split, rows in report["splits"].items()
        ),
        "environment": {"python": "3.11"},
    }
    return Manifest(**(base | changes))


class Tags(html.parser.HTMLParser):
    """All tags and attributes of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def front_matter(card):
    assert card.startswith("---\n")
    return yaml.safe_load(card[4:].split("\n---\n", 1)[0])


@pytest.fixture(scope="module")
def judged():
    return made_judged()


@pytest.fixture(scope="module")
def pairs(judged):
    return made_pairs(judged)


@pytest.fixture(scope="module")
def report(pairs, judged):
    funnel = (
        step("respond", 40, 36, 3, 4, too_few_answers=4),
        step("judge", 36, 30, 1, 2, too_few_verdicts=2, one_text=4),
        step("pair", 30, len(pairs), tie=30 - len(pairs)),
    )
    return report_of(pairs, judged, funnel)


def test_counts(report, pairs):
    assert report["rows"] == len(pairs)
    assert report["prompts"] == len({pair.prompt for pair in pairs})
    assert report["splits"]["test"] == sum(pair.split == "test" for pair in pairs)
    assert report["licenses"]["MIT"] == sum(pair.license == "MIT" for pair in pairs)
    assert report["licenses"]["not stated"] == sum(pair.license == "" for pair in pairs)
    assert sum(one["rows"] for one in report["sources"]) == len(pairs)
    for name, n in report["categories"]["category"]["values"].items():
        assert n == sum(pair.labels["category"] == name for pair in pairs)
    for one in report["models"]:
        sides = one["chosen"], one["rejected"]
        told = [(pair.chosen_from.model, pair.rejected_from.model) for pair in pairs]
        assert one["pairs"] == told.count(sides)


def test_dropped_and_failures_count_each_row_once(report, pairs):
    assert list(report["funnel"]) == ["respond", "judge", "pair"]
    assert report["dropped"]["rows"] == 4 + 6 + 30 - len(pairs)
    assert report["dropped"]["share"] == report["dropped"]["rows"] / 40
    assert [step["failed"] for step in report["funnel"].values()] == [4, 2, 0]
    assert report["failures"] == {"rows": 6, "share": 6 / 40, "kept_with_failures": 0}


def test_two_steps_of_one_alias_are_both_there(pairs, judged):
    report = report_of(
        pairs, judged, (step("splits", 9, 9), step("splits", 9, 8, bridges_splits=1))
    )
    assert [one["kept"] for one in report["funnel"].values()] == [9, 8]


def test_lengths(report, pairs):
    chosen = [len(pair.chosen[0].content) for pair in pairs]
    rejected = [len(pair.rejected[0].content) for pair in pairs]
    for name, lengths in (("chosen", chosen), ("rejected", rejected)):
        figures = report["lengths"][name]
        assert figures["mean"] == pytest.approx(statistics.fmean(lengths))
        assert figures["p50"] == statistics.median(lengths)
        assert figures["max"] == max(lengths)
        assert sum(figures["histogram"]["counts"]) == len(lengths)
        words = [len(text.split()) for text in ("ab " * (n // 3) for n in lengths)]
        assert report["lengths"]["words"][name]["mean"] == pytest.approx(statistics.fmean(words))
    longer = report["lengths"]["chosen_longer"]
    equal = sum(a == b for a, b in zip(chosen, rejected, strict=True))
    assert longer["equal"] == equal > 0
    assert longer["n"] == len(pairs) - equal
    assert longer["share"] * longer["n"] == pytest.approx(
        sum(a > b for a, b in zip(chosen, rejected, strict=True))
    )


def test_histogram_counts_are_those_of_the_texts(report, pairs):
    histogram = report["lengths"]["chosen"]["histogram"]
    edges, lengths = histogram["edges"], [len(pair.chosen[0].content) for pair in pairs]
    for place, (low, high) in enumerate(itertools.pairwise(edges)):
        last = place == len(edges) - 2
        inside = sum(low <= n < high or (last and n == high) for n in lengths)
        assert histogram["counts"][place] == inside


def test_judge_figures_are_those_of_the_raw_verdicts(report, judged):
    verdicts = [verdict for row in judged for verdict in row.verdicts]
    found = report["judge"]
    assert found["verdicts"] == len(verdicts)
    assert found["judges"]["j1"] == sum(verdict.judge == "j1" for verdict in verdicts)
    assert found["first_share"]["share"] == pytest.approx(first_share(verdicts))
    ties = sum(verdict.scores[0] == 0.5 for verdict in verdicts)
    assert found["tie_share"]["share"] == pytest.approx(ties / len(verdicts))
    rows = [share for row in judged if (share := flip_share(row.verdicts)) is not None]
    assert found["flip_share"]["n"] == len(rows)
    assert found["flip_share"]["share"] == pytest.approx(statistics.fmean(rows))
    assert 0 < found["flip_share"]["share"] < 1


def test_flips_over_three_responses_equal_the_estimator():
    rng = random.Random(11)
    rows, flips = [], 0
    for place in range(20):
        verdicts = []
        for shown in itertools.permutations(range(3), 2):
            first = rng.choice((1.0, 0.5, 0.0))
            verdicts.append(
                Verdict(
                    judge="j", template="t", form="pairwise", shown=shown, scores=(first, 1 - first)
                )
            )
        responses = tuple(Response(text=f"{place} {i}") for i in range(3))
        rows.append(Judged(prompt=user("p"), responses=responses, verdicts=tuple(verdicts)))
        flips += round(3 * flip_share(verdicts))
    found = judge_figures(verdict_lines(to_frame(Judged, rows), 0))["flip_share"]
    assert found["n"] == 60
    assert found["share"] * 60 == pytest.approx(flips)


def test_ratings_are_verdicts_but_neither_ties_nor_flips():
    rating = Verdict(judge="j", template="t", form="rating", shown=(0,), scores=(7.0,))
    row = Judged(prompt=user("p"), responses=(Response(text="a"),), verdicts=(rating,))
    found = judge_figures(verdict_lines(to_frame(Judged, [row]), 0))
    assert (found["verdicts"], found["forms"]) == (1, {"rating": 1})
    assert found["tie_share"]["n"] == found["first_share"]["n"] == found["flip_share"]["n"] == 0


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (5, 5), (1, 2), (52, 60), (500, 1000)])
def test_wilson_ends_where_the_score_test_says_so(hits, n):
    found = wilson(hits, n)
    share = hits / n
    assert 0 <= found["low"] <= share <= found["high"] <= 1
    for end in (found["low"], found["high"]):
        if 0 < end < 1:
            z = abs(share - end) / math.sqrt(end * (1 - end) / n)
            assert z == pytest.approx(1.959964, rel=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        [3.0],
        [2.0, 2.0, 2.0],
        [0.3, 0.1, 0.2, 0.7],
        [-1.0, -0.5, 0.0, 0.5, 1.0],
        [1.0] * 99 + [1e6],
        [*range(1000), 10**6],
        [-1.7e308, 1.7e308, 1e308],
        [1.0, 1.0 + 2**-52],
        [1e-300, 5e-300],
        [5e-324, 0.0],
        [123456789.123, 123456789.124],
    ],
)
def test_every_value_has_its_bin(values):
    figures = summary(np.array(values, dtype=np.float64))
    edges = figures["histogram"]["edges"]
    assert sum(figures["histogram"]["counts"]) == len(values)
    assert edges == sorted(edges)
    assert len(edges) <= 30
    assert all(math.isfinite(figures[name]) for name in ("mean", "p10", "p50", "p90", "max"))
    json.dumps(figures, allow_nan=False)


def test_one_long_answer_does_not_flatten_the_histogram():
    edges = bin_edges(np.array([*range(100, 1100), 1_000_000], dtype=np.float64))
    assert edges[-1] == 1_000_000
    assert len(edges) > 15


def test_samples_are_spread_over_the_margin_and_carry_their_verdicts(report, pairs, judged):
    shown = report["samples"]
    assert len(shown) == min(20, len(pairs))
    assert {one["margin"] for one in shown} == {pair.measures["pair.margin"] for pair in pairs}
    assert [one["margin"] for one in shown] == sorted(one["margin"] for one in shown)
    by_id = {pair.id: pair for pair in pairs}
    rated = {row.id: row for row in judged}
    for one in shown:
        pair = by_id[one["id"]]
        assert one["chosen"][0]["content"] == pair.chosen[0].content
        raw = rated[pair.parents[0]].verdicts
        assert [said["reason"]["content"] for said in one["verdicts"]] == [v.reason for v in raw]
        for said, verdict in zip(one["verdicts"], raw, strict=True):
            first = rated[pair.parents[0]].responses[verdict.shown[0]]
            assert said["order"].startswith(
                "chosen" if first.model == pair.chosen_from.model else "rejected"
            )
            if verdict.scores[0] == 0.5:
                assert said["prefers"] == "tie"
            else:
                assert said["prefers"] == said["shown"][0 if verdict.scores[0] else 1]


def test_long_texts_are_cut_with_a_note(judged):
    text = "語" * 1_000_000
    pair = Pair(prompt=user("שלום?"), chosen=assistant(text), rejected=assistant("नहीं"))
    report = report_of([pair.identified("0")], [])
    turn = report["samples"][0]["chosen"][0]
    assert (len(turn["content"]), turn["more"]) == (4000, 996_000)
    assert report["lengths"]["chosen"]["max"] == 1_000_000
    assert report["lengths"]["rejected"]["max"] == len("नहीं")
    page = render_page(manifest_of(report), report)
    assert len(page) < 100_000
    assert "996,000 more characters" in page
    assert "שלום?" in page


def test_many_turns_are_cut_with_a_note():
    turns = [Message(role=("user", "assistant")[i % 2], content=f"t{i}") for i in range(31)]
    pair = Pair(prompt=tuple(turns), chosen=assistant("a"), rejected=assistant("b"))
    prompt = report_of([pair.identified("0")], [])["samples"][0]["prompt"]
    assert prompt[0] == {"role": "note", "content": "19 earlier turns are not shown", "more": 0}
    assert [turn["content"] for turn in prompt[1:]] == [f"t{i}" for i in range(19, 31)]


def rows_of(kind):
    """One row of each kind."""
    prompt = user("p?")
    made = {
        Prompt: lambda: Prompt(messages=prompt),
        Conversation: lambda: Conversation(messages=prompt),
        Edit: lambda: Edit(draft="a", edited="ab"),
        Candidates: lambda: Candidates(prompt=prompt, responses=(Response(text="a", model="m"),)),
        Judged: lambda: Judged(prompt=prompt, responses=(Response(text="a"), Response(text="b"))),
        Pair: lambda: Pair(prompt=prompt, chosen=assistant("a"), rejected=assistant("b")),
        Label: lambda: Label(prompt=prompt, completion=assistant("a"), desirable=True),
    }
    return [made[kind]().identified("0")]


@pytest.mark.parametrize("kind", KINDS.values())
@pytest.mark.parametrize("empty", [True, False])
def test_every_kind_renders_with_one_row_and_with_none(kind, empty):
    rows = [] if empty else rows_of(kind)
    report = numbers_of(kind, to_frame(kind, rows))
    assert report["rows"] == report["prompts"] == len(rows)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    manifest = manifest_of(report, parent=None, limit=5, gate={}, models={})
    assert "trial run" in render_page(manifest, report)
    assert front_matter(render_card(manifest, report))["license"] == "other"


def test_kept_failures_are_counted(pairs, judged):
    failed = Failure(slot="verdict", kind="Unparsable", reason="not_json")
    some = [pairs[0].model_copy(update={"failures": (failed,)}), *pairs[1:]]
    assert report_of(some, judged)["failures"]["kept_with_failures"] == 1


def test_a_measure_of_some_rows_counts_those(pairs, judged):
    some = [pairs[0].model_copy(update={"measures": {"x.y": 2.0}}), *pairs[1:]]
    report = report_of(some, judged)
    assert report["measures"]["x.y"]["n"] == 1
    assert report["measures"]["pair.margin"]["n"] == len(pairs) - 1
    assert len(report["samples"]) == min(20, len(pairs))


def test_same_rows_same_bytes(report, pairs, judged):
    funnel = [StepCount(alias=a, **s) for a, s in report["funnel"].items()]
    again = report_of(pairs, judged, funnel)
    assert json.dumps(again) == json.dumps(report)
    stored = json.loads(json.dumps(report, sort_keys=False))
    manifest = manifest_of(report)
    assert render_page(manifest, stored) == render_page(manifest, report)
    assert render_card(manifest, stored) == render_card(manifest, report)


def test_order_of_rows_does_not_matter_to_samples(report, pairs, judged):
    turned = report_of(pairs[::-1], judged[::-1])
    assert turned["samples"] == report["samples"]


def hostile_report():
    response = Response(text=HOSTILE, model=HOSTILE)
    other = Response(text=HOSTILE + "!", model="b|c`d")
    said = Verdict(
        judge=HOSTILE,
        template=HOSTILE,
        form="pairwise",
        shown=(0, 1),
        scores=(1, 0),
        reason=HOSTILE,
    )
    judged = Judged(prompt=user(HOSTILE), responses=(response, other), verdicts=(said,)).identified(
        "0"
    )
    pair = Pair(
        prompt=judged.prompt,
        chosen=assistant(response.text),
        rejected=assistant(other.text),
        chosen_from=Generation(model=response.model),
        rejected_from=Generation(model=other.model),
        rationale=HOSTILE,
        source=HOSTILE,
        license=HOSTILE,
        split="train",
        labels={HOSTILE: HOSTILE, "language": HOSTILE},
        measures={f"{HOSTILE}.margin": 1.0, f"{HOSTILE}.z": 1.0},
    ).derived([judged], "pair", 0)
    return report_of([pair], [judged], (step(HOSTILE, 2, 1, **{HOSTILE: 1}),))


def hostile_manifest(report):
    return manifest_of(
        report,
        name=HOSTILE,
        description=HOSTILE,
        change=HOSTILE,
        digest=HOSTILE,
        recipe={"name": HOSTILE, "gate": {HOSTILE: {"min": HOSTILE}}},
        gate={HOSTILE: f"fail: {HOSTILE}"},
        models={HOSTILE: ModelCard(identity=HOSTILE, kind=HOSTILE, sampling={HOSTILE: HOSTILE})},
        configs={HOSTILE: "Pair"},
        splits={HOSTILE: 1},
        files=(
            PublishedFile(path=HOSTILE, config=HOSTILE, split=HOSTILE, rows=1, bytes=1, sha256="a"),
        ),
        environment={HOSTILE: HOSTILE},
    )


def test_hostile_rows_do_nothing_in_the_page():
    report = hostile_report()
    page = render_page(hostile_manifest(report), report)
    seen = Tags(page)
    harmless = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "nav",
        "main",
        "section",
    }
    harmless |= {
        "article",
        "footer",
        "h1",
        "h2",
        "h3",
        "h4",
        "p",
        "a",
        "span",
        "code",
        "pre",
        "b",
        "i",
    }
    harmless |= {
        "em",
        "small",
        "div",
        "dl",
        "dt",
        "dd",
        "ul",
        "li",
        "figure",
        "figcaption",
        "details",
    }
    harmless |= {"summary", "table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert set(seen.tags) <= harmless
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert {name for name, _ in seen.attributes} <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "href", "id", "style", "title",
        "role", "dir", "scope", "colspan", "aria-label", "aria-hidden", "data-label",
    }  # fmt: skip
    assert all(value.startswith("#") for name, value in seen.attributes if name == "href")
    for bad in "\x1b\u202e\u2066":
        assert bad not in page
    assert "\\x1b[31mred\\x202egnp.exe" in "".join(seen.texts)
    assert "{{ 7 * 7 }}" in "".join(seen.texts)
    policy = [value for name, value in seen.attributes if name == "content"]
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in policy


def test_hostile_rows_do_nothing_in_the_card():
    report = hostile_report()
    card = render_card(hostile_manifest(report), report)
    front = front_matter(card)
    assert front["license"] == "other"
    assert "language" not in front
    assert front["configs"][0]["data_files"] == [{"split": HOSTILE, "path": [HOSTILE]}]
    body = card.split("\n---\n", 1)[1].replace("<br>", "")
    for bad in ("<", "](", "https://", "www.", "\x1b", "\u202e", "`code`"):
        assert bad not in body
    seen = list(tokens(MarkdownIt("commonmark").enable("table").parse(body)))
    # What the card itself writes; no link, image, raw HTML, emphasis or rule came from a row.
    assert {token.type.removesuffix("_open").removesuffix("_close") for token in seen} <= {
        "inline", "text", "paragraph", "heading", "fence", "code_inline", "strong", "bullet_list",
        "list_item", "table", "thead", "tbody", "tr", "th", "td",
    }  # fmt: skip
    assert not [token for token in seen if token.type == "fence"]
    titles = [after.content for token, after in itertools.pairwise(seen) if token.tag == "h2"]
    assert "Sources and licences" in titles
    tables = [line for line in body.splitlines() if line.startswith("|")]
    widths = [line.count("|") for line in tables]
    rules = [place for place, line in enumerate(tables) if line.startswith("| ---")]
    for start, end in zip(rules, [*rules[1:], len(tables) + 1], strict=True):
        assert len(set(widths[start - 1 : end - 1])) == 1


def tokens(found):
    for token in found:
        yield token
        yield from tokens(token.children or [])


@pytest.mark.parametrize(
    "text",
    ["# a", "- a", "+ a", "1. a", "12) a", "> a", "a|b", "---", "===", "a\n\nb", "&lt;", "~~a~~"],
)
def test_inert_text_cannot_begin_or_hold_markup(text):
    said = inert(text)
    assert "\n" not in said
    assert said[0] not in "#-+>=~"
    assert not said.startswith(("1.", "12)"))
    assert html.unescape(said) == " ".join(text.split())


def test_inert_text_leaves_ordinary_words_alone():
    for text in (
        "temperature 0.7, top 3",
        "It's 50 % (of 12)",
        "Grüße, 你好",
        "at least 0.5: fine",
    ):
        assert inert(text) == text
    assert code("Qwen/Qwen2.5-7B@abc") == "`Qwen/Qwen2.5-7B@abc`"
    assert "`" not in code("a`b")


def test_front_matter_names_files_license_size_and_language(report):
    manifest = manifest_of(report, licenses={"Apache-2.0": 5})
    front = front_matter(render_card(manifest, report))
    assert front["license"] == "apache-2.0"
    assert front["language"] == ["en"]
    assert front["size_categories"] == ["n<1K"]
    assert front["tags"] == ["preference", "dpo", "synthetic", "datakit"]
    (config,) = front["configs"]
    assert config["config_name"] == "default"
    assert config["default"] is True
    assert {one["split"] for one in config["data_files"]} == {"train", "test"}
    for licenses, together in (
        ({"MIT": 5, "Apache-2.0": 5}, "apache-2.0"),
        ({"MIT": 5, "my own": 5}, "other"),
        ({"CC-BY-SA-4.0": 5, "CC-BY-NC-4.0": 5}, "other"),
    ):
        several = manifest_of(report, licenses=licenses)
        assert front_matter(render_card(several, report))["license"] == together


def test_card_and_page_say_the_same(report):
    manifest = manifest_of(report)
    card, page = render_card(manifest, report), render_page(manifest, report)
    for share in ("first_share", "flip_share", "tie_share"):
        said = percent(report["judge"][share]["share"])
        assert said in card
        assert said in page


def test_lookup_takes_the_longest_key_first():
    numbers = {
        "a": {"b": 1, "b.c": {"d": 2}, "b.c.d": 3},
        "a.b": {"c": 4, "x": {"y": 5}},
        "yes": True,
        "text": "7",
        "none": None,
        "": {"": 8},
    }
    assert lookup(numbers, "a.b") is None
    assert lookup(numbers, "a.b.c") == 4
    assert lookup(numbers, "a.b.x.y") == 5
    assert lookup(numbers, "a.b.c.d") == 3
    assert lookup(numbers, ".") == 8
    for path in ("yes", "text", "none", "nothing", "a.b.c.d.e", "a.", "", "..."):
        assert lookup(numbers, path) is None


def test_lookup_finds_measures(report):
    assert lookup(report, "measures.pair.margin.mean") == report["measures"]["pair.margin"]["mean"]
    assert lookup(report, "lengths.chosen_longer.share") is not None


def test_gate_says_what_failed_and_why(report):
    share = report["lengths"]["chosen_longer"]["share"]
    verdicts = gate(
        report,
        {
            "rows": Bound(min=1, max=1000),
            "lengths.chosen_longer.share": Bound(max=share / 2),
            "measures.pair.margin.mean": Bound(min=2),
            "lengths.chosen_longer.shar": Bound(max=1),
            "judge": Bound(min=0),
            "zzz": Bound(min=0),
        },
    )
    assert verdicts["rows"] == "pass"
    assert verdicts["lengths.chosen_longer.share"] == (
        f"fail: lengths.chosen_longer.share is {share:.4g}, above {share / 2:.12g}"
    )
    assert verdicts["measures.pair.margin.mean"].endswith(", below 2")
    assert verdicts["lengths.chosen_longer.shar"] == (
        "fail: the report has no number at 'lengths.chosen_longer.shar'; "
        "did you mean 'lengths.chosen_longer.share'?"
    )
    assert verdicts["judge"].startswith("fail: the report has no number at 'judge'")
    assert len(verdicts["zzz"]) < 400


def test_gate_bounds_are_included_and_close_values_told_apart():
    assert gate({"x": 0.65}, {"x": Bound(min=0.65, max=0.65)}) == {"x": "pass"}
    assert gate({"x": 0.650001}, {"x": Bound(max=0.65)}) == {"x": "fail: x is 0.650001, above 0.65"}
    assert gate({"x": 123456}, {"x": Bound(max=123455)}) == {"x": "fail: x is 123456, above 123455"}


def test_gate_fails_where_nothing_could_be_counted():
    report = report_of([], [])
    verdicts = gate(report, {"lengths.chosen_longer.share": Bound(max=0.6), "rows": Bound(min=1)})
    assert "nothing to count" in verdicts["lengths.chosen_longer.share"]
    assert verdicts["rows"] == "fail: rows is 0, below 1"


def test_shares_and_numbers_are_not_rounded_to_what_they_are_not():
    assert [percent(share) for share in (0, 1, 0.5, 0.0001, 0.99999, None)] == [
        "0 %", "100 %", "50.0 %", "< 0.1 %", "> 99.9 %", "–",
    ]  # fmt: skip
    assert [short_number(n) for n in (0, 0.123456, 12.0, 1234.5, None)] == [
        "0", "0.123", "12", "1,234", "–",
    ]  # fmt: skip


def test_duels_join_both_directions():
    models = [
        {"chosen": "a", "rejected": "b", "pairs": 3},
        {"chosen": "b", "rejected": "a", "pairs": 5},
        {"chosen": "c", "rejected": "c", "pairs": 2},
        {"chosen": "a", "rejected": "c", "pairs": 1},
        {"chosen": "x", "rejected": "y", "pairs": 1},
        {"chosen": "y", "rejected": "x", "pairs": 1},
    ]
    found = [(one["one"], one["other"], one["won"], one["lost"]) for one in duels(models)]
    assert found[0] == ("b", "a", 5, 3)
    assert ("c", "c", 2, None) in found
    assert ("a", "c", 1, 0) in found
    assert len(found) == 4


def test_the_report_needs_no_more_than_the_schema():
    frame = pl.concat([to_frame(Pair, rows_of(Pair)), pl.DataFrame(schema=Pair.table_schema())])
    assert numbers_of(Pair, frame)["judge"]["verdicts"] == 0
