"""A run's folder damaged or incomplete: the same command repairs what it can, and names it."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from notus import start
from notus.card import card
from notus.engine.history import read_history
from notus.objective import cache_files
from notus.objective.cache_files import CacheFiles
from runs import base_config, checkpoints, metrics

STEPS = 3


@pytest.fixture(scope="module")
def ended(demo, tmp_path_factory) -> Path:
    """A run of three steps in a folder with its config.json; each step is saved."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ended")
    settings = base_config(demo)
    settings["train"] = {"pairs_per_step": 8, "max_steps": STEPS}
    settings["checkpoint"] = {"every": 1, "keep": 2}
    (folder / "config.json").write_text(json.dumps(settings | {"output_dir": "run"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(card, "find_spec", lambda name: None)
        assert train.main(["config.json"]) == 0
    return folder


@pytest.fixture
def run(ended, tmp_path, monkeypatch) -> Path:
    """A copy of that run to spoil, in the working directory."""
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(card, "find_spec", lambda name: None)  # figures take a while
    return Path("run")


def again(capfd, *overrides: str, code: int = 0) -> str:
    """The output of the same command; its exit code must be `code`."""
    capfd.readouterr()
    assert train.main(["config.json", *overrides]) == code
    return "".join(capfd.readouterr())


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


SPOILT_SETTINGS = {
    "flipped": lambda file: flip(file, 3),
    "another value": lambda file: file.write_text(
        file.read_text().replace('"beta": 0.1', '"beta": 0.3')
    ),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "deleted": Path.unlink,
    "another object": lambda file: file.write_text("{}"),
}


@pytest.mark.parametrize("ending", ["interrupted", "ended"])
@pytest.mark.parametrize("damage", SPOILT_SETTINGS)
def test_damaged_settings_are_restored_from_a_checkpoint(run, capfd, damage, ending):
    file = run / "config.json"
    before = file.read_text()
    if ending == "interrupted":
        shutil.rmtree(run / "final")
    SPOILT_SETTINGS[damage](file)
    assert file.exists() == (damage != "deleted") and (
        damage == "deleted" or file.read_text() != before
    )
    said = again(capfd)
    assert "config.json is damaged: restored from" in said and "step-00000003/state.json" in said
    assert file.read_text() == before and (run / "final/config.json").is_file()


def test_damaged_settings_do_not_hide_another_run(run, capfd):
    (run / "config.json").write_text("{")
    said = again(capfd, "loss.beta=0.5", code=2)
    assert "holds another run (loss.beta was 0.1 and is 0.5)" in said and "remove" not in said
    assert (run / "config.json").read_text() == "{"
    shutil.rmtree(run / "checkpoints")
    assert "remove" not in again(capfd, code=2)


def test_a_state_that_is_damaged_too_is_passed_over(run, capfd):
    (run / "config.json").write_text("{")
    flip(run / "checkpoints/step-00000003/state.json", 30)
    assert "restored from run/checkpoints/step-00000002/state.json" in again(capfd)


@pytest.mark.parametrize("link", [False, True])
def test_checkpoints_that_are_no_folder_are_refused(run, capfd, link):
    """Before any step: the run would start from its first step."""
    (run / "checkpoints").rename("elsewhere")
    if link:
        (run / "checkpoints").symlink_to("nowhere")
    else:
        (run / "checkpoints").touch()
    shutil.rmtree(run / "final")
    said = again(capfd, code=2)
    assert "error: run/checkpoints: found no folder, expected the run's checkpoints" in said
    (run / "checkpoints").unlink()
    Path("elsewhere").rename(run / "checkpoints")
    assert "resumed from run/checkpoints/step-00000003" in again(capfd)


@pytest.mark.parametrize("link", [False, True])
def test_a_checkpoint_that_is_no_folder_is_replaced(run, capfd, link):
    """A link is removed, and what it leads to is left alone."""
    shutil.rmtree(run / "final")
    newest = run / "checkpoints/step-00000003"
    newest.rename("elsewhere")
    if link:
        newest.symlink_to(Path("elsewhere").resolve())
        (newest / "state.json").unlink()
    else:
        newest.touch()
    said = again(capfd)
    assert "passed over the damaged checkpoint step-00000003" in said and "warning" not in said
    assert checkpoints(run) == ["step-00000002", "step-00000003"]
    assert not newest.is_symlink() and (newest / "state.json").is_file()
    assert Path("elsewhere/manifest.json").is_file()


def test_a_card_that_a_kill_prevented_is_written(run, capfd):
    """With the end, at the time when the model was written."""
    (run / "final/README.md").unlink()
    (run / "final/figures").mkdir(exist_ok=True)
    history = run / "history.jsonl"
    history.write_text(history.read_text().splitlines(keepends=True)[0])
    said = again(capfd)
    assert "nothing left to do" in said and "wrote run/final/README.md" in said
    start, end = read_history(run)
    assert end["event"] == "end" and start["time"] <= end["time"]
    assert "# run" in (run / "final/README.md").read_text()
    again(capfd)
    assert len(read_history(run)) == 2


def replace_by_link(final: Path) -> None:
    shutil.rmtree(final)
    final.symlink_to("/etc")


def replace_by_dangling_link(final: Path) -> None:
    shutil.rmtree(final)
    final.symlink_to("nowhere")


def replace_by_file(final: Path) -> None:
    shutil.rmtree(final)
    final.write_text("")


def replace_by_empty(final: Path) -> None:
    shutil.rmtree(final)
    final.mkdir()


WEIGHTS = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"
SPOILT_FINALS = {
    "link": replace_by_link,
    "dangling": replace_by_dangling_link,
    "file": replace_by_file,
    "empty": replace_by_empty,
    "no weights": lambda final: (final / WEIGHTS).unlink(),
    "half": lambda final: (final / WEIGHTS).write_bytes((final / WEIGHTS).read_bytes()[:9999]),
    "flipped": lambda final: flip(final / WEIGHTS, (final / WEIGHTS).stat().st_size - 9),
    "index": lambda final: flip(final / INDEX, 99),
    "no configuration": lambda final: (final / "config.json").unlink(),
}


@pytest.mark.parametrize("damage", SPOILT_FINALS)
def test_a_damaged_model_is_exported_again(ended, run, capfd, damage):
    expected = load_file(ended / "run/final" / WEIGHTS)
    SPOILT_FINALS[damage](run / "final")
    said = again(capfd)
    assert "run/final is damaged (" in said and "exported again" in said
    found = load_file(run / "final" / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (run / "final/README.md").is_file()
    assert metrics(run) == metrics(ended / "run")
    assert "nothing left to do" in again(capfd)


def test_files_that_are_not_weights_may_be_edited(run, capfd):
    """And a model whose manifest a kill prevented is judged by its sizes and headers."""
    tokenizer = run / "final/tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert "nothing left to do" in again(capfd)
    (run / "final/manifest.json").unlink()
    assert "nothing left to do" in again(capfd)


def test_a_damaged_model_without_checkpoints_is_left_alone(run, capfd):
    shutil.rmtree(run / "checkpoints")
    (run / "final" / WEIGHTS).unlink()
    said = again(capfd, code=2)
    assert "run/final is damaged (" in said and "no checkpoint is there to export it from" in said
    assert (run / "final/config.json").is_file()


def test_a_manifest_that_a_kill_prevented_is_written(run, capfd):
    """And what the kill has left half-written in final/ is removed, before its card is written."""
    manifest = run / "final/manifest.json"
    written = manifest.read_text()
    manifest.rename(run / "final/.partial-manifest.json")
    (run / "final/README.md").rename(run / "final/.partial-README.md")
    assert "nothing left to do" in again(capfd)
    assert manifest.read_text() == written and not list(run.rglob(".partial-*"))
    flip(run / "final" / WEIGHTS, 9999)
    assert "exported again" in again(capfd)


@pytest.mark.parametrize("ending", ["interrupted", "before the settings"])
def test_what_kills_have_left_half_written_is_removed(run, capfd, ending):
    """Of a save, or of an adapter that was being merged when there were no settings yet."""
    shutil.rmtree(run if ending == "before the settings" else run / "final")
    half = run / ".partial-0a1b2c3d-policy", run / "checkpoints/.partial-step-00000004"
    for folder in half[: 1 if ending == "before the settings" else 2]:
        folder.mkdir(parents=True)
        (folder / "weights").write_text("half")
    again(capfd)
    assert (run / "final/config.json").is_file() and not list(run.rglob(".partial-*"))


# Signals at other times than in the loop


def signalled(monkeypatch, module: object, name: str, number: int, call: int = 1) -> None:
    """The signal arrives just before the call of a function."""
    function, calls = getattr(module, name), iter(range(1, 99))

    def first(*arguments: object, **options: object) -> object:
        if next(calls) == call:
            signal.raise_signal(number)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, first)


@pytest.fixture
def fresh(run, monkeypatch) -> Path:
    """The same before its first start; the reference pass writes every 8 pairs."""
    shutil.rmtree(run)
    shutil.rmtree("reference-cache")
    monkeypatch.setattr(cache_files, "PART", 8)
    return run


def test_a_stop_in_the_reference_pass_keeps_its_parts(ended, fresh, capfd, monkeypatch):
    with monkeypatch.context() as patch:
        signalled(patch, CacheFiles, "append", signal.SIGTERM, call=2)
        said = again(capfd)
    assert "stopped by a signal before the first step" in said
    (parts,) = (fresh / "reference").iterdir()
    assert parts.suffix == ".parts" and parts.stat().st_size > 64
    assert [event["event"] for event in read_history(fresh)] == ["start", "end"]
    assert (fresh / "lock").read_text() == "" and not (fresh / "metrics.jsonl").exists()
    with monkeypatch.context() as patch:
        begun = []
        append = CacheFiles.append
        patch.setattr(CacheFiles, "append", lambda *a: (begun.append(a[1]), append(*a)))
        again(capfd)
    assert begun[0] == 16  # after two parts
    for one, other in zip(metrics(fresh), metrics(ended / "run"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)


@pytest.mark.parametrize("name", ["set_up", "load_policy"])
def test_a_stop_before_the_reference_pass(fresh, capfd, monkeypatch, name):
    module = {"set_up": start.build, "load_policy": start}[name]
    signalled(monkeypatch, module, name, signal.SIGTERM)
    assert "stopped by a signal before the first step" in again(capfd)
    assert not Path("reference-cache").exists() and not (fresh / "final").exists()


def test_a_save_that_was_asked_for_before_the_loop(fresh, capfd, monkeypatch):
    signalled(monkeypatch, start.build, "set_up", signal.SIGUSR1)
    again(capfd, "checkpoint.every=null", "checkpoint.keep=9")
    assert checkpoints(fresh) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_during_the_export(fresh, capfd, monkeypatch, number):
    signalled(monkeypatch, start, "export", number)
    again(capfd)
    assert (fresh / "final/README.md").is_file()
    assert read_history(fresh)[-1]["event"] == "end"
