"""The journal of changes: whole records or none, the same for all that read it."""

import errno
import json
import multiprocessing
import os
import signal
import threading

import pytest

from mobula.cancellation import Cancelled, cancellable
from mobula.errors import ArtifactError
from mobula.serving.errors import RequestRefused
from mobula.serving.journal import VOID, Journal, Record


def step(state, record):
    if "refused" in record.items:
        raise ValueError("refused")
    return (*state, *record.items)


def journal(tmp_path):
    return Journal(tmp_path / "changes.jsonl", (), step)


def record(*items):
    return Record("add", list(items), "2026-01-01T00:00:00+00:00")


def read_anew(tmp_path):
    fresh = journal(tmp_path)
    fresh.catch_up()
    return fresh.state


def test_records_reach_every_reader_in_order(tmp_path):
    first, second = journal(tmp_path), journal(tmp_path)
    assert first.append(record("a", "b")) == first.state == ("a", "b")
    assert second.behind() and not first.behind()
    assert second.append(record("c")) == ("a", "b", "c")
    first.catch_up()
    assert first.state == second.state == read_anew(tmp_path) == ("a", "b", "c")
    assert not first.behind() and not second.behind()


def test_what_cannot_be_applied_is_not_written(tmp_path):
    one = journal(tmp_path)
    one.append(record("a"))
    with pytest.raises(ValueError, match="refused"):
        one.append(record("refused"))
    with cancellable(lambda: True), pytest.raises(Cancelled):
        one.append(record("b"))
    assert one.state == read_anew(tmp_path) == ("a",) and one.damage is None


def test_state_is_finished_before_it_is_shown_and_once_for_many_records(tmp_path):
    writer, finished = journal(tmp_path), []
    for item in "abc":
        writer.append(record(item))
    reader = Journal(tmp_path / "changes.jsonl", (), step, finish=lambda state: finished.append((state, reader.state)))
    reader.catch_up()
    assert finished == [(("a", "b", "c"), ())]
    reader.append(record("d"))
    assert finished[1] == (("a", "b", "c", "d"), ("a", "b", "c"))


@pytest.mark.parametrize("cut", [1, 20])
def test_torn_last_line_is_dropped(tmp_path, cut):
    running = journal(tmp_path)
    running.append(record("a"))
    whole = running.path.read_bytes()
    with running.path.open("ab") as stream:
        stream.write(whole[:-cut])  # also without the line break alone
    running.catch_up()
    assert running.state == read_anew(tmp_path) == ("a",)
    assert not running.behind()
    writer = journal(tmp_path)
    writer.append(record("b"))
    running.catch_up()
    assert running.state == writer.state == read_anew(tmp_path) == ("a", "b")
    assert running.path.read_bytes().startswith(whole + whole[:-cut] + VOID)


def killed(path, where):
    """Append to a journal and be killed on the way."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    one = Journal(path, (), step)
    if where == "before":
        one.finish = die
    elif where == "after":
        os.fsync = die
    else:
        one._write = lambda stream, line: (stream.write(line[: len(line) // 2]), die())
    one.append(record("k" * 200_000))


@pytest.mark.parametrize(("where", "kept"), [("before", 0), ("middle", 0), ("after", 1)])
def test_killed_writer_leaves_a_whole_record_or_none(tmp_path, where, kept):
    survivor = journal(tmp_path)
    survivor.append(record("a"))
    process = multiprocessing.get_context("fork").Process(target=killed, args=(survivor.path, where))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    # Its lock is gone with it.
    survivor.append(record("b"))
    assert [len(item) for item in survivor.state] == [1] + [200_000] * kept + [1]
    assert read_anew(tmp_path) == survivor.state


def test_writers_take_turns(tmp_path):
    journals = [journal(tmp_path) for _ in range(4)]

    def write(number):
        for turn in range(10):
            journals[number].append(record(f"{number}/{turn}"))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = read_anew(tmp_path)
    assert sorted(state) == sorted(f"{number}/{turn}" for number in range(4) for turn in range(10))
    for number, one in enumerate(journals):
        one.catch_up()
        assert one.state == state
        assert [item for item in state if item[0] == str(number)] == [f"{number}/{turn}" for turn in range(10)]


def test_full_disk_is_a_refusal_and_changes_nothing(tmp_path):
    (tmp_path / "changes.jsonl").symlink_to("/dev/full")
    one = journal(tmp_path)
    with pytest.raises(RequestRefused, match="No space left on device") as refusal:
        one.append(record("a"))
    assert (refusal.value.status, refusal.value.code) == (507, "not_kept")
    assert one.state == () and one.damage is None


def test_write_that_ends_in_the_middle_is_a_refusal_and_the_next_one_counts(tmp_path):
    one, other = journal(tmp_path), journal(tmp_path)

    class Full:
        def __init__(self, stream):
            self.stream, self.room = stream, 10

        def write(self, data):
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written, self.room = self.stream.write(data[: self.room]), 0
            return written

        def fileno(self):
            return self.stream.fileno()

    write = one._write
    one._write = lambda stream, line: write(Full(stream), line)
    for _ in range(2):
        with pytest.raises(RequestRefused):
            one.append(record("a"))
    one._write = write
    other.append(record("b"))
    assert one.append(record("c")) == read_anew(tmp_path) == ("b", "c")


def test_record_of_which_nobody_knows_whether_it_is_kept_is_damage(tmp_path, monkeypatch):
    one = journal(tmp_path)

    def fails(_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched, pytest.raises(ArtifactError, match="kept or not"):
        patched.setattr(os, "fsync", fails)
        one.append(record("a"))
    with pytest.raises(ArtifactError, match="kept or not"):
        one.append(record("b"))
    assert one.damage is not None and one.state == ()
    assert read_anew(tmp_path) == ("a",)


def test_journal_that_shrinks_is_damage(tmp_path):
    one = journal(tmp_path)
    one.append(record("a"))
    os.truncate(one.path, 3)
    assert one.behind()
    with pytest.raises(ArtifactError, match="was shortened"):
        one.catch_up()
    assert one.damage is not None and not one.behind()


def test_no_record_looks_like_a_void_line():
    assert not Record("remove", ["\x18"], None).line().endswith(VOID)
    assert json.loads(Record("remove", ["\x18", "é\u2028"], None).line())["items"] == ["\x18", "é\u2028"]
    assert Record("remove", ["\x18", "é\u2028"], None).line().count(b"\n") == 1
