"""A step's prompt tokens take seconds at most, whatever machine it is."""

import pytest

from worker.backends.prefill_pace import FEWEST_TOKENS, LONGEST_STEP_S, PrefillPace


def test_the_first_step_is_a_small_one() -> None:
    assert PrefillPace().fitting() == FEWEST_TOKENS


@pytest.mark.parametrize("tokens_per_s", [0.1, 1.0, 8.0, 50.0, 400.0, 50_000.0])
def test_no_step_takes_much_longer_than_the_limit_and_a_fast_machine_is_not_held_up(
    tokens_per_s: float,
) -> None:
    pace = PrefillPace()
    for _ in range(3):
        tokens = min(512, pace.fitting())
        pace.measured(tokens, tokens / tokens_per_s)
        assert tokens == FEWEST_TOKENS or tokens / tokens_per_s <= LONGEST_STEP_S
    assert pace.fitting() >= min(512, int(tokens_per_s * LONGEST_STEP_S) - 1)


def test_a_cold_start_is_forgotten_at_once_and_a_hiccup_soon() -> None:
    pace = PrefillPace()
    pace.measured(16, 30.0)  # the weights came from disk
    pace.measured(16, 0.016)
    assert pace.fitting() == 2000
    pace.measured(512, 5.12)
    assert pace.fitting() < 400
    pace.measured(400, 0.4)
    assert pace.fitting() == 2000


def test_a_few_tokens_at_the_end_of_a_prompt_say_nothing() -> None:
    pace = PrefillPace()
    pace.measured(512, 0.512)
    pace.measured(3, 0.1)
    assert pace.fitting() == 2000


def test_while_nothing_is_known_a_few_tokens_tell_something() -> None:
    pace = PrefillPace()
    pace.measured(3, 0.1)
    assert pace.fitting() == FEWEST_TOKENS
    pace.measured(6, 0.06)
    assert pace.fitting() == 200
