"""Logs show the time left of long loops, and nothing for short ones."""

import re

from lina_jax import progress


def run_through():
    with progress.bar(4, name="images") as bar:
        for _ in range(2):
            bar.update(2)


def test_a_log_tells_the_time_that_is_left(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LOGGED_EVERY_S", 0.0)
    run_through()
    assert re.search(r"images: .* 2/4 \[\d+:\d+<\d+:\d+, .*(image/s|s/image)\]", capsys.readouterr().err)


def test_a_short_loop_says_nothing_in_a_log(capsys):
    run_through()
    assert capsys.readouterr().err == ""
