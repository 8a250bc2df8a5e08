"""Personal data and secrets in texts: what is found, what is not, and texts without them."""

import random
import re
import time

import polars as pl
import pytest
from filters_kit import HOSTILE, frame_of
from hypothesis import given
from hypothesis import strategies as st

from datakit.findings_pii import KINDS, Masks, entities, iban, luhn, may_hold_pii

FOUND = {
    "email": (
        "bob@example.com",
        "first.last+tag@mail.example.co.uk",
        "o'neil@example.ie",
        "björn@exämple.se",
        "x_1@a-b.museum",
    ),
    "phone": (
        "+1 (415) 555-2671",
        "+49 30 901820",
        "+442079460958",
        "415-555-2671",
        "(415) 555-2671",
        "415.555.2671",
        "06 12 34 56 78",
        "020 7946 0958",
    ),
    "iban": (
        "DE89 3704 0044 0532 0130 00",
        "GB82WEST12345698765432",
        "FR1420041010050500013M02606",
    ),
    "card": (
        "4111 1111 1111 1111",
        "5500-0000-0000-0004",
        "378282246310005",
        "3782 822463 10005",
        "6011111111111117",
    ),
    "ssn": ("078-05-1120", "219-09-9999"),
    "ip": (
        "192.168.1.20",
        "93.184.216.34",
        "2001:0db8:85a3:0000:0000:8a2e:0370:7334",
        "fe80::1ff:fe23:4567:890a",
    ),
    "secret": (
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "a1B2c3D4e5" * 4,
        "github_pat_" + "a1B2c3D4e5" * 3,
        "sk-proj-abcDEF123456789abcdefGHI",
        "sk-ant-api03-abcDEF123456789abcdefGHI",
        "xoxb-123456789012-abcdefABCDEF",
        "AIzaSyA" + "1b2C3" * 6 + "xy",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.SflKxwRJSMeKKF2QT4fwpM",
        "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4\nMIIEpAIB\n-----END RSA PRIVATE KEY-----",
        "hooks.slack.com/services/T00000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXXX",
    ),
    "url": ("https://user:pass@example.com", "postgres://admin:s3cret@db.internal:5432"),
}
AROUND = ("{}", "see {}.", "({})", '"{}"', "a {} b", "\u200b{}\u200b", "ما {} هو", "\n{}\n", "<{}>")
CASES = [(kind, text) for kind, texts in FOUND.items() for text in texts]


@pytest.mark.parametrize(("kind", "text"), CASES)
@pytest.mark.parametrize("around", AROUND)
def test_an_entity_is_found_whole_wherever_it_stands(kind, text, around):
    whole = around.format(text)
    assert [(one.kind, whole[one.start : one.stop]) for one in entities(whole)] == [(kind, text)]
    assert frame_of(whole).select(may_hold_pii(pl.col("text"))).item()


@pytest.mark.parametrize(
    "text",
    [
        "version 10.2.3.4 of v10.2.3.4",
        "section 1.2.3.4 and 1.2.3.4.5 and 300.1.1.1 and 127.0.0.1 and 255.255.255.0",
        "in 1984-1999 or 2021-03-04 or 12/31/1999 at 10:20:30.456",
        "3.14159265358979 and 2.71828182845904523536 and 0.4111111111111111",
        "1,234,567,890 and 1 234 567 890 and 12345678901234567890123",
        "4111 1111 1111 1112",  # Luhn
        "1234567812345670",  # no issuer
        "DE89 3704 0044 0532 0130 01",  # mod 97
        "000-12-3456 and 666-12-3456 and 900-12-3456 and 123-00-4567 and 123-45-0000",
        "std::vector<int> a::b c::d::e",
        "aa:bb:cc:dd:ee:ff and 12:30 and 1:2:3",
        "icon@2x.png and @property and a @ b and user@host",
        "git@github.com:owner/name.git",
        "sk-learn-is-a-very-long-hyphenated-name",
        "x = 415 - 555 * 2671 + 12345678",
        "call 1-800-273-8255 or 911",
        "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16",
        "https://example.com:8080/path?user=a:b",
        "isbn 978-3-16-148410-0",
        "+1.234567890123",
        "phone 13 or phone 1000",
        "5000 6000 255 241 6950 7000 438 398 7950 8000",
    ],
)
def test_what_only_looks_like_one_is_left(text):
    assert entities(text) == []


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("tel: 5551234567", "5551234567"),
        ("Phone number is 07700 900123", "07700 900123"),
        ("aws_secret_access_key = " + "a1B2/3d4+5" * 4, "a1B2/3d4+5" * 4),
    ],
)
def test_context_says_what_it_is_and_stays(text, part):
    (one,) = entities(text)
    assert text[one.start : one.stop] == part


def test_a_truncated_private_key_is_found():
    text = "-----BEGIN PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEA\n" * 5 + "and then prose"
    (one,) = entities(text)
    assert text[one.stop :].strip() == "and then prose"


