"""The dataset card: what the Hub shows, and what a reader of the folder finds first.

Whatever a model, a user or a file wrote is inert in it: in table cells and lines every character
that Markdown or HTML could act on is a character reference, and the front matter is made by a
YAML writer.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from datakit.licences import mixed
from datakit.report.columns import column_lines
from datakit.report.numbers import NOT_STATED
from datakit.report.page import (
    count,
    duels,
    gate_lines,
    headline,
    percent,
    short_number,
    unfinished,
)
from datakit.report.words import reason_words
from datakit.text import plain
from datakit.versions import Manifest

_ACTIVE = re.compile(
    r"[\\`*_{}\[\]<>|~&$@#!]|:(?=//)|(?<=www)\.|^[-+=]|(?<=^\d)[.)](?=\s|$)|(?<=^\d\d)[.)](?=\s|$)",
    re.IGNORECASE,
)
_CODE = re.compile(r"[\w ./@:+#=,%-]{1,200}")
_LANGUAGE = re.compile(r"[a-z]{2,3}")
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
_LARGE = ((10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))
_LICENSE = re.compile(
    r"apache-2\.0|mit|bsd-[23]-clause|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-(2\.0|2\.5|3\.0|4\.0)|odc-by|odbl"
    r"|pddl|cdla-(sharing-1\.0|permissive-[12]\.0)|(l?gpl-3|gpl-2|agpl-3|mpl-2)\.0|unlicense"
    r"|openrail|llama2|llama3(\.[123])?|gemma"
)
"""Licence ids that the Hub knows, as far as data commonly has them."""


def render_card(manifest: Manifest, report: Mapping[str, Any]) -> str:
    """README.md of a version: YAML front matter, then Markdown."""
    front = yaml.safe_dump(
        _front_matter(manifest, report), sort_keys=False, allow_unicode=True, width=88
    )
    sections = (
        f"# {inert(manifest.name)}",
        f"**{unfinished(manifest)}**" if manifest.pending else "",
        _paragraphs(manifest.description),
        _opening(manifest, report),
        _section("Load it", _snippets(manifest)),
        _section("What is in it", _configs(manifest), _columns(manifest, report)),
        _section("How it was made", _funnel(report), _models(manifest), _duels(report)),
        _section("How good it is", _gates(manifest, report), _figures(report)),
        _section("Sources and licences", _sources(report)),
        _section("Known limits", _limits(manifest, report)),
        _section("Changes", f"- **{manifest.version}**: {inert(manifest.change)}"),
    )
    return f"---\n{front}---\n\n" + "\n\n".join(part for part in sections if part) + "\n"


def inert(text: object) -> str:
    """Text as one line of Markdown in which nothing acts."""
    line = " ".join(plain(str(text).replace("\r", "\n")).split())
    return _ACTIVE.sub(lambda found: f"&#{ord(found.group())};", line)


def code(text: object) -> str:
    """A name as code where it holds nothing that could end the code, else as inert text."""
    name = str(text)
    return f"`{name}`" if _CODE.fullmatch(name) and name == name.strip() else inert(name)


def _front_matter(manifest: Manifest, report: Mapping[str, Any]) -> dict[str, Any]:
    licenses = [name.strip().lower() for name in manifest.licenses]
    license_ = licenses[0] if len(licenses) == 1 else _together(manifest.licenses)
    languages = report["categories"].get("language", {"values": {}})["values"]
    codes = sorted(name for name in languages if _LANGUAGE.fullmatch(name))
    front: dict[str, Any] = {"pretty_name": plain(manifest.name)}
    if codes:
        front["language"] = codes
    front |= {
        "license": license_ if _LICENSE.fullmatch(license_) else "other",
        "size_categories": [_size(report["rows"])],
        "tags": _tags(manifest, report),
    }
    configs = [
        {"config_name": config}
        | ({"default": True} if config == "default" else {})
        | {
            "data_files": [
                {"split": split, "path": [f.path for f in manifest.files if _is(f, config, split)]}
                for split in dict.fromkeys(f.split for f in manifest.files if f.config == config)
            ]
        }
        for config in manifest.configs
        if any(file.config == config for file in manifest.files)
    ]
    return front | ({"configs": configs} if configs else {})


def _is(file: Any, config: str, split: str) -> bool:
    return (file.config, file.split) == (config, split)


def _size(rows: int) -> str:
    return next((name for limit, name in (*_SIZES, *_LARGE) if rows < limit), "1B<n<10B")


def _tags(manifest: Manifest, report: Mapping[str, Any]) -> list[str]:
    tags = {"Pair": ["preference", "dpo"], "Label": ["preference", "kto"]}.get(report["kind"], [])
    embedders = ("sentence_transformers", "hashing")
    written = any(card.kind not in embedders for card in manifest.models.values())
    return [*tags, *(["synthetic"] if written else []), "datakit"]


def _section(title: str, *parts: str) -> str:
    said = [part for part in parts if part]
    return "\n\n".join([f"## {title}", *said]) if said else ""


def _paragraphs(text: str) -> str:
    parts = re.split(r"\n\s*\n", text.replace("\r\n", "\n"))
    return "\n\n".join(inert(part) for part in parts if part.strip())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A Markdown table of cells that are inert already; empty without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return ""
    rule = " | ".join("---:" if place in numbers else "---" for place in range(len(head)))
    return "\n".join([f"| {' | '.join(head)} |", f"| {rule} |", *lines])


def _opening(manifest: Manifest, report: Mapping[str, Any]) -> str:
    lines = [f"Version **{manifest.version}**. {headline(manifest, report)}"]
    if manifest.limit is not None:
        lines.append(f"**A trial run over {manifest.limit:,} source rows, not the whole dataset.**")
    lines.append("`report.html` shows every figure with samples; `manifest.json` holds the recipe.")
    return "\n\n".join(lines)


def _snippets(manifest: Manifest) -> str:
    split = "train" if "train" in manifest.splits else next(iter(manifest.splits), "")
    if not re.fullmatch(r"[\w.-]+", split):
        return ""
    load = f"""```python
from datasets import load_dataset

# A folder that holds this version, or its address on the Hub.
data = load_dataset("path/or/address", "default", split="{split}")
```"""
    if manifest.configs.get("default") != "Pair":
        return load
    return f"""{load}

