"""A pool of several tasks with wrong answers, and what a choice from it is worth."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_core.instruction_mixture import LabelledPairs
from tda_core.selection_pools import TaskPool, chosen_rows, few_of_each, mean_precision, random_rows, task_pool
from tda_core.text_pairs import TextPairs


def labelled(n, n_tasks=2):
    pairs = TextPairs(tuple(f"ask {i}" for i in range(n)), tuple(f" answer {i // 2}" for i in range(n)))
    return LabelledPairs(pairs, torch.arange(n) % n_tasks, torch.arange(n))


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 40), st.integers(1, 2), st.floats(0, 0.99), st.integers(0, 5))
def test_a_share_of_each_task_has_another_answer_of_the_task(n, n_tasks, wrong, seed):
    train = labelled(n, n_tasks)
    pool = task_pool(train, wrong, seed=seed)
    assert pool.pairs.prompts == train.pairs.prompts
    for family in range(n_tasks):
        own = train.of_family(family).tolist()
        known = {train.pairs.responses[i] for i in own}
        assert sum(not pool.right[i] for i in own) == round(wrong * len(own))
        for i in own:
            assert (pool.pairs.responses[i] == train.pairs.responses[i]) == bool(pool.right[i])
            assert pool.pairs.responses[i] in known


def test_seeds_spoil_other_pairs():
    one, again, other = (task_pool(labelled(40), 0.5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.right, again.right) and one.pairs == again.pairs
    assert not torch.equal(one.right, other.right)


def test_choices_by_hand():
    right = torch.tensor([True, True, False, True])
    pool = TaskPool(labelled(4).pairs, torch.tensor([0, 1, 0, 0]), right)
    assert pool.of_task(0).tolist() == [True, False, False, True]
    assert sorted(pool.best(0, 2, seed=0).tolist()) == [0, 3]
    assert pool.share_right(torch.tensor([0, 1, 2, 3]), 0) == 0.5
    scores = torch.tensor([[9.0, 0, 8, 1], [1.0, 0, 2, 1], [0.0, 5, 0, 0]])  # two queries of task 0, one of task 1
    assert chosen_rows({"m": scores[:2]}, 2)["m"].tolist() == [0, 2]
    assert mean_precision(pool, scores, torch.tensor([0, 0, 1]), 1) == 1.0
    assert mean_precision(pool, scores, torch.tensor([0, 0, 1]), 2) == 0.5  # half of each


def test_random_rows_are_drawn_anew():
    rows = random_rows(30, 10, [0, 1, 0])
    assert list(rows) == ["random_0", "random_1", "random_2"]
    assert torch.equal(rows["random_0"], rows["random_2"]) and not torch.equal(rows["random_0"], rows["random_1"])
    assert len(rows["random_0"].unique()) == 10


def test_queries_of_each_task_in_order():
    few = few_of_each(labelled(12, 3), 2, skip=1)
    assert few.families.tolist() == [0, 0, 1, 1, 2, 2]
    assert few.questions.tolist() == [3, 6, 4, 7, 5, 8]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: task_pool(labelled(8), 1.0, seed=0), r"wrong must lie in \[0, 1\), got 1.0"),
        (lambda: task_pool(labelled(8), -0.1, seed=0), r"got -0.1"),
        (lambda: few_of_each(labelled(8), 4, skip=1), "task 0 has 4 queries, fewer than 5"),
        (lambda: task_pool(labelled(8), 0.5, seed=0).best(1, 3, seed=0), r"k must lie in 1\.\.2, .* task 1, got 3"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_task_with_one_answer_has_no_wrong_one():
    same = LabelledPairs(TextPairs(("a", "b"), (" x", " x")), torch.zeros(2, dtype=torch.int64), torch.arange(2))
    with pytest.raises(ValueError, match="all responses are equal"):
        task_pool(same, 0.5, seed=0)
