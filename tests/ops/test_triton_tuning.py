"""tune() and the file it keeps tiles in. Without a GPU: in the interpreter, and with times that the test makes up."""

import json
import warnings

import pytest
import torch
from attention_cases import INTERPRETED

pytest.importorskip("triton", reason="triton is not installed")

from luke_kernels import tune, tuning
from luke_kernels.ops import backends, tuned
from luke_kernels.ops.backends import triton as backend
from luke_kernels.ops.layout import Layout

CPU = torch.device("cpu")
KEY = tuned.Key("fwd", "float32", 32, False, True)
TILE = dict(zip(tuned.TILE_FIELDS, (16, 16, 16, 4, 2, None), strict=True))
OTHER = TILE | {"BLOCK_N": 32}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUKE_KERNELS_CACHE", str(tmp_path / "cache"))
    tuned.load.cache_clear()
    yield tmp_path / "cache"
    tuned.load.cache_clear()


def test_tiles_are_kept_between_processes(cache):
    assert tuned.load(CPU) == {}
    path = tuned.keep(CPU, KEY, TILE)
    assert tuned.load(CPU) == {KEY: TILE}
    assert [p.name for p in cache.iterdir()] == [path.name]
    # Another process, which read the file before a third wrote to it, keeps what it does not set.
    another = KEY._replace(small=False)
    tuned.load(CPU).clear()
    tuned.keep(CPU, another, OTHER)
    tuned.load.cache_clear()
    with warnings.catch_warnings(action="error"):
        assert tuned.load(CPU) == {KEY: TILE, another: OTHER}


