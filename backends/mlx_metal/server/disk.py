"""Conversations on disk: in blocks that they share, written by a thread, under a cap."""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xkv.backends.mlx_metal.server.disk_conversation import Conversation
from xkv.backends.mlx_metal.server.disk_folder import BLOCK, CONVERSATION, Folder, checksum
from xkv.backends.mlx_metal.server.disk_form import Apart, put_together
from xkv.errors import InputError

FORMAT = 1
"""Version of a conversation's file."""

_SHARE = 32
"""A conversation is read if that saves computing such a part of as many tokens: what all have in
common, the beginning of the chat template, is not worth it."""

_BROKEN = (InputError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError)
"""What reading something else than what was written can lead to."""


class _Job(NamedTuple):
    """A conversation to be written."""

    identity: str
    tokens: list[int]
    back_to: list[int] | None
    apart: Apart


class Disk:
    """The conversations in a folder, the least recently used ones deleted for others.

    A thread writes them, so that no answer waits for the disk. It reads memory that the arrays of
    :class:`Apart` keep; MLX itself is called in the thread that calls :meth:`load` alone.

    Args:
        path: The folder.
        limit_bytes: Most bytes of all files in it, at any time.

    Raises:
        InputError: If the folder cannot be used.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.n_hits = self.written_bytes = 0
        self._folder = Folder(path)
        self._lock = threading.RLock()
        self._known: dict[str, Conversation] = {}
        """By name, the least recently used first."""
        self._writing: set[str] = set()
        """Blocks of the conversation that is being written."""
        self._told: set[str] = set()
        """What need not be said again."""
        self._take_stock()
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._thread = threading.Thread(target=self._write_all, daemon=True)
        self._thread.start()

    def find(
        self, identity: str, tokens: Sequence[int], n_cached: int
    ) -> tuple[Conversation | None, int]:
        """The conversation that serves a prompt best, if it is worth reading.

        Args:
            identity: Of the model and the options.
            tokens: The prompt.
            n_cached: How many of them need no computing anyway.

        Returns:
            The conversation, and with how many of the tokens, not all, it can go on.
        """
        wanted, most = np.array(tokens, dtype=np.int64), len(tokens) - 1
        with self._lock:
            served = [(x.serves(identity, wanted, most), x) for x in self._known.values()]
        worth = [(n, x) for n, x in served if (n - n_cached) * _SHARE >= len(x.tokens)]
        # of two that serve as well, the one that is read faster
        n_tokens, best = max(worth, key=lambda y: (y[0], -y[1].nbytes), default=(0, None))
        return best, n_tokens

    def load(self, found: Conversation) -> list[Any] | None:
        """Its prompt cache; None if it is broken, and then deleted."""
        with self._lock:
            if found.name not in self._known:
                return None
            try:
                about = json.loads(self._folder.read(found.name))
                blocks = (self._folder.read(name) for name, _ in found.blocks)
                caches = put_together(about["form"], blocks)
            except _BROKEN as error:
                self.drop(found, error)
                return None
            self._use(found)
            self.n_hits += 1
            return caches

    def drop(self, found: Conversation, why: Exception | str) -> None:
        """Delete a conversation that cannot be used."""
        with self._lock:
            self._tell_broken(f"a conversation of {len(found.tokens)} tokens", why)
            for name in (found.name, *(name for name, _ in found.blocks)):
                if not self._folder.is_whole(name):
                    self._folder.remove(name)
            self._delete(found)

    def keep(
        self, identity: str, tokens: Sequence[int], back_to: list[int] | None, apart: Apart
    ) -> None:
        """Have a conversation written, soon."""
        self._jobs.put(_Job(identity, list(tokens), back_to, apart))

    def flush(self) -> None:
        """Wait until everything that was to be kept is written, and its memory let go."""
        self._jobs.join()

    def close(self) -> None:
        """Write what is to be written, and let others use the folder."""
        self._jobs.put(None)
        self._thread.join()
        self._folder.close()

    def report(self) -> dict[str, Any]:
        """Bytes and counts."""
        return {
            "conversations": len(self._known),
            "held_bytes": self._folder.nbytes,
            "limit_bytes": self.limit_bytes,
            "written_bytes": self.written_bytes,
            "hits": self.n_hits,
        }

    def tell(self, kind: str, text: str) -> None:
        """Say something of a kind that need not be said again."""
        if kind not in self._told:
            self._told.add(kind)
            logging.warning(text)

    def _tell_broken(self, what: str, why: Exception | str) -> None:
        is_sentence = isinstance(why, InputError | str)
        text = why if is_sentence else "its files are not as this version writes them"
        logging.warning(f"{what} is skipped: {text}")

    def _take_stock(self) -> None:
        """Read what there is, and delete what is of no use."""
        folder = self._folder
        for name in folder.left_over():
            folder.remove(name)
        names = [x for x in folder.sizes if x.endswith(CONVERSATION)]
        for name in sorted(names, key=folder.used):
            try:
                self._known[name] = self._read(name)
            except _BROKEN as error:
                self._tell_broken(f"a conversation in {folder.path}", error)
                folder.remove(name)
        self._delete_unused()
        self._make_room(0)

    def _read(self, name: str) -> Conversation:
        about = json.loads(self._folder.read(name))
        if about["format"] != FORMAT:
            raise InputError(f"it has format {about['format']}, and this version reads {FORMAT}")
        blocks = [(block, size) for block, size in about["blocks"]]
        for block, size in blocks:
            if self._folder.sizes.get(block) != size:
                raise InputError(f"{block} is missing or incomplete")
        tokens = np.array(about["tokens"], dtype=np.int64)
        return Conversation(name, about["identity"], tokens, about["back_to"], blocks)

    def _write_all(self) -> None:
        """What the thread does."""
        while (job := self._jobs.get()) is not None:
            try:
                self._write(job)
            except InputError as error:
                self.tell("unwritten", f"{error}; the server goes on, and says so only once")
            except Exception:
                # whoever waits for the thread would wait forever
                logging.exception("a conversation cannot be written")
            finally:
                del job
                with self._lock:
                    self._writing = set()
                    self._delete_unused()
                self._jobs.task_done()

    def _write(self, job: _Job) -> None:
        tokens = np.array(job.tokens, dtype=np.int64)
        if self._is_kept(job, tokens):
            return
        blocks = [(checksum(x) + BLOCK, sum(y.nbytes for y in x)) for x in job.apart.blocks()]
        about = {
            "format": FORMAT,
            "identity": job.identity,
            "tokens": job.tokens,
            "back_to": job.back_to,
            "blocks": blocks,
            "form": job.apart.form,
        }
        text = json.dumps(about).encode()
        if not self._reserve(dict(blocks), len(text)):
            return
        for (name, size), parts in zip(blocks, job.apart.blocks(), strict=True):
            if name not in self._folder.sizes:
                self._write_file(name, parts, size)
        name = checksum([text]) + CONVERSATION
        self._write_file(name, [text], len(text))
        made = Conversation(name, job.identity, tokens, job.back_to, blocks)
        with self._lock:
            self._told.discard("unwritten")
            self._known[name] = made
            for known in list(self._known.values()):
                if known is not made and made.replaces(known.identity, known.tokens):
                    self._delete(known)

    def _is_kept(self, job: _Job, tokens: np.ndarray) -> bool:
        """Whether what is there serves as well."""
        with self._lock:
            known = next(
                (x for x in self._known.values() if x.replaces(job.identity, tokens)), None
            )
            if known is not None:
                self._use(known)
        return known is not None

    def _write_file(self, name: str, parts: Sequence[Any], size: int) -> None:
        self._folder.write(name, parts, size)
        self.written_bytes += size

    def _reserve(self, blocks: dict[str, int], n_bytes: int) -> bool:
        """Whether there is room for a conversation; others are deleted before it is written."""
        whole = sum(blocks.values()) + n_bytes
        if whole > self.limit_bytes:
            self.tell(
                "large",
                f"a conversation of {whole / 1e6:.1f} MB is not written, as "
                f"--prompt-cache-disk-bytes allows {self.limit_bytes / 1e6:.1f} MB",
            )
            return False
        with self._lock:
            self._writing = set(blocks)
            there = self._folder.sizes
            needed = sum(size for name, size in blocks.items() if name not in there) + n_bytes
            if not self._make_room(needed):
                raise InputError(f"files in {self._folder.path} cannot be deleted")
        return True

    def _make_room(self, n_bytes: int) -> bool:
        """Delete the least recently used conversations; whether so many more bytes fit."""
        while self._folder.nbytes + n_bytes > self.limit_bytes and self._known:
            self._delete(next(iter(self._known.values())))
        return self._folder.nbytes + n_bytes <= self.limit_bytes

    def _use(self, known: Conversation) -> None:
        """Others are deleted before this one."""
        self._known[known.name] = self._known.pop(known.name)
        self._folder.use(known.name)

    def _delete(self, known: Conversation) -> None:
        self._known.pop(known.name, None)
        self._folder.remove(known.name)
        self._delete_unused()

    def _delete_unused(self) -> None:
        """Delete blocks that no conversation has."""
        used = {name for known in self._known.values() for name, _ in known.blocks}
        for name in [x for x in self._folder.sizes if x.endswith(BLOCK)]:
            if name not in used and name not in self._writing:
                self._folder.remove(name)
