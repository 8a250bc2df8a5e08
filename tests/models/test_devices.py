"""Batches over devices: every row its own vector, within the tokens, halved without memory."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datakit.errors import InputError, OutsideError
from datakit.models import devices
from datakit.models.devices import devices_for, encode_over, has_cuda, replicas

torch = pytest.importorskip("torch")


class Codes:
    """A model whose vector of a text is (characters, sum of their codes); a character is a token.

    room: (rows x longest) that its memory holds, as torch says it.
    """

    default_prompt_name = None
    truncate_dim = None

    def __init__(self, room=10**9, pads="right"):
        self.room = room
        self.pads = pads
        self.batches = []

    def to(self, device):
        return self

    def preprocess(self, texts):
        longest = max(map(len, texts)) or 1
        ids = torch.zeros((len(texts), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            start = 0 if self.pads == "right" else longest - len(text)
            ids[row, start : start + len(text)] = torch.tensor([*map(ord, text)], dtype=torch.long)
            mask[row, start : start + len(text)] = 1
        return {"input_ids": ids, "attention_mask": mask, "modality": "text"}

    def __call__(self, batch):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        self.batches.append(tuple(ids.shape))
        if ids.numel() > self.room:
            raise torch.cuda.OutOfMemoryError("no room")
        return {"sentence_embedding": torch.stack([mask.sum(1), (ids * mask).sum(1)], 1).half()}


def expected(texts):
    return np.array([[len(text), sum(map(ord, text))] for text in texts], np.float32).reshape(-1, 2)


def names(count, length=8):
    return [chr(97 + number % 26) * (number % length + 1) for number in range(count)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("abc", max_size=9), min_size=1, max_size=40),
    st.sampled_from(["right", "left"]),
    st.sampled_from([None, 1, 3]),
    st.integers(1, 3),
    st.integers(9, 60),
)
def test_each_row_has_its_own_vector_whatever_the_batches(texts, pads, size, count, room):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "_CPU_BLOCK", 7)
        patch.setattr(devices, "_CPU_TOKENS", 30)
        models = replicas(Codes(room, pads), ["cpu"] * count, size)
        np.testing.assert_array_equal(encode_over(models, texts), expected(texts))


def test_a_batch_holds_its_tokens_padding_counted_and_the_longest_come_first():
    model = Codes()
    texts = names(3_000, 40)
    np.testing.assert_array_equal(
        encode_over(replicas(model, ["cpu"], None), texts), expected(texts).astype(np.float16)
    )
    assert all(rows * longest <= 1_024 for rows, longest in model.batches)
    lengths = [longest for _, longest in model.batches]
    assert lengths == sorted(lengths, reverse=True)
    padded = sum(rows * longest for rows, longest in model.batches)
    assert padded < 1.05 * sum(map(len, texts))


def test_a_fixed_batch_size_is_kept():
    model = Codes()
    encode_over(replicas(model, ["cpu"], 64), names(1_000))
    assert {rows for rows, _ in model.batches} <= {64, 1_000 % 64}


@pytest.mark.parametrize("size", [None, 64])
def test_without_memory_batches_are_halved_once_and_for_all(size):
    model = Codes(room=100)
    models = replicas(model, ["cpu"], size)
    texts = ["abcdefgh"] * 500
    np.testing.assert_array_equal(encode_over(models, texts), expected(texts))
    failed = [shape for shape in model.batches if shape[0] * shape[1] > 100]
    assert [rows for rows, _ in failed] == ([128, 64, 32, 16] if size is None else [64, 32, 16])
    model.batches.clear()
    encode_over(models, texts)
    assert {rows for rows, _ in model.batches[:-1]} == {8}


def test_one_text_that_memory_does_not_hold_is_an_outside_error():
    with pytest.raises(OutsideError, match="does not hold one text of 9 tokens; free"):
        encode_over(replicas(Codes(room=8), ["cpu"], None), ["abcdefghi"])


def test_several_devices_share_the_texts(monkeypatch):
    monkeypatch.setattr(devices, "_CPU_BLOCK", 10)
    both = threading.Barrier(2, timeout=30)

    class Waiting(Codes):
        waited = False

        def __call__(self, batch):
            if not self.waited:
                self.waited = True
                both.wait()  # each device has a block before either has made its first
            return super().__call__(batch)

    models = replicas(Waiting(), ["cpu", "cpu"], None)
    texts = names(400)
    np.testing.assert_array_equal(encode_over(models, texts), expected(texts))


def test_an_error_on_one_device_stops_the_others(monkeypatch):
    monkeypatch.setattr(devices, "_CPU_BLOCK", 10)

    class Failing(Codes):
        def __call__(self, batch):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        encode_over(replicas(Failing(), ["cpu"] * 3, None), names(10_000))


def test_a_model_whose_tokens_cannot_be_cut_runs_its_own_loop_and_is_halved_too():
    class Flat(Codes):
        sizes = []

        def preprocess(self, texts):
            return {"input_ids": torch.zeros(1, 9), "cu_seq_lens": torch.zeros(len(texts))}

        def encode(self, texts, batch_size, **_):
            self.sizes.append(batch_size)
            if batch_size > 5:
                raise torch.cuda.OutOfMemoryError("no room")
            return torch.tensor(expected(texts))

    texts = names(50)
    models = replicas(Flat(), ["cpu"], None)
    np.testing.assert_array_equal(encode_over(models, texts), expected(texts))
    assert Flat.sizes == [32, 16, 8, 4]


@pytest.mark.parametrize("listed", ["", " ", "-1"])
def test_a_hidden_gpu_is_none(listed, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert not has_cuda()


def test_what_is_told_without_torch_is_what_torch_finds():
    assert has_cuda() == (torch.cuda.is_available() and torch.version.cuda is not None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_cannot_use_is_said_with_what_to_do():
    with pytest.raises(
        InputError, match="finds no CUDA GPUs; mend the driver, or set `device: cpu"
    ):
        devices_for((), needs_cuda=True)
    assert devices_for(("cpu", "cpu"), needs_cuda=True) == ("cpu", "cpu")
