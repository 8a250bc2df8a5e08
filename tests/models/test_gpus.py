"""Which local models run together, and on which GPUs."""

import itertools

import pytest
from local_models import spec_of

from datakit.errors import InputError
from datakit.models.gpus import assign, gpu_names, phases, visible_gpus
from datakit.models.sampling import Sampling


def roles(**sizes):
    """Specs with that many GPUs each, in that order."""
    return {role: spec_of(model=role, gpus=size) for role, size in sizes.items()}


def test_models_that_fit_run_together():
    assert phases(roles(a=1, b=1), 2) == [["a", "b"]]
    assert phases(roles(a=2, b=1, c=1), 2) == [["a"], ["b", "c"]]
    assert phases(roles(a=1, b=2, c=1), 2) == [["a", "c"], ["b"]]
    assert phases({}, 0) == []


def test_models_without_gpus_join_the_newest_phase():
    assert phases(roles(a=0, b=0), 0) == [["a", "b"]]
    assert phases(roles(a=2, b=0, c=2, d=0), 2) == [["a", "b"], ["c", "d"]]


def test_replicas_stay_together():
    specs = {"a": spec_of(tensor_parallel=2, replicas=2), "b": spec_of(model="n")}
    assert phases(specs, 4) == [["a"], ["b"]]
    assert phases(specs, 5) == [["a", "b"]]


def test_roles_of_one_server_share_it():
    judge = spec_of(sampling=Sampling(temperature=0), max_in_flight=3)
    specs = {"writer": spec_of(), "other": spec_of(model="n"), "judge": judge}
    assert phases(specs, 1) == [["writer", "judge"], ["other"]]
    assert assign({"writer": spec_of(), "judge": judge}, ["5"]) == {
        "writer": [("5",)],
        "judge": [("5",)],
    }


def test_too_large_a_model_says_what_to_lower():
    with pytest.raises(
        InputError, match=r"a needs 6 GPUs \(replicas 3 × 2\), and there are 5"
    ) as e:
        phases({"a": spec_of(tensor_parallel=2, replicas=3)}, 5)
    assert "set models.a.replicas to 2 or less" in str(e.value)
    with pytest.raises(InputError, match=r"needs 8 GPUs .* lower models.a.tensor_parallel"):
        phases({"a": spec_of(tensor_parallel=8)}, 4)
    with pytest.raises(
        InputError, match=r"needs 1 GPUs .* there are 0; lower models.a.gpus.*gpus: 0"
    ):
        phases({"a": spec_of(gpus=1)}, 0)


def test_every_role_is_in_one_phase_and_none_is_overfull():
    for sizes in itertools.product(range(4), repeat=4):
        specs = roles(**dict(zip("abcd", sizes, strict=True)))
        packed = phases(specs, 3)
        assert sorted(itertools.chain(*packed)) == list("abcd")
        assert all(sum(specs[role].gpus_each for role in phase) <= 3 for phase in packed)
        # What is needed first comes first.
        assert [phase[0] for phase in packed] == sorted(phase[0] for phase in packed)
        for phase in packed:
            places = assign({role: specs[role] for role in phase}, ["x", "y", "z"])
            used = [name for places in places.values() for place in places for name in place]
            assert len(used) == len(set(used))


def test_replicas_are_assigned_apart():
    specs = {
        "a": spec_of(tensor_parallel=2, replicas=2),
        "b": spec_of(model="n", gpus=0, replicas=2),
        "c": spec_of(model="o"),
    }
    assert assign(specs, ["4", "5", "6", "GPU-x", "9"]) == {
        "a": [("4", "5"), ("6", "GPU-x")],
        "b": [(), ()],
        "c": [("9",)],
    }
    with pytest.raises(InputError, match="there are 0"):
        assign(specs, ["4", "5", "6", "7"])


@pytest.fixture
def nvidia(tmp_path, monkeypatch):
    """A machine with three GPUs, of which one is cut into parts."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DATAKIT_GPUS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    program = tmp_path / "nvidia-smi"
    lines = ["GPU 0: NVIDIA H200 (UUID: GPU-1)", "  MIG 1g.18gb Device 0: (UUID: MIG-2)"]
    lines += ["GPU 1: NVIDIA H200 (UUID: GPU-3)", "GPU 2: NVIDIA H200 (UUID: GPU-4)"]
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(0o755)
    return program


def test_gpus_are_those_of_nvidia_smi(nvidia):
    assert gpu_names() == ("0", "1", "2")
    nvidia.write_text("#!/bin/sh\necho 'GPU 0: no driver'\nexit 9\n")
    assert visible_gpus() == 0
    nvidia.unlink()
    assert visible_gpus() == 0


def test_gpus_are_those_that_cuda_shows(nvidia, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-7,1")
    assert gpu_names() == ("3", "GPU-7", "1")
    monkeypatch.setenv("DATAKIT_GPUS", "2")
    assert gpu_names() == ("3", "GPU-7")
    monkeypatch.setenv("DATAKIT_GPUS", "4")
    with pytest.raises(InputError, match="DATAKIT_GPUS is 4, and CUDA_VISIBLE_DEVICES lists 3"):
        gpu_names()


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles", "-1,0"])
def test_hidden_gpus_do_not_count(nvidia, monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert visible_gpus() == 0


def test_room_may_be_declared(nvidia, monkeypatch):
    for room in (0, 1, 2, 5):
        monkeypatch.setenv("DATAKIT_GPUS", str(room))
        assert gpu_names() == tuple("01234"[:room])
    for wrong in ("-1", "two", "1.5", "99999"):
        monkeypatch.setenv("DATAKIT_GPUS", wrong)
        with pytest.raises(InputError, match="give a number of GPUs"):
            visible_gpus()
