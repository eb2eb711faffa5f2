import numpy as np
import pytest

from reports.design import Clusters


def clusters(sums: list[float], sizes: list[int]) -> Clusters:
    one = np.array(sums, dtype=np.float64)
    return Clusters(one, one, np.array(sizes, dtype=np.float64))


def test_single_questions_are_worth_what_they_are() -> None:
    assert clusters([1, 0, 0, 1], [1, 1, 1, 1]).effective_size(0.95) == 4


def test_copies_of_a_picture_are_worth_one() -> None:
    found = clusters([4] * 20 + [0] * 80, [4] * 100)
    assert found.n == 400
    assert 80 < found.effective_size(0.95) <= 101


def test_independent_questions_about_one_picture_lose_little() -> None:
    rng = np.random.default_rng(2)
    found = clusters(rng.binomial(4, 0.3, 400).tolist(), [4] * 400)
    assert 1_200 < found.effective_size(0.95) <= 1_600


@pytest.mark.parametrize("sums", [[0] * 30, [2] * 30, [0] * 28 + [1, 1]])
def test_where_nothing_varies_questions_are_taken_as_copies(sums: list[int]) -> None:
    found = clusters(sums, [2] * 30)
    assert found.effective_size(0.95) == found.least == 30


def test_unequal_pictures_are_worth_fewer_than_they_are() -> None:
    assert clusters([0] * 10, [1] * 9 + [11]).least == pytest.approx(400 / 130)


def test_values_are_summed_by_image() -> None:
    found = Clusters.of(np.array([1.0, 0.0, -1.0]), ["b", "a", "b"])
    assert found.sums.tolist() == [0, 0]
    assert found.squares.tolist() == [0, 2]
    assert found.sizes.tolist() == [1, 2]


def test_a_change_and_its_reverse_in_one_picture_are_no_agreement() -> None:
    together = Clusters.of(np.array([1.0, 1.0] * 40), [f"i{n // 2}" for n in range(80)])
    apart = Clusters.of(np.array([1.0, -1.0] * 40), [f"i{n // 2}" for n in range(80)])
    assert together.effective_size(0.95) == 40
    assert apart.effective_size(0.95) > 70


def test_one_picture_has_no_error() -> None:
    assert clusters([3], [5]).error == float("inf")
    assert clusters([3], [5]).effective_size(0.95) == 1
