"""The reference's log-probs on disk: their identity, the parts of a pass, and the audit."""

import errno
import fcntl
import json
import os
import shutil
from dataclasses import asdict, make_dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from conftest import random_pairs
from notus.data.packing import Rows
from notus.errors import UserError
from notus.objective import cache_files, turns
from notus.objective.cache_files import CacheFiles
from notus.objective.reference import OnlineReference
from notus.objective.reference_cache import audit_sample, cache_identity, cached_log_probs

CPU = torch.device("cpu")
REFERENCE = {"path": "somewhere", "sha256": "0" * 64}


class Counted(OnlineReference):
    """Records the pairs that it is asked for; killed at one of the calls, or of other weights."""

    def __init__(self, *arguments, killed_at=None, changed=lambda log_probs: log_probs):
        super().__init__(*arguments)
        self.calls, self.killed_at, self.changed = [], killed_at, changed

    def of_pairs(self, indices, *others):
        if len(self.calls) == self.killed_at:
            raise KeyboardInterrupt
        self.calls.append(list(indices))
        return self.changed(super().of_pairs(indices, *others))


def no_space(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def setting(group, tiny_model, tmp_path):
    """(folder, identity, the reference)."""
    pairs = random_pairs(30)
    identity = cache_identity(pairs, REFERENCE, tiny_model.shape, torch.float32)
    return tmp_path, identity, Counted(tiny_model, pairs, Rows(200, True, CPU))


def test_one_pass_then_only_a_sample(setting):
    folder, identity, online = setting
    first = cached_log_probs(folder, folder, identity, online)
    second = cached_log_probs(folder, folder, identity, online)
    assert online.calls == [list(range(30)), audit_sample(30).tolist()]
    assert len(online.calls[1]) == 1
    assert torch.equal(first, second) and (first < 0).all()


def test_another_reference_token_or_dtype_is_another_cache(setting, tiny_model):
    folder, identity, online = setting
    cached_log_probs(folder, folder, identity, online)
    pairs, changed = online.pairs, random_pairs(30)
    changed.tokens[5] += 1
    shape = tiny_model.shape
    for other in (
        cache_identity(pairs, {"sha256": "1" * 64}, shape, torch.float32),
        cache_identity(changed, REFERENCE, shape, torch.float32),
        cache_identity(pairs, REFERENCE, shape, torch.bfloat16),
        cache_identity(pairs, REFERENCE, shape, torch.float32, prefix_sharing=False),
        cache_identity(pairs, REFERENCE, replace(shape, rope_theta=5e5), torch.float32),
    ):
        online.calls.clear()
        cached_log_probs(folder, folder, other, online)
        assert online.calls == [list(range(30))]


@pytest.mark.parametrize(("value", "found"), [(False, True), (True, False)])
def test_a_shape_field_that_a_cache_lacks_has_its_default(
    setting, tiny_model, monkeypatch, value, found
):
    folder, identity, online = setting
    cached_log_probs(folder, folder, identity, online)
    shape = tiny_model.shape
    later = make_dataclass(
        "Later", [("sandwich_norm", bool, False)], bases=(type(shape),), frozen=True
    )
    monkeypatch.setattr(cache_files, "ModelShape", later)
    edited = later(**asdict(shape), sandwich_norm=value)
    online.calls.clear()
    other = cache_identity(online.pairs, REFERENCE, edited, torch.float32)
    cached_log_probs(folder, folder, other, online)
    assert online.calls == [audit_sample(30).tolist() if found else list(range(30))]


def test_a_cache_that_does_not_match_the_model_is_refused(setting):
    folder, identity, online = setting
    other = Counted(online.model, online.pairs, online.rows, changed=lambda x: x - 0.01)
    cached_log_probs(folder, folder, identity, other)
    (file,) = folder.glob("*.safetensors")
    with pytest.raises(UserError, match=f"{file.name}.*not those of.*0.01 per token"):
        cached_log_probs(folder, folder, identity, online)


def test_a_half_written_cache_is_computed_again(setting):
    folder, identity, online = setting
    first = cached_log_probs(folder, folder, identity, online)
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    again = cached_log_probs(folder, folder, identity, online)
    assert online.calls == [list(range(30))] * 2 and torch.equal(first, again)
    about = json.loads(file.with_suffix(".json").read_text())
    assert about["identity"] == identity and about["pairs"] == 30


@pytest.mark.parametrize("interrupted", [0, 2, 3])
@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_pass_is_resumed(setting, monkeypatch, interrupted, torn):
    """Parts of 8 of 30 pairs; killed during the third, or while its end was being written."""
    folder, identity, online = setting
    monkeypatch.setattr(cache_files, "PART", 8)
    whole = cached_log_probs(folder / "whole", folder / "whole", identity, online)
    parts = [[*range(0, 8)], [*range(8, 16)], [*range(16, 24)], [*range(24, 30)]]
    assert online.calls == parts
    shown = []

    def show(total, done):
        shown.append((total, done))
        return SimpleNamespace(update=shown.append, close=lambda: shown.append("closed"))

    killed = Counted(online.model, online.pairs, online.rows, killed_at=interrupted)
    online.calls.clear()
    with pytest.raises(KeyboardInterrupt):
        cached_log_probs(folder, folder, identity, killed)
    (file,) = folder.glob("*.parts")
    if torn and interrupted:
        with open(file, "r+b") as handle:
            handle.truncate(file.stat().st_size - 3)
    online.calls.clear()
    again = cached_log_probs(folder, folder, identity, online, show)
    kept = interrupted - (torn and interrupted > 0)
    audited = [audit_sample(8 * kept).tolist()] if kept else []
    assert online.calls == audited + parts[kept:] and torch.equal(again, whole)
    begun, *steps, end = shown
    assert (begun, end) == ((30, 8 * kept), "closed") and sum(steps) == 30 - 8 * kept
    assert not [*folder.glob("*.parts")]


def interrupted_pass(setting, monkeypatch, changed=lambda log_probs: log_probs):
    """The file of all parts of 8 pairs, killed before the cache was written."""
    folder, identity, online = setting
    monkeypatch.setattr(cache_files, "PART", 8)
    with monkeypatch.context() as refused:
        refused.setattr(CacheFiles, "write", no_space)
        with pytest.raises(UserError):
            other = Counted(online.model, online.pairs, online.rows, changed=changed)
            cached_log_probs(folder, folder, identity, other)
    (file,) = folder.glob("*.parts")
    return file


@pytest.mark.parametrize("damage", [4.0, 1.0 / 4.0, float("nan")])
def test_parts_that_do_not_match_the_model_are_refused(setting, monkeypatch, damage):
    """As when the code of the model was changed since."""
    folder, identity, online = setting
    file = interrupted_pass(setting, monkeypatch, lambda log_probs: log_probs * damage)
    with pytest.raises(UserError, match=f"{file.name}: the cached.*not those of"):
        cached_log_probs(folder, folder, identity, online)
    assert online.calls == [audit_sample(30).tolist()]


@pytest.mark.parametrize("pair", [0, 9, 29])
def test_damaged_parts_are_computed_again(setting, monkeypatch, pair):
    """The lowest bit of one value, which no audit sees; the parts before it are kept."""
    folder, identity, online = setting
    whole = cached_log_probs(folder / "whole", folder / "whole", identity, online)
    file = interrupted_pass(setting, monkeypatch)
    content = bytearray(file.read_bytes())
    content[4 * int(online.pairs.response_starts[pair]) + pair // 8 * cache_files.SEAL] ^= 1
    file.write_bytes(content)
    online.calls.clear()
    said = []
    assert torch.equal(cached_log_probs(folder, folder, identity, online, say=said.append), whole)
    kept = pair // 8 * 8
    assert online.calls[kept > 0 :][0][0] == kept
    assert said[0].startswith(f"{file}: incomplete or damaged after {kept} pairs")
    assert not [*folder.glob("*.parts")]


def test_parts_of_another_set_are_computed_again(setting, monkeypatch):
    folder, identity, online = setting
    file = interrupted_pass(setting, monkeypatch)
    other = identity | {"compute_dtype": "bfloat16"}
    file.rename(folder / CacheFiles(folder, folder, other, []).parts.name)
    online.calls.clear()
    cached_log_probs(folder, folder, other, online)
    assert online.calls[0] == [*range(8)]


@pytest.mark.parametrize("refused", ["read", "read_parts", "append", "write"])
def test_a_file_system_that_refuses_is_named(setting, monkeypatch, refused):
    folder, identity, online = setting
    monkeypatch.setattr(CacheFiles, refused, no_space)
    with pytest.raises(UserError, match=r"\.(parts|safetensors): cannot.*No space left on device"):
        cached_log_probs(folder, folder, identity, online)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9, 1.0])
