from worker.backends.draws import position_seed


def test_the_seeds_of_an_answer_are_splitmix64() -> None:
    assert [position_seed(0, position) for position in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_any_integer_is_a_seed() -> None:
    for seed in (-1, 2**64, 2**70):
        assert 0 <= position_seed(seed, 0) < 2**64
    assert position_seed(-1, 0) != position_seed(0, 0)
