"""Notices of preemption: by signal, file and URL, before and during a run, and what they leave behind."""

from __future__ import annotations

import http.server
import os
import signal
import threading
import time

import pytest
import runs
from lives import contents, last_step, newest

from scjax.launch.codes import REQUEUE
from scjax.train.preemption import VARIABLE, Preemption

NOTICES = (signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers():
    """Those of this process are as they were, whatever a test leaves."""
    before = [signal.getsignal(number) for number in NOTICES]
    yield
    for number, handler in zip(NOTICES, before, strict=True):
        signal.signal(number, handler)


def reached(preemption, step, seconds=10.0):
    """Whether a notice from another thread arrives in time."""
    end = time.monotonic() + seconds
    while not preemption.reached(step) and time.monotonic() < end:
        time.sleep(0.01)
    return preemption.reached(step)


@pytest.mark.parametrize("number", NOTICES)
def test_a_signal_is_kept_for_the_next_step(number):
    with Preemption() as preemption:
        assert not preemption.reached(1)
        os.kill(os.getpid(), number)
        assert preemption.reached(2) and preemption.reached(2)
        os.kill(os.getpid(), number)  # schedulers tell twice
    os.kill(os.getpid(), number)  # nor does it spoil the exit code


def test_without_a_notice_nothing_changes():
    before = [signal.getsignal(number) for number in NOTICES]
    with Preemption() as preemption:
        assert not preemption.reached(1)
        assert all(signal.getsignal(number) not in before for number in NOTICES)
    assert [signal.getsignal(number) for number in NOTICES] == before


@pytest.mark.parametrize("number", NOTICES)
def test_before_the_first_step_it_leaves_at_once(number, capsys):
    with pytest.raises(SystemExit) as left, Preemption():
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert left.value.code == REQUEUE
    assert f"{number.name} before the first step" in capsys.readouterr().err


def test_ctrl_c_saves_and_the_second_stops(capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Preemption():
        os.kill(os.getpid(), signal.SIGINT)  # nothing to save yet
        time.sleep(10)
    with pytest.raises(KeyboardInterrupt), Preemption() as preemption:
        assert not preemption.reached(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.reached(2)
        assert "Ctrl-C: saving" in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    signal.signal(signal.SIGINT, before)


def test_a_file_gives_notice_by_being_there(tmp_path, monkeypatch):
    monkeypatch.setattr("scjax.train.preemption.POLL", 0.01)
    notice = tmp_path / "go"
    monkeypatch.setenv(VARIABLE, str(notice))
    with Preemption() as preemption:
        for step in range(5):
            assert not preemption.reached(step)
            time.sleep(0.02)
        notice.touch()
        assert reached(preemption, 6)


def test_a_url_gives_notice_by_its_answer(monkeypatch):
    """404 where there is none (Amazon), FALSE or NONE (Google), then another answer."""
    monkeypatch.setattr("scjax.train.preemption.POLL", 0.2)
    answers, asked = [(404, b""), (200, b"FALSE\n"), (200, b"NONE"), (200, b"TRUE")], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers["Metadata-Flavor"])
            status, body = answers[min(len(asked), len(answers)) - 1]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            with Preemption(f"http://localhost:{server.server_port}/preempted") as preemption:
                assert not preemption.reached(1)
                assert reached(preemption, 2)
        finally:
            server.shutdown()
    assert asked == ["Google"] * 4


def test_a_run_that_is_told_to_leave_goes_on_as_if_it_had_not_been(tmp_path):
    """In the middle of a line of metrics; the step at which it left is the one at which it goes on."""
    runs.build_corpus(tmp_path / "corpus")
    options = {"cache": tmp_path / "cache", "data__corpus": tmp_path / "corpus", "train__steps": 400,
               "train__log_every": 40, "train__eval_every": 100, "train__checkpoint_every": 400}  # fmt: skip
    whole, told = tmp_path / "whole", tmp_path / "told"
    runs.pretrain("tests/tiny_config.py", whole, **options)
    process = runs.start("tests/tiny_config.py", told, **options)
    while process.poll() is None and last_step(told) < 40:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == REQUEUE, runs.output_of(told).read_text()
    at = newest(told)
    assert f"told to leave: saving step {at}" in runs.output_of(told).read_text()
    assert f"steps {at} to 400" in runs.pretrain("tests/tiny_config.py", told, **options)
    assert runs.metrics(told) == runs.metrics(whole)
    assert contents(told, 400) == contents(whole, 400)
