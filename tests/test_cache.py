"""States of a method between processes: what is wrong with the file costs a warning, never a run."""

import os
import stat
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from forvalue_callbacks.scores.cache import load_state, save_state

SHAPES = {"move": (40, 30), "second_moment": (30, 30), "ridge": ()}


def make_state():
    rng = np.random.default_rng(0)
    arrays = {"move": rng.normal(size=(40, 30)).astype(np.float32), "second_moment": rng.normal(size=(30, 30))}
    return {**arrays, "ridge": np.array(0.5)}


def assert_warns_once(caplog, text):
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert text in caplog.text
    caplog.clear()


def test_a_state_comes_back_bit_for_bit(tmp_path, caplog):
    state = make_state()
    state["move"] = np.asfortranarray(state["move"])
    save_state(tmp_path / "cache" / "state.safetensors", state)
    loaded = load_state(tmp_path / "cache" / "state.safetensors", SHAPES)
    assert loaded.keys() == state.keys()
    for name, array in state.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array, strict=True)
    some = {"second_moment": (30, 30)}
    assert load_state(tmp_path / "cache" / "state.safetensors", some).keys() == state.keys(), "more may be there"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["state.safetensors"]
    (tmp_path / "new").touch()
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new", tmp_path / "cache/state.safetensors")]
    assert modes[0] == modes[1], "others may read it where they may read other files"
    assert caplog.records == []


def test_a_state_that_is_not_there_is_none_without_a_word(tmp_path, caplog):
    assert load_state(tmp_path / "state.safetensors", SHAPES) is None
    assert caplog.records == []


def test_a_file_of_any_length_but_its_own_is_computed_anew(tmp_path, caplog):
    file = tmp_path / "state.safetensors"
    save_state(file, make_state())
    whole = file.read_bytes()
    for length in (0, 5, 8, 100, len(whole) - 1, len(whole) // 2):
        file.write_bytes(whole[:length])
        assert load_state(file, SHAPES) is None
        assert_warns_once(caplog, "computed anew")
    save_state(file, make_state())
    assert load_state(file, SHAPES) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"move": np.zeros((40, 31), dtype=np.float32)},
        {"move": np.zeros((30, 40), dtype=np.float32)},
        {"second_moment": np.zeros(30)},
    ],
)
def test_other_tensors_or_shapes_are_computed_anew(tmp_path, caplog, change):
    file = tmp_path / "state.safetensors"
    save_state(file, {**make_state(), **change})
    assert load_state(file, SHAPES) is None
    assert_warns_once(caplog, "computed anew: it holds")
    save_file({"move": make_state()["move"]}, file)
    assert load_state(file, SHAPES) is None
    assert_warns_once(caplog, "computed anew: it holds")


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_numbers_that_are_not_finite_are_computed_anew(tmp_path, caplog, number, place):
    file = tmp_path / "state.safetensors"
    state = make_state()
    state["move"].flat[place] = number
    save_state(file, state)
    assert load_state(file, SHAPES) is None
    assert_warns_once(caplog, "computed anew: 'move' holds numbers that are not finite")
    taken = load_state(file, SHAPES, may_be_infinite=["move"])
    assert (taken is None) == np.isnan(number)


def test_nan_is_found_wherever_it_is_in_an_array_that_is_large(tmp_path):
    array = np.zeros(2**20 + 5, dtype=np.float32)
    save_state(tmp_path / "state.safetensors", {"a": array})
    assert load_state(tmp_path / "state.safetensors", {}) is not None
    array[-1] = np.nan
    save_state(tmp_path / "state.safetensors", {"a": array})
    assert load_state(tmp_path / "state.safetensors", {}) is None


def test_a_folder_in_its_place_is_one_warning(tmp_path, caplog):
    (tmp_path / "state.safetensors").mkdir()
    assert load_state(tmp_path / "state.safetensors", SHAPES) is None
    save_state(tmp_path / "state.safetensors", make_state())
    assert_warns_once(caplog, "cannot be written")
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    (tmp_path / "file").touch()
    save_state(tmp_path / "file" / "state.safetensors", make_state())
    assert_warns_once(caplog, "cannot be written")


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "cache" / "state.safetensors").symlink_to(tmp_path / "elsewhere")
    save_state(tmp_path / "cache" / "state.safetensors", make_state())
    assert (tmp_path / "elsewhere").read_text() == "mine"
    assert load_state(tmp_path / "cache" / "state.safetensors", SHAPES) is not None


FULL_DISK = """
import os, resource, sys, numpy as np
from forvalue_callbacks.scores.cache import save_state
save_state(sys.argv[1], {"a": np.zeros(10)})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
save_state(sys.argv[1], {"a": np.zeros(10_000)})
"""


def test_a_full_disk_is_one_warning_and_what_was_there_stays(tmp_path):
    file = tmp_path / "state.safetensors"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(file)], capture_output=True, text=True, check=True)
    assert len(done.stderr.splitlines()) == 1
    assert "cannot be written, what it would keep is computed again next time" in done.stderr
    assert load_state(file, {"a": (10,)}) is not None
    assert os.listdir(tmp_path) == ["state.safetensors"]
