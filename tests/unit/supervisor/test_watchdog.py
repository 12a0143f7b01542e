"""Hung is: no progress past the phase's limit. Slow is not hung."""

from protocol.messages import Beat, Phase
from supervisor.watchdog import Watchdog

LIMITS = {
    Phase.STARTING: 60.0,
    Phase.LOAD: 300.0,
    Phase.IDLE: 30.0,
    Phase.PREFILL: 120.0,
    Phase.DECODE: 60.0,
}


def loaded() -> Watchdog:
    watchdog = Watchdog(LIMITS, 0.0)
    watchdog.enter(Phase.IDLE, 0.0)
    watchdog.observe(Beat(Phase.IDLE, 5, 0), 0.0)
    return watchdog


def test_a_worker_that_advances_is_never_hung() -> None:
    watchdog = loaded()
    for step in range(100):
        watchdog.observe(Beat(Phase.DECODE, step, 1), step * 59.0)
        assert watchdog.verdict(step * 59.0 + 58.0) is None


def test_frozen_progress_is_hung_though_it_beats() -> None:
    watchdog = loaded()
    for second in range(60):
        watchdog.observe(Beat(Phase.DECODE, 5, 1), float(second))
        assert watchdog.verdict(float(second)) is None
    assert "no progress in decode for 60 s" in (watchdog.verdict(60.0) or "")


def test_each_phase_has_its_limit() -> None:
    watchdog = loaded()
    watchdog.observe(Beat(Phase.PREFILL, 5, 1), 0.0)
    assert watchdog.verdict(119.0) is None
    assert watchdog.verdict(120.0) is not None


def test_an_idle_worker_only_has_to_beat() -> None:
    watchdog = loaded()
    for second in range(0, 1000, 20):
        watchdog.observe(Beat(Phase.IDLE, 5, 0), float(second))
        assert watchdog.verdict(second + 19.0) is None
    assert "no sign of life" in (watchdog.verdict(2000.0) or "")


def test_beats_that_stop_during_work_are_frozen_progress() -> None:
    watchdog = loaded()
    watchdog.observe(Beat(Phase.DECODE, 5, 1), 0.0)
    assert watchdog.verdict(61.0) is not None


def test_a_load_that_advances_may_take_for_ever() -> None:
    watchdog = Watchdog(LIMITS, 0.0)
    for step in range(100):
        watchdog.observe(Beat(Phase.LOAD, step, 0), step * 299.0)
        assert watchdog.verdict(step * 299.0 + 298.0) is None
    assert watchdog.verdict(1e6) is not None


def test_a_worker_that_never_says_hello_is_hung() -> None:
    watchdog = Watchdog(LIMITS, 0.0)
    assert watchdog.verdict(61.0) is not None


def test_a_beat_that_was_overtaken_by_a_message_does_not_turn_the_phase_back() -> None:
    watchdog = Watchdog(LIMITS, 0.0)
    watchdog.enter(Phase.LOAD, 1.0)
    watchdog.observe(Beat(Phase.STARTING, 0, 0), 2.0)
    phases = [watchdog.phase]
    watchdog.enter(Phase.IDLE, 3.0)
    watchdog.observe(Beat(Phase.LOAD, 9, 0), 4.0)
    phases.append(watchdog.phase)
    assert phases == [Phase.LOAD, Phase.IDLE]


def test_a_phase_told_by_a_message_counts_before_the_first_beat() -> None:
    watchdog = Watchdog(LIMITS, 0.0)
    watchdog.observe(Beat(Phase.LOAD, 1, 0), 0.0)
    watchdog.enter(Phase.IDLE, 10.0)
    assert watchdog.verdict(39.0) is None
    assert watchdog.verdict(40.0) is not None


def test_a_watcher_that_slept_starts_anew() -> None:
    watchdog = loaded()
    watchdog.observe(Beat(Phase.DECODE, 5, 1), 0.0)
    watchdog.forgive(1000.0)
    assert watchdog.verdict(1001.0) is None


def idle(watchdog: Watchdog, seconds: range, *, in_hand: bool = False) -> str | None:
    """Beats of an idle worker, and a look at each of these seconds; the last verdict."""
    verdict = None
    for second in seconds:
        watchdog.observe(Beat(Phase.IDLE, 5, 0), float(second))
        verdict = watchdog.verdict(float(second), in_hand=in_hand)
        if verdict is not None:
            break
    return verdict


def test_a_worker_that_beats_and_takes_nothing_up_is_hung() -> None:
    watchdog = loaded()
    assert idle(watchdog, range(0, 1000)) is None
    assert idle(watchdog, range(1000, 1120), in_hand=True) is None
    assert "not taken up for 120 s" in (idle(watchdog, range(1120, 1121), in_hand=True) or "")


def test_clients_that_give_up_do_not_hide_it() -> None:
    watchdog = loaded()
    watchdog.owes = True  # a request, and its cancellation a moment later
    assert idle(watchdog, range(0, 120)) is None
    assert idle(watchdog, range(120, 122)) is not None


def test_what_an_idle_worker_has_answered_it_owes_no_more() -> None:
    watchdog = loaded()
    watchdog.owes = True
    idle(watchdog, range(0, 100))
    watchdog.owes = False
    assert idle(watchdog, range(100, 1000)) is None
    watchdog.owes = True
    idle(watchdog, range(1000, 1100))
    watchdog.observe(Beat(Phase.IDLE, 6, 0), 1100.0)
    assert not watchdog.owes


def test_a_load_lasts_until_its_end_has_arrived() -> None:
    watchdog = Watchdog(LIMITS, 0.0)
    watchdog.enter(Phase.LOAD, 0.0)
    assert idle(watchdog, range(0, 299)) is None
    assert watchdog.phase is Phase.LOAD
    assert "no progress in load" in (idle(watchdog, range(299, 400)) or "")


def test_between_prefill_and_decode_only_progress_counts() -> None:
    """A request that comes turns decode into prefill, and moves nothing."""
    watchdog = loaded()
    watchdog.observe(Beat(Phase.DECODE, 5, 1), 0.0)
    for second in range(0, 119):
        phase = Phase.PREFILL if second % 50 else Phase.DECODE
        watchdog.observe(Beat(phase, 5, 1), float(second))
        if phase is Phase.PREFILL:
            assert watchdog.verdict(float(second)) is None
    assert watchdog.verdict(121.0) is not None