def test_a_damaged_cache_is_named_and_computed_again(setting, place):
    """One bit, which no audit sees."""
    folder, identity, online = setting
    first = cached_log_probs(folder, folder, identity, online)
    (file,) = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)
    said = []
    assert torch.equal(cached_log_probs(folder, folder, identity, online, say=said.append), first)
    assert said == [f"{file}: incomplete or damaged; its log-probs are computed again"]
    assert online.calls == [list(range(30))] * 2
    cached_log_probs(folder, folder, identity, online)
    assert online.calls[2:] == [audit_sample(30).tolist()]


def test_a_cache_without_a_checksum_is_read_and_audited(setting):
    """As earlier versions wrote it."""
    folder, identity, online = setting
    cached_log_probs(folder, folder, identity, online)
    (file,) = folder.glob("*.json")
    about = json.loads(file.read_text())
    del about["sha256"]
    file.write_text(json.dumps(about))
    cached_log_probs(folder, folder, identity, online)
    assert online.calls == [list(range(30)), audit_sample(30).tolist()]
    file.with_suffix(".safetensors").write_bytes(b"torn")
    cached_log_probs(folder, folder, identity, online)
    assert online.calls[2:] == [list(range(30))]


@pytest.mark.parametrize("suffixes", [(".safetensors",), (".json",), (".safetensors", ".json")])
def test_exchanged_files_of_two_sets_are_noticed(setting, tiny_model, suffixes):
    """With both files exchanged, the names are wrong and the contents right."""
    folder, identity, online = setting
    pairs = random_pairs(20)
    held_out = Counted(tiny_model, pairs, online.rows)
    sets = [
        (identity, online),
        (cache_identity(pairs, REFERENCE, tiny_model.shape, torch.float32), held_out),
    ]
    first = [cached_log_probs(folder, folder, *one) for one in sets]
    for suffix in suffixes:
        one, two = sorted(folder.glob(f"*{suffix}"))
        contents = one.read_bytes(), two.read_bytes()
        one.write_bytes(contents[1]), two.write_bytes(contents[0])
    said = []
    again = [cached_log_probs(folder, folder, *one, say=said.append) for one in sets]
    assert all(map(torch.equal, again, first))
    assert any("damaged" in words for words in said) == (len(suffixes) == 1)