def test_spellings_of_one_entity_share_a_key():
    for texts in (
        ("Bob@Example.com", "bob@example.COM"),
        ("+1 415 555 2671", "(415) 555-2671", "415.555.2671"),
        ("4111 1111 1111 1111", "4111111111111111", "4111-1111-1111-1111"),
        ("DE89 3704 0044 0532 0130 00", "DE89370400440532013000"),
        ("2001:db8:0:0:0:0:0:11", "2001:db8::11"),
    ):
        assert len({entities(text)[0].key for text in texts}) == 1, texts


@given(st.from_regex("[0-9]{12,18}", fullmatch=True))
def test_exactly_one_check_digit_fits(digits):
    assert sum(luhn(f"{digits}{check}") for check in range(10)) == 1


def test_an_iban_with_one_wrong_digit_is_none():
    good = "DE89370400440532013000"
    assert iban(good)
    for place in range(2, len(good)):
        for digit in "0123456789":
            changed = good[:place] + digit + good[place + 1 :]
            assert iban(changed) is (changed == good)


# -- masking -------------------------------------------------------------------------------------


def masked(*texts):
    masks = Masks(texts)
    return [masks.mask(text) for text in texts]


def test_one_entity_has_one_placeholder_in_all_texts():
    texts = masked("ask al@x.com or bo@y.org", "BO@Y.org or cy@z.net", "al@x.com, 415-555-2671")
    assert texts == [
        "ask <EMAIL_1> or <EMAIL_2>",
        "<EMAIL_2> or <EMAIL_3>",
        "<EMAIL_1>, <PHONE_1>",
    ]


def test_placeholders_that_are_there_keep_their_numbers():
    assert masked("<EMAIL_2> and al@x.com", "<EMAIL_7>") == ["<EMAIL_2> and <EMAIL_8>", "<EMAIL_7>"]


def test_a_find_that_shows_once_another_is_gone_is_masked_too():
    text = "a@b.com+12025550123"
    (done,) = masked(text)
    assert entities(done) == []
    assert "2025550123" not in done


def test_a_text_made_to_be_masked_forever_is_stuck():
    text = "+12345678" * 50
    started = time.monotonic()
    masks = Masks([text])
    assert masks.stuck or not entities(masks.mask(text))
    assert time.monotonic() - started < 5


PIECES = st.sampled_from(
    [text for texts in FOUND.values() for text in texts]
    + ["", " ", ", ", "\n", "a", "1", "-", ".", "+", "(", ")", "@", ":", "/", "<", ">", "<EMAIL_1>"]
    + ["version ", "tel: ", "\u200b", "\u202e", "٣", "ß"]
)


@given(st.lists(st.lists(PIECES, max_size=8).map("".join), max_size=4))
def test_masking_is_idempotent_and_leaves_nothing(texts):
    masks = Masks(texts)
    done = [masks.mask(text) for text in texts]
    if masks.stuck:
        return
    assert [entities(text) for text in done] == [[] for _ in texts]
    again = Masks(done)
    assert [again.mask(text) for text in done] == done
    assert again.counts() == {}


@given(st.lists(PIECES, max_size=10).map("".join))
def test_the_quick_look_misses_nothing(text):
    if entities(text):
        assert frame_of(text).select(may_hold_pii(pl.col("text"))).item()


@given(st.text(max_size=200))
def test_any_text_is_taken(text):
    assert Masks([text]).mask(text) == text or entities(text)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_kinds_that_are_wanted_are_looked_for(kind):
    everything = "\n".join(texts[0] for texts in FOUND.values())
    assert {one.kind for one in entities(everything, [kind])} == {kind}


@pytest.mark.parametrize("place", range(len(HOSTILE)))
def test_a_hostile_text_takes_linear_time(place):
    text = HOSTILE[place]
    started = time.monotonic()
    assert entities(text) == []
    frame_of(text).select(may_hold_pii(pl.col("text")))
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    "bait",
    [
        *("eyJaaaaaaaa.", "-----BEGIN PRIVATE KEY-----", "http://a:", "A1", "AA11 1111 ", "+1"),
        *("x@a.", "+1((( ", "sk-", "a@b.", "1.1.", ":", "f:", "secret_access_key= ", "tel: 1 "),
    ],
)
def test_time_grows_as_the_text_does(bait):
    def took(size):
        text = bait * (size // len(bait))
        started = time.process_time()
        entities(text)
        return time.process_time() - started

    took(10_000)
    small = max(0.02, min(took(100_000) for _ in range(2)))
    # Ten times the text: a hundred times the time would be a square.
    assert took(1_000_000) < 40 * small


def test_numbers_do_not_hang_on_where_texts_repeat():
    texts = [f"mail {name}@x.com" for name in "abc"]
    shuffled = random.Random(1).sample(texts * 2, 6)
    done = dict(zip(shuffled, masked(*shuffled), strict=True))
    assert len(set(done.values())) == 3
    assert all(re.fullmatch(r"mail <EMAIL_[123]>", text) for text in done.values())
