"""Languages: what is found, and which rows are dropped by it."""

import builtins

import pytest
from filters_kit import HOSTILE, reasons, run, whatever_the_order
from steps_kit import candidates, pair, prompt

from datakit.curation import language
from datakit.curation.language import Language
from datakit.errors import MissingExtra
from datakit.records import Candidates, Pair, Prompt

TEXTS = {
    "en": "The committee will meet again on Thursday to discuss the budget for next year.",
    "de": "Der Ausschuss trifft sich am Donnerstag wieder, um den Haushalt zu besprechen.",
    "fr": "Le comité se réunira de nouveau jeudi pour discuter du budget de l'année.",
    "es": "El comité se reunirá de nuevo el jueves para hablar del presupuesto.",
    "pl": "Komisja zbierze się ponownie w czwartek, aby omówić budżet na przyszły rok.",
    "tr": "Komite bütçeyi görüşmek için perşembe günü tekrar toplanacak.",
    "ru": "Комитет снова соберётся в четверг, чтобы обсудить бюджет.",
    "ar": "ستجتمع اللجنة مرة أخرى يوم الخميس لمناقشة الميزانية.",
    "he": "הוועדה תתכנס שוב ביום חמישי כדי לדון בתקציב.",
    "hi": "समिति बजट पर चर्चा करने के लिए गुरुवार को फिर मिलेगी।",
    "zh": "委员会将于星期四再次开会讨论预算。",
    "ja": "委員会は木曜日に再び会合を開き、予算について話し合います。",
    "ko": "위원회는 예산을 논의하기 위해 목요일에 다시 모일 것입니다.",
}
EN, DE, FR = TEXTS["en"], TEXTS["de"], TEXTS["fr"]
pytest.importorskip("py3langid", reason="needs the package py3langid")


def labels(kind, row, **fields):
    ((kept,), _) = run(Language(**fields), kind, [row])
    return {name.removeprefix("it."): value for name, value in kept.labels.items()}


@pytest.mark.parametrize("code", TEXTS)
def test_a_sentence_is_enough(code):
    assert labels(Prompt, prompt(TEXTS[code])) == {"language": code, "language.prompt": code}


@pytest.mark.parametrize("text", ["ok", "42 + 1 = 43", "\u200b\u202e", "🙂🙂🙂", "...", "x" * 19])
def test_little_text_is_undetermined(text):
    assert labels(Prompt, prompt(f"a{text}"))["language"] == "und"


def test_labels_and_measures_by_side():
    row = pair(EN, DE, "ok")
    ((kept,), _) = run(Language(), Pair, [row])
    assert kept.labels == {
        "it.language": "mul",
        "it.language.prompt": "en",
        "it.language.chosen": "de",
        "it.language.rejected": "und",
    }
    assert kept.measures["it.confidence.rejected"] == 0
    assert 0.5 <= kept.measures["it.confidence.chosen"] <= 1
    assert kept.measures["it.confidence"] == 0
    ((swapped,), _) = run(Language(), Pair, [row.swap()])
    assert kept.swap().labels == swapped.labels
    assert kept.swap().measures == swapped.measures


def test_responses_of_candidates_share_a_label_where_they_agree():
    assert labels(Candidates, candidates(EN, DE, DE + " Ja."))["language.response"] == "de"
    assert labels(Candidates, candidates(EN, DE, FR))["language.response"] == "mul"
    assert labels(Candidates, candidates(EN, DE, "ok"))["language.response"] == "de"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["", "", "", ""]),
        ({"allow": ("en",)}, ["", "language", "language", ""]),
        ({"allow": ("en", "de")}, ["", "", "", ""]),
        ({"allow": ("en",), "over": "prompt"}, ["", "", "language", ""]),
        ({"allow": ("de",), "over": "response"}, ["language", "", "", ""]),
        ({"same": True}, ["", "mixed_languages", "", ""]),
        ({"undetermined": "drop"}, ["", "", "", "undetermined"]),
        ({"undetermined": "drop", "over": "prompt"}, ["", "", "", ""]),
        ({"allow": ("en",), "min_confidence": 1.0}, ["", "", "", ""]),
    ],
)
def test_rules(fields, expected):
    rows = [pair(EN, EN + " Yes.", EN), pair(EN, DE, DE + " Ja."), pair(DE, DE + " Ja.", DE)]
    rows.append(pair(EN, "ok", "no"))
    step = Language(**fields)
    assert reasons(step, Pair, rows) == expected
    assert whatever_the_order(step, Pair, rows)


@pytest.mark.parametrize("code", ["english", "EN", "e", "en-US", ""])
def test_what_is_no_code_is_refused(code):
    with pytest.raises(ValueError, match="no language code"):
        Language(allow=(code,))


def test_hostile_texts_and_an_empty_table():
    rows = [candidates(f"q{place}", text) for place, text in enumerate(HOSTILE)]
    assert reasons(Language(), Candidates, rows) == [""] * len(rows)
    assert run(Language(allow=("en",)), Pair, [])[0] == []


def test_a_missing_package_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("py3langid"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    language._identifier.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"pip install 'datakit\[language\]'"):
        run(Language(), Prompt, [prompt(EN)])
