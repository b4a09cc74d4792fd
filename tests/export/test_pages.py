"""Pages are shared by texts that begin alike, and by nobody else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flows.export.shipped.pages import PagePool

PAGE = 4


def test_a_text_that_begins_like_another_reads_its_pages() -> None:
    pool = PagePool(10, PAGE)
    prompt = list(range(10))
    pages, computed = pool.reserve(prompt, 12) or ([], -1)
    assert (len(pages), computed) == (3, 0)
    same, computed = pool.reserve(prompt, 12) or ([], -1)
    assert computed == 0, "nobody has computed them yet"
    pool.remember(prompt, pages)
    other, computed = pool.reserve([*prompt[:8], 77], 12) or ([], -1)
    assert (other[:2], computed) == (pages[:2], 8)
    assert not set(other[2:]) & {*pages, *same}
    for reserved in (pages, same, other):
        pool.release(reserved)
    assert pool.used == 0
    again, computed = pool.reserve(prompt, 12) or ([], -1)
    assert (again[:2], computed) == (pages[:2], 8), "pages that nobody uses keep what they hold"


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    pool = PagePool(10, PAGE)
    prompt = list(range(8))
    pages, _ = pool.reserve(prompt, 8) or ([], -1)
    pool.remember(prompt, pages)
    assert (pool.reserve(prompt, 8) or ([], -1))[1] == 4


def test_a_text_waits_until_all_its_pages_are_there() -> None:
    pool = PagePool(4, PAGE)
    first, _ = pool.reserve([1] * 8, 12) or ([], -1)
    pool.remember([1] * 8, first)
    assert pool.reserve([2] * 4, 8) is None
    assert pool.used == 3
    pool.release(first)
    second, computed = pool.reserve([2] * 4, 16) or ([], -1)
    assert (sorted(second), computed) == ([0, 1, 2, 3], 0)
    pool.release(second)
    assert (pool.reserve([1] * 8, 8) or ([], -1))[1] == 0, "what others have taken is forgotten"


def test_pages_whose_keys_and_values_are_lost_are_shared_by_nobody() -> None:
    pool = PagePool(5, PAGE)
    prompts = [[number] * 8 for number in (1, 2)]
    idle, used = (pool.reserve(prompt, 8) or ([], -1) for prompt in prompts)
    for prompt, (pages, _) in zip(prompts, (idle, used), strict=True):
        pool.remember(prompt, pages)
    pool.release(idle[0])
    pool.forget()
    assert pool.used == 2
    for prompt in prompts:
        pages, computed = pool.reserve(prompt, 4) or ([], -1)
        assert computed == 0
        pool.release(pages)
    pool.release(used[0])
    assert len((pool.reserve([3] * 20, 20) or ([], -1))[0]) == 5, "no page is lost"


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=14), st.integers(0, 9)), max_size=40))
def test_no_page_is_lost_and_none_is_shared_by_different_beginnings(texts: list[tuple[list[int], int]]) -> None:
    pool = PagePool(8, PAGE)
    running: list[tuple[list[int], list[int]]] = []
    for prompt, new in texts:
        reserved = pool.reserve(prompt, len(prompt) + new)
        if reserved is None:
            pool.release(running.pop(0)[1]) if running else None
            continue
        pages, computed = reserved
        assert len(pages) == -(-(len(prompt) + new) // PAGE)
        assert computed % PAGE == 0
        assert computed < len(prompt)
        pool.remember(prompt, pages)
        running.append((prompt, pages))
        assert pool.used == len({page for _, pages in running for page in pages})
        for other, theirs in running[:-1]:
            for number, page in enumerate(pages):
                if page in theirs:
                    end = (number + 1) * PAGE
                    assert (theirs.index(page), other[:end]) == (number, prompt[:end])
    for _, pages in running:
        pool.release(pages)
    assert pool.used == 0
    assert pool.reserve([5] * 32, 32) is not None