def test_leftovers_of_killed_passes_are_removed(setting, monkeypatch):
    folder, identity, online = setting
    folder.mkdir(exist_ok=True)
    for name in ("old.parts", ".partial-old.safetensors"):
        (folder / name).touch()
    cached_log_probs(folder, folder, identity, online)
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".safetensors"]
    (file,) = folder.glob("*.json")
    for suffix in (".parts", ".lock"):  # killed after the cache was written
        file.with_suffix(suffix).touch()
    cached_log_probs(folder, folder, identity, online)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_progress_is_shown_within_a_part(setting):
    """After every row of 200 slots."""
    folder, identity, online = setting
    shown = []
    bar = SimpleNamespace(update=shown.append, close=lambda: None)
    cached_log_probs(folder, folder, identity, online, show=lambda total, done: bar)
    assert len(shown) > 3 and sum(shown) == 30


def test_runs_share_a_folder(setting):
    """The second run's own folder stays empty; what another run has begun is left alone."""
    folder, identity, online = setting
    runs = [folder / "one", folder / "two"]
    (folder / "shared").mkdir()
    for name in ("other.parts", ".partial-other.safetensors-1", ".partial-other.json-2"):
        (folder / "shared" / name).touch()
    said = []
    found = [
        cached_log_probs(folder / "shared", own, identity, online, say=said.append) for own in runs
    ]
    assert torch.equal(*found)
    assert online.calls == [list(range(30)), audit_sample(30).tolist()]
    assert len(said) == 1 and ", no pass: " in said[0]
    assert not any(own.exists() for own in runs)
    kept = sorted(file.suffix for file in (folder / "shared").iterdir())
    assert kept == [".json", ".json-2", ".parts", ".safetensors", ".safetensors-1"]