def test_what_fails_half_way_leaves_the_file(cache, monkeypatch):
    path = tuned.keep(CPU, KEY, TILE)
    before = path.read_text()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(tuned.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tuned.keep(CPU, KEY, OTHER)
    assert [p.name for p in cache.iterdir()] == [path.name]
    assert path.read_text() == before


def test_without_a_home_nothing_is_tuned(monkeypatch):
    monkeypatch.delenv("LUKE_KERNELS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tuned.Path, "home", fail)
    assert tuned.load(CPU) == {}


def test_a_stale_file_is_ignored_with_one_warning():
    path = tuned.keep(CPU, KEY, TILE)
    content = json.loads(path.read_text())
    for name in ("gpu", "torch", "triton", "kernels"):
        stale = content | {"fingerprint": content["fingerprint"] | {name: "another"}}
        path.write_text(json.dumps(stale))
        tuned.load.cache_clear()
        with pytest.warns(UserWarning, match=f"are of {name} another: ignored") as caught:
            assert tuned.load(CPU) == tuned.load(CPU) == {}
        assert len(caught) == 1
    # Its tiles do not come back.
    tuned.keep(CPU, KEY._replace(small=False), OTHER)
    tuned.load.cache_clear()
    assert tuned.load(CPU) == {KEY._replace(small=False): OTHER}


@pytest.mark.parametrize(
    ("name", "value"),
    [("BLOCK_M", -16), ("BLOCK_M", 48), ("BLOCK_N", "16"), ("BLOCK_N", None), ("TAIL", 0), ("num_warps", 3)],
)
def test_a_tile_that_no_kernel_takes_is_damage(name, value):
    path = tuned.keep(CPU, KEY, TILE | {name: value})
    tuned.load.cache_clear()
    with pytest.warns(UserWarning, match="must hold tuned tiles, got ValueError"):
        assert tuned.load(CPU) == {}
    assert path.exists()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"tiles": [{"key": {}, "tile": {}}]}', '{"tiles": 1}', "\x00"])
def test_a_damaged_file_is_ignored_with_a_warning(text):
    path = tuned.keep(CPU, KEY, TILE)
    path.write_text(text)
    tuned.load.cache_clear()
    with pytest.warns(UserWarning, match="must hold tuned tiles, got"):
        assert tuned.load(CPU) == {}


def test_the_backend_takes_the_tile_of_the_size_of_the_grid(monkeypatch):
    monkeypatch.setattr(backend, "_multiprocessors", lambda device: 10)
    constants = {"BLOCK_D": 32, "DROPOUT": False}
    words = torch.empty(1, 4, 2, 32)
    small, large = (Layout(None, None, None, None, batch, 100, 60, True) for batch in (6, 7))  # 36 and 42 blocks
    assert backend._config("fwd", words, small, constants) == backend.config("fwd", 0, torch.float32, 32, False)
    tuned.load(CPU).update({KEY: TILE, KEY._replace(small=False): OTHER})
    assert backend._config("fwd", words, small, constants) == TILE
    assert backend._config("fwd", words, large, constants) == OTHER
    for others in (("bwd_dq", constants), ("fwd", constants | {"DROPOUT": True}), ("fwd", constants | {"BLOCK_D": 64})):
        assert backend._config(others[0], words, small, others[1]) not in (TILE, OTHER)


@INTERPRETED
def test_tune_keeps_the_fastest_that_is_right(monkeypatch):
    """A wrong tile would win; one does not compile; the fastest of the rest is kept, where it gains enough."""
    wrong, failing, fast = OTHER, TILE | {"num_warps": 8}, TILE | {"TAIL": 32, "BLOCK_M": 32, "BLOCK_N": 32}
    monkeypatch.setattr(backend, "config", lambda *key: TILE)
    monkeypatch.setattr(tuning, "candidates", lambda key, built_in: [TILE, wrong, failing, fast])
    monkeypatch.setattr(tuning, "SHAPES", {True: ((1, 20, 5),), False: ((2, 20, 5), (3, 20, 5))})
    monkeypatch.setattr(tuning, "CHECKED", (40, 35))
    forward, used = backend.forward, []

    def spoiled(words, entities, layout, *options):
        tile = tuned.load(CPU).get(KEY, TILE)
        used.append(tile)
        if tile == failing:
            raise RuntimeError("out of resource: shared memory")
        out, lse = forward(words, entities, layout, *options)
        return (out + 1e-3, lse) if tile == wrong else (out, lse)

    def milliseconds(run):
        run()
        return {json.dumps(TILE): 1.0, json.dumps(fast): 0.99 if results else 0.5}[json.dumps(used[-1])]

    results = []
    monkeypatch.setattr(backend, "forward", spoiled)
    monkeypatch.setattr(tuning, "_BLOCKS", {"fwd": ()})
    # Two heads: the second batch of the large ones is the first that is large.
    monkeypatch.setattr(backend, "_multiprocessors", lambda device: 1)
    for result in tuning.tune_each(32, 2, torch.float32, False, CPU, milliseconds):
        results.append(result)
    small, large = results
    assert (small.key, small.tile, small.ms, small.built_in_ms) == (KEY, fast, 0.5, 1.0)
    assert (small.tried, small.wrong, small.failed) == (4, 1, 1)
    assert (large.key, large.tile, large.ms) == (KEY._replace(small=False), TILE, 1.0)
    tuned.load.cache_clear()
    assert tuned.load(CPU) == {KEY: fast, KEY._replace(small=False): TILE}


def test_the_shape_that_is_timed_is_of_its_size(monkeypatch):
    for multiprocessors, num_heads in ((28, 16), (132, 64), (132, 1), (132, 16)):
        monkeypatch.setattr(backend, "_multiprocessors", lambda device, count=multiprocessors: count)
        for small in (True, False):
            batch, words, entities = tuning._shape(small, num_heads, CPU)
            assert backend.is_small(batch, words + entities, num_heads, CPU) == small
    with pytest.raises(ValueError, match="num_heads must give a small grid for some batch, got 10000"):
        tuning._shape(True, 10_000, CPU)


@INTERPRETED
def test_an_error_of_the_built_in_tile_is_not_hidden(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(backend, "backward", fail)
    monkeypatch.setattr(tuning, "CHECKED", (5, 3))
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        next(tuning.tune_each(32, 2, torch.float32, False, CPU, lambda run: 1.0))
    assert tuned.load(CPU) == {}


def test_candidates_hold_blocks_that_triton_takes():
    for kernel in tuning._BLOCKS:
        for dtype in ("float32", "bfloat16"):
            found = tuning.candidates(tuned.Key(kernel, dtype, 64, False, True), TILE)
            assert len(found) == len({tuple(tile.items()) for tile in found}) >= 10
            assert all(tile[name] % 16 == 0 for tile in found for name in ("BLOCK_M", "BLOCK_N", "TAIL"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_message_says_so():
    with pytest.raises(NotImplementedError, match="tune must have a GPU, got none that torch can see"):
        tune()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"head_dim": 64.0}, "head_dim must be an int, got 64.0"),
        ({"num_heads": "16"}, "num_heads must be an int, got '16'"),
        ({"dtype": "bfloat16"}, "dtype must be a torch.dtype, got 'bfloat16'"),
        ({"device": "cpu"}, "device must be a GPU, cuda or cuda:N, got 'cpu'"),
        ({"device": "nonsense"}, "device must be a GPU, cuda or cuda:N, got 'nonsense'"),
        ({"device": None}, "device must be a GPU, cuda or cuda:N, got 'None'"),
    ],
)
def test_arguments_that_are_wrong(argument, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises((TypeError, ValueError), match=message):
        tune(**argument)


@INTERPRETED
def test_a_cache_that_cannot_be_written_is_found_before_the_work(cache):
    cache.write_text("a file")
    with pytest.raises(FileExistsError, match=str(cache)):
        next(tuning.tune_each(32, 2, torch.float32, False, CPU, lambda run: 1 / 0))


@pytest.mark.gpu
def test_tune_on_a_gpu(monkeypatch):
    """The whole of it, with two tiles."""
    monkeypatch.setattr(tuning, "SHAPES", {True: ((1, 64, 8),)})
    candidates = tuning.candidates
    monkeypatch.setattr(tuning, "candidates", lambda *key: candidates(*key)[:2])
    results = tune(head_dim=64, num_heads=2, dtype=torch.bfloat16)
    assert [result.key.kernel for result in results] == ["fwd", "bwd_dq", "bwd_dkdv"]
    assert all(0 < result.ms <= result.built_in_ms and result.wrong == 0 for result in results)
    assert backends.load("triton") is backend
