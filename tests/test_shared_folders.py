"""What somebody else may have put into a folder: links, pipes, devices, sparse files, names."""

import json
import os
import signal

import pytest
import torch
import zoo
from store_torture import data_set, fill

import lddyn
from lddyn.data.read import rows
from lddyn.errors import ExampleError
from lddyn.files import append_text
from lddyn.loading import check_indices
from lddyn.report import write_dynamics
from lddyn.settings import TrainerSettings
from lddyn.steps.folder import write_steps

HUGE = 40 * 2**30


def sparse(path):
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        file.truncate(HUGE)


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


PLANTED = {"a pipe": pipe, "a device": device, "a sparse file": sparse}


@pytest.fixture(autouse=True)
def _soon():
    """No test may wait for a pipe, nor read 40 GiB."""

    def late(*_):
        raise TimeoutError("it waits or reads for more than 20 seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.case("shared folders: pipes, devices and sparse files")
@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("name", ["manifest.json", "journal.jsonl", "shard-000000.safetensors"])
def test_a_store_refuses_what_is_no_file_of_it(tmp_path, name, kind):
    store = fill(tmp_path / "s", data_set(2), 6, 2**20)
    written = store.rows().clone()
    store.close()
    PLANTED[kind](store.path / name)
    if (name, kind) == ("journal.jsonl", "a sparse file"):  # as after a loss of power
        assert torch.equal(lddyn.Store.open(store.path).rows(), written)
        return
    with pytest.raises(lddyn.StoreError, match=name):
        lddyn.Store.open(store.path).rows()


@pytest.mark.parametrize("kind", PLANTED)
def test_a_store_refuses_an_unlisted_shard_that_is_none(tmp_path, kind):
    store = fill(tmp_path / "s", data_set(2), 6, 2**20)
    store.close()
    PLANTED[kind](store.path / f"shard-{store.n_shards:06d}.safetensors")
    with pytest.raises(lddyn.StoreError, match=f"shard-{store.n_shards:06d}"):
        lddyn.Store.open(store.path)


@pytest.mark.parametrize("kind", PLANTED)
def test_a_saved_result_refuses_what_is_no_file_of_it(tmp_path, kind):
    estimate = lddyn.Estimate(torch.ones(3), torch.ones(3))
    for ending in ("json", "safetensors"):
        estimate.save(tmp_path / "e")
        PLANTED[kind](next(tmp_path.glob(f"e*.{ending}")))
        with pytest.raises(ValueError, match=r"e: cannot be read as lddyn\.Estimate"):
            lddyn.Estimate.load(tmp_path / "e")
        for path in tmp_path.glob("e*"):
            path.unlink()


def test_a_result_is_saved_over_a_pipe_and_not_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("untouched")
    estimate = lddyn.Estimate(torch.ones(3), torch.ones(3))
    pipe(tmp_path / "e.json")
    (tmp_path / "e.json.tmp").symlink_to(tmp_path / "victim")
    estimate.save(tmp_path / "e")
    (tmp_path / "e.json").unlink()
    (tmp_path / "e.json").symlink_to(tmp_path / "victim")
    estimate.save(tmp_path / "e")
    assert torch.equal(lddyn.Estimate.load(tmp_path / "e").value, estimate.value)
    assert (tmp_path / "victim").read_text() == "untouched"


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt", "parquet", "arrow", "json"])
def test_rows_are_read_from_files_alone(tmp_path, ending, kind, monkeypatch):
    monkeypatch.setattr("lddyn.data.read._LONGEST_LINE", 1 << 20)
    path = tmp_path / f"rows.{ending}"
    PLANTED[kind](path)
    with pytest.raises(ExampleError, match=str(path)):
        rows(path)


def test_a_line_that_does_not_end_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("lddyn.data.read._LONGEST_LINE", 1 << 20)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')
    os.truncate(path, HUGE)
    with pytest.raises(ExampleError, match=r"rows\.jsonl, line 2: longer than"):
        rows(path)


@pytest.mark.parametrize("kind", PLANTED)
def test_a_trainer_s_file_is_a_file(tmp_path, kind):
    path = tmp_path / "args.yaml"
    PLANTED[kind](path)
    with pytest.raises(ValueError, match=str(path)):
        TrainerSettings.of(path)


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/passwd", "", "a/b", 3])
def test_an_index_of_weights_stays_in_its_folder(tmp_path, place):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": place}}))
    with pytest.raises(ValueError, match=str(index)):
        check_indices(tmp_path)
    index.write_text(json.dumps({"weight_map": {"w": "model-00001-of-00002.safetensors"}}))
    check_indices(tmp_path)


@pytest.mark.parametrize("name", ["..", ".", "../x", "/x", "a/b", "a\\b", "a\0b"])
def test_names_of_steps_stay_in_their_folder(tmp_path, name):
    with pytest.raises(ValueError, match="the name of a step"):
        write_steps(tmp_path / "out", {name: None}, {}, title="x")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- links


@pytest.mark.case("shared folders: hard links")
@pytest.mark.parametrize("name", ["journal.jsonl", "lock"])
def test_a_store_does_not_write_a_file_of_several_names(tmp_path, name):
    """It could be somebody else's file, or one that a backup of hard links has."""
    store = fill(tmp_path / "s", data_set(2), 6, 2**20)
    store.close()
    kept, place = tmp_path / "kept", store.path / name
    os.link(place, kept)
    before = kept.read_bytes()
    with pytest.raises(lddyn.StoreError, match=rf"{name}.*has 2 names \(hard links\)"):
        fill(tmp_path / "s", data_set(200), 6, 2**20)
    assert kept.read_bytes() == before
    kept.unlink()
    fill(tmp_path / "s", data_set(200), 6, 2**20).close()


def test_a_watched_run_does_not_append_to_a_file_of_several_names(tmp_path):
    path, kept = tmp_path / "dynamics.jsonl", tmp_path / "kept"
    append_text(path, "a\n")
    os.link(path, kept)
    with pytest.raises(ValueError, match=rf"{path}: has 2 names"):
        append_text(path, "b\n")
    assert kept.read_text() == "a\n"


LINKS = {
    "symbolic": lambda new, old: new.symlink_to(old),
    "hard": lambda new, old: os.link(old, new),
}


@pytest.mark.case("shared folders: links at names of pictures, tables and pages")
@pytest.mark.parametrize("kind", LINKS)
def test_pictures_tables_and_pages_are_not_written_through_links(tmp_path, kind):
    from matplotlib.figure import Figure

    from lddyn.lab.record import Lab
    from lddyn.sets.filter import Filtered

    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("untouched")
    lab = Lab("x", out, 0, {})
    lab.path("begun")
    names = ["tables/t.json", "tables/t.parquet", "figures/f.png", "figures/f.pdf", "index.html"]
    names += ["results.json", "kept.jsonl", "dropped.jsonl"]
    for name in names:
        for path in (out / name, out / f"{name}.tmp"):
            path.parent.mkdir(parents=True, exist_ok=True)
            LINKS[kind](path, victim)
    lab.table("t", [{"a": 1.0}])
    lab.figure("f", Figure((1, 1)))
    lab.finish([], [])
    Filtered([{}], [0], [], [], 0).write(out)
    write_dynamics([{"step": 0.0, "change/a": 0.0}] * 2, out / "index.html")
    assert victim.read_text() == "untouched"
    written = [out / name for name in names if (out / name).exists()]
    assert len(written) >= len(names) - 1  # without pyarrow no parquet
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in written)


@pytest.mark.case("shared folders: linked folders inside of a result")
def test_results_are_not_written_into_linked_folders(tmp_path):
    from lddyn.lab.record import Lab

    (tmp_path / "other").mkdir()
    out = tmp_path / "out"
    lab = Lab("x", out, 0, {})
    lab.path("begun")
    for name in ("tables", "step"):
        (out / name).symlink_to(tmp_path / "other")
    (out / "steps").symlink_to(tmp_path / "absent")
    with pytest.raises(ValueError, match=f"{out / 'tables'}: is a link"):
        lab.table("t", [])
    with pytest.raises(ValueError, match=f"{out / 'steps'}: is a link"):
        lab.path("steps", "a.json")
    observed, updated = zoo.examples()
    step = lddyn.decompose(
        zoo.build("llama", num_hidden_layers=1), observed, lddyn.SFT(updated), 1e-3
    )
    with pytest.raises(ValueError, match=f"{out / 'step'}: is a link"):
        write_steps(out, {"step": step}, {}, title="x")
    assert not list((tmp_path / "other").iterdir()) and not (tmp_path / "absent").exists()