def test_an_earlier_cache_in_the_own_folder_is_read(setting):
    folder, identity, online = setting
    first = cached_log_probs(folder / "run", folder / "run", identity, online)
    online.calls.clear()
    second = cached_log_probs(folder / "shared", folder / "run", identity, online)
    assert online.calls == [audit_sample(30).tolist()] and torch.equal(first, second)


def hold(folder, identity):
    """The lock of another run on the cache of this identity: its file, open."""
    folder.mkdir(exist_ok=True)
    file = CacheFiles(folder, folder, identity, []).path.with_suffix(".lock").open("w")
    file.write('{"pid": 7}')
    file.flush()
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_waits_for_another_that_computes_the_same(setting, monkeypatch, finished):
    """It reads the other's cache, or, when the other was killed, computes its own."""
    folder, identity, online = setting
    monkeypatch.setattr(turns, "WAIT", 0.0)
    cached_log_probs(folder / "made", folder, identity, online)
    online.calls.clear()
    other, said, checks = hold(folder / "shared", identity), [], []

    def check():
        checks.append(1)
        if len(checks) == 2:
            if finished:
                shutil.copytree(folder / "made", folder / "shared", dirs_exist_ok=True)
            other.close()

    arguments = folder / "shared", folder, identity, online
    cached_log_probs(*arguments, say=said.append, after_part=check)
    assert said[0].startswith('waiting for another run ({"pid": 7})')
    assert len(said) == 1 + finished
    assert online.calls == [audit_sample(30).tolist() if finished else list(range(30))]


def test_a_stop_while_waiting(setting, monkeypatch):
    folder, identity, online = setting
    monkeypatch.setattr(turns, "WAIT", 0.0)
    with hold(folder, identity), pytest.raises(KeyboardInterrupt):
        cached_log_probs(folder, folder, identity, online, after_part=interrupt)
    assert not online.calls and [file.suffix for file in folder.iterdir()] == [".lock"]


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("refused", ["open", "pwrite"])
def test_a_lock_that_cannot_be_made_is_in_nobodys_way(setting, monkeypatch, refused):
    """There is no room for it, or for the text in it."""
    folder, identity, online = setting
    plain = getattr(os, refused)

    def refuse(file, *others):
        if refused == "pwrite" or str(file).endswith(".lock"):
            no_space()
        return plain(file, *others)

    monkeypatch.setattr(turns.os, refused, refuse)
    found = cached_log_probs(folder, folder, identity, online)
    assert len(found) == online.pairs.response_starts[-1]
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_without_locks_every_run_computes_its_own(setting, monkeypatch):
    """Two that write the same cache at the same time leave a sound one."""
    folder, identity, online = setting

    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    write, found = cache_files.write_whole, []

    def write_twice(path, content, **options):
        monkeypatch.setattr(cache_files, "write_whole", write)
        rows = Rows(200, True, CPU)
        second = OnlineReference(online.model, online.pairs, rows)

        def both(partial):
            found.append(cached_log_probs(folder / "shared", folder / "two", identity, second))
            content(partial)

        write(path, both, **options)

    monkeypatch.setattr(cache_files, "write_whole", write_twice)
    found.append(cached_log_probs(folder / "shared", folder / "one", identity, online))
    assert len(found) == 2 and torch.equal(*found)
    online.calls.clear()
    cached_log_probs(folder / "shared", folder / "three", identity, online)
    assert online.calls == [audit_sample(30).tolist()]


def test_the_cache_has_the_permissions_of_any_new_file(setting):
    folder, identity, online = setting
    before = os.umask(0o022)
    try:
        cached_log_probs(folder, folder, identity, online)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}


@pytest.mark.parametrize("about", [b"\xff\xfe", b"[]", b"{", b"null", b"[" * 100_000])
def test_a_damaged_description_is_computed_again(setting, about):
    folder, identity, online = setting
    first = cached_log_probs(folder, folder, identity, online)
    (file,) = folder.glob("*.json")
    file.write_bytes(about)
    assert torch.equal(cached_log_probs(folder, folder, identity, online), first)
    assert online.calls == [list(range(30))] * 2
