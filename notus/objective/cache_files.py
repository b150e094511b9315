"""The files of one cache of log-probs: the complete one, and the parts of an unfinished pass.

`<key>.safetensors` holds the log-probs, `<key>.json` their identity and the SHA-256 of that file;
the key is a hash of the identity. `<key>.parts` grows by a part at a time. A file that is not the
one written is named and computed again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from notus.files import PARTIAL, write_json, write_whole
from notus.model.hf_config import ModelShape

PART = 4096  # pairs scored between two writes to disk: minutes of a 7B model on one GPU
SEAL = 32  # bytes
UNREADABLE = FileNotFoundError, SafetensorError, ValueError, KeyError, TypeError, RecursionError


class CacheFiles:
    """The cache of one identity on disk, for one process only. Methods raise OSError.

    folder: of caches, which runs share. own: the run's own, in which earlier versions kept their
    caches, and which has the parts of an unfinished pass. starts: int64 [pairs + 1], see
    `TokenizedPairs.response_starts`.
    """

    def __init__(
        self, folder: Path, own: Path, identity: Mapping[str, Any], starts: np.ndarray
    ) -> None:
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.folder, self.own, self.identity, self.starts = folder, own, identity, starts
        self.path, self.parts = folder / f"{key}.safetensors", own / f"{key}.parts"

    def read(self, say: Callable[[str], object]) -> tuple[Path, Tensor] | None:
        """The file of a sound cache with this identity and its log-probs; None if there is none.

        say: prints a line for each file that is damaged. A shape field that a recorded identity
        lacks, because it was added since, has its default.
        """
        defaults = {f.name: f.default for f in fields(ModelShape) if f.default is not MISSING}
        there = self.path.exists() or self.path.with_suffix(".json").exists()
        unusable = {self.path} if there else set()
        folders = dict.fromkeys((self.folder, self.own))
        for description in (file for each in folders for file in sorted(each.glob("[!.]*.json"))):
            path = description.with_suffix(".safetensors")
            try:
                about = json.loads(description.read_bytes())
                shape = defaults | about["identity"]["reference_shape"]
                if about["identity"] | {"reference_shape": shape} != self.identity:
                    continue
                unusable.add(path)
                content = path.read_bytes()
                # Earlier versions recorded no checksum; their caches are audited like all others.
                if about.get("sha256") not in (None, hashlib.sha256(content).hexdigest()):
                    continue
                log_probs = load(content)["log_probs"]
            except UNREADABLE:
                continue
            if log_probs.shape == (int(self.starts[-1]),):
                _tidy(self.own, self.own.glob(self.parts.name))  # killed before `write` did
                with suppress(OSError):  # or before the turn ended; the cache may be others'
                    path.with_suffix(".lock").unlink()
                return path, log_probs
        for path in sorted(unusable):
            say(f"{path}: incomplete or damaged; its log-probs are computed again")
        return None

    def write(self, flat: Tensor, alone: bool) -> None:
        """Write the cache, and remove what interrupted passes have left.

        alone: whether no other run writes this cache at the same time.
        """
        path = self.path
        content = save({"log_probs": flat.cpu(), "starts": torch.from_numpy(self.starts)})
        write_whole(path, lambda partial: partial.write_bytes(content), durable=True, shared=True)
        about = {
            "identity": self.identity,
            "pairs": len(self.starts) - 1,
            "response_tokens": len(flat),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        write_json(path.with_suffix(".json"), about, durable=True, shared=True)
        if alone:
            _tidy(self.folder, self.folder.glob(f"{PARTIAL}{path.stem}*"))
        _tidy(self.own, (*self.own.glob("*.parts"), *self.own.glob(f"{PARTIAL}*")))

    def read_parts(self, say: Callable[[str], object]) -> tuple[int, np.ndarray]:
        """The number of pairs in the parts, and their log-probs: float32. Makes the file if absent.

        Each part is plain float32, followed by its `_seal`. The file is cut to complete, sound
        parts: on the same number of ranks, the remaining pairs then share rows as in an
        uninterrupted pass.
        """
        self.own.mkdir(parents=True, exist_ok=True)
        self.parts.touch()
        content, sound, done, end = self.parts.read_bytes(), [], 0, 0
        while end < len(content) and (pairs := self.part_from(done)):
            size = 4 * int(self.starts[pairs.stop] - self.starts[done])
            part, seal = content[end : end + size], content[end + size : end + size + SEAL]
            if seal != self._seal(done, part):
                break
            sound.append(part)
            done, end = pairs.stop, end + size + SEAL
        if end < len(content):
            found = f"{self.parts}: incomplete or damaged after {done:,} pairs"
            say(f"{found}; the others are computed again")
            os.truncate(self.parts, end)
        return done, np.frombuffer(bytearray().join(sound), np.float32)

    def part_from(self, begin: int) -> range:
        """The pairs of the part that begins with the pair `begin`; empty after the last one."""
        return range(begin, min(begin + PART, len(self.starts) - 1))

    def append(self, begin: int, log_probs: Tensor) -> None:
        """Add the part of the pairs from `begin` on to the file, and to the disk."""
        part = log_probs.cpu().numpy().tobytes()
        with open(self.parts, "ab") as handle:
            handle.write(part + self._seal(begin, part))
            handle.flush()
            os.fsync(handle.fileno())

    def _seal(self, begin: int, part: bytes) -> bytes:
        """The SHA-256 of key, first pair and contents: a part's place cannot change unnoticed."""
        return hashlib.sha256(f"{self.parts.stem} {begin} ".encode() + part).digest()


def _tidy(folder: Path, left: Iterable[Path]) -> None:
    """Remove files of a folder, and then the folder if it is empty."""
    for file in left:
        file.unlink()
    with suppress(OSError):
        folder.rmdir()