With TRL:

```python
from trl import DPOConfig, DPOTrainer

pairs = data.select_columns(["prompt", "chosen", "rejected"])
trainer = DPOTrainer(model="your/model", args=DPOConfig(output_dir="out"), train_dataset=pairs)
trainer.train()
```"""


def _configs(manifest: Manifest) -> str:
    kinds = {
        "Pair": "one preference pair a row",
        "Judged": "all answers to a prompt with every raw verdict",
        "Candidates": "all answers to a prompt",
        "Label": "one answer a row, desirable or not",
        "Prompt": "one prompt a row",
    }
    rows: dict[tuple[str, str], int] = {}
    for file in manifest.files:
        if file.config:
            key = file.config, file.split
            rows[key] = rows.get(key, 0) + file.rows
    lines = (
        (code(config), code(split), count(n), kinds.get(manifest.configs.get(config, ""), ""))
        for (config, split), n in rows.items()
    )
    return _table(("Config", "Split", "Rows", "One row is"), lines, (2,))


def _columns(manifest: Manifest, report: Mapping[str, Any]) -> str:
    if manifest.configs.get("default") != "Pair":
        return ""
    lines = ((code(name), said) for name, said in column_lines(report))
    return "Columns of `default`:\n\n" + _table(("Column", "Meaning"), lines)


def _funnel(report: Mapping[str, Any]) -> str:
    lines: list[tuple[str, ...]] = []
    for alias, step in report["funnel"].items():
        why = [
            f"{count(rows)} {code(reason)}{': ' if reason_words(reason) else ''}"
            + reason_words(reason)
            for reason, rows in step["reasons"].items()
        ]
        counts = (count(step[name]) for name in ("rows_in", "kept", "dropped"))
        lines.append((code(alias), *counts, "<br>".join(why)))
    table = _table(("Step", "In", "Kept", "Dropped", "Why"), lines, (1, 2, 3))
    return (
        f"{table}\n\nEvery dropped row lies in `rejects.parquet` with its reason." if table else ""
    )


def _models(manifest: Manifest) -> str:
    lines = (
        (
            code(role),
            code(card.identity),
            ", ".join(f"{inert(name)} {inert(value)}" for name, value in card.sampling.items()),
        )
        for role, card in manifest.models.items()
    )
    return _table(("Role", "Model", "Sampling"), lines)


def _duels(report: Mapping[str, Any]) -> str:
    def name(model: str) -> str:
        return code(model) if model else "not recorded"

    lines = (
        (
            name(duel["one"]),
            name(duel["other"]),
            count(duel["won"]),
            "–" if duel["lost"] is None else count(duel["lost"]),
        )
        for duel in duels(report["models"])
    )
    return _table(("Model", "Other model", "First preferred", "Other preferred"), lines, (2, 3))


def _gates(manifest: Manifest, report: Mapping[str, Any]) -> str:
    lines = (
        (
            code(g["path"]),
            inert(g["bound"]),
            short_number(g["value"]),
            "pass" if g["passed"] else "**fail**",
        )
        for g in gate_lines(manifest, report)
    )
    return _table(("Gate", "Bound", "Value", "Verdict"), lines, (2,))


def _figures(report: Mapping[str, Any]) -> str:
    judge, longer = report["judge"], report["lengths"].get("chosen_longer")
    named = [
        ("The judge prefers what it sees first (50 % is unbiased)", judge["first_share"]),
        ("The judge changes its mind with the order", judge["flip_share"]),
        ("The judge sees no difference", judge["tie_share"]),
        ("The chosen answer is the longer one", longer or {"n": 0}),
    ]
    lines = (
        (
            title,
            percent(one["share"]),
            count(one["n"]),
            f"{percent(one['low'])} to {percent(one['high'])}",
        )
        for title, one in named
        if one["n"]
    )
    return _table(("Figure", "Share", "n", "95 % interval"), lines, (1, 2, 3))


def _sources(report: Mapping[str, Any]) -> str:
    lines = (
        (inert(one["source"]), inert(one["license"]), count(one["rows"]))
        for one in report["sources"]
    )
    table = _table(("Source", "Licence", "Rows"), lines, (2,))
    return f"{table}\n\nTogether: {_together(report['licenses'])}."


def _together(names: Iterable[str]) -> str:
    """The freest licence that rows under all these can be published under, or `unknown`."""
    return str(mixed("" if name == NOT_STATED else name for name in names))


def _limits(manifest: Manifest, report: Mapping[str, Any]) -> str:
    steps = " ".join(step["step"] for step in report["funnel"].values())
    limits: list[str] = []
    if report["judge"]["judges"]:
        limits.append("The labels are verdicts of a model, not of people.")
    longer = report["lengths"].get("chosen_longer")
    if longer and longer["n"] and longer["low"] > 0.5:
        share = percent(longer["share"])
        limits.append(f"The chosen answer is the longer one in {share} of pairs: mind length bias.")
    if "decontam" not in steps:
        limits.append("Nothing was compared with evaluation benchmarks.")
    if not any(word in steps for word in ("personal", "pii", "safety", "secret")):
        limits.append("Nothing was searched for personal data, secrets or harmful content.")
    if NOT_STATED in manifest.licenses:
        rows = count(manifest.licenses[NOT_STATED])
        limits.append(f"The licence of {rows} rows is not stated by their source.")
    return "\n".join(f"- {limit}" for limit in limits)
