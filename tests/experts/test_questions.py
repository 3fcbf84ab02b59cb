"""Questions to a peer, and answers that come twice, late or never."""

from __future__ import annotations

import pytest

from experts.channel.channel import ChannelClosed, ChannelTimeout
from experts.channel.questions import Questions


def test_the_first_answer_counts() -> None:
    questions = Questions[int]()

    def answered_and_then_lost(question: int) -> None:
        questions.answer(question, 1)
        questions.answer(question, 2)
        questions.fail_all(ChannelClosed("the line broke"))

    assert questions.ask(answered_and_then_lost, 5.0) == 1


def test_a_line_that_breaks_fails_what_is_open() -> None:
    questions = Questions[int]()
    with pytest.raises(ChannelClosed, match="the line broke"):
        questions.ask(lambda _: questions.fail_all(ChannelClosed("the line broke")), 5.0)


def test_an_answer_that_nobody_waits_for_is_ignored() -> None:
    questions, asked = Questions[int](), list[int]()
    with pytest.raises(ChannelTimeout, match="no answer within 0"):
        questions.ask(asked.append, 0.0)
    questions.answer(asked[0], 1)
