"""Pages of a pool: which are free, which hold the beginning of texts seen before, and which texts share them.

A full page of a prompt is known by all tokens up to its end, so that a text that begins like another one reads that
one's pages instead of computing them again. Pages that no running text uses keep what they hold until they are needed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence


class PagePool:
    """Book-keeping of the pages of keys and values; it touches none of them.

    Args:
        num_pages: Pages in all.
        page_tokens: Tokens of a page.
    """

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.num_pages, self.page_tokens = num_pages, page_tokens
        self._free = list(range(num_pages))
        self._users: Counter[int] = Counter()
        self._known: dict[tuple[int, ...], int] = {}
        """Page by the tokens up to its end."""
        self._prefix: dict[int, tuple[int, ...]] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Known pages that nobody uses, the one that was used last at the end."""

    @property
    def used(self) -> int:
        """Pages of running texts."""
        return self.num_pages - len(self._free) - len(self._idle)

    def reserve(self, prompt: Sequence[int], tokens: int) -> tuple[list[int], int] | None:
        """Pages for a text, first those that hold its beginning already, and how many of its tokens these hold.

        All that the text can ever need is reserved at once, so that a running text never has to wait for pages. The
        last token of a prompt always has to be computed: the scores behind it are wanted.

        Args:
            prompt: Its tokens.
            tokens: How many of its tokens will be kept at most.

        Returns:
            None if there are not enough pages now.
        """
        shared: list[int] = []
        for end in range(self.page_tokens, len(prompt), self.page_tokens):
            page = self._known.get(tuple(prompt[:end]))
            if page is None:
                break
            shared.append(page)
        needed = -(-tokens // self.page_tokens) - len(shared)
        idle = len(self._idle) - sum(page in self._idle for page in shared)
        if needed > len(self._free) + idle:
            return None
        for page in shared:
            self._take(page)
        fresh = [self._fresh() for _ in range(needed)]
        return shared + fresh, len(shared) * self.page_tokens

    def remember(self, prompt: Sequence[int], pages: Sequence[int]) -> None:
        """Notes that these pages hold the prompt's keys and values; full pages serve texts that begin alike."""
        for number, end in enumerate(range(self.page_tokens, len(prompt) + 1, self.page_tokens)):
            prefix, page = tuple(prompt[:end]), pages[number]
            if prefix not in self._known and page not in self._prefix:
                self._known[prefix], self._prefix[page] = page, prefix

    def release(self, pages: Sequence[int]) -> None:
        """Gives back a text's pages."""
        for page in reversed(pages):  # of one text, the pages behind are forgotten before those that they build on
            self._users[page] -= 1
            if self._users[page] == 0:
                del self._users[page]
                if page in self._prefix:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def forget(self) -> None:
        """Takes it that pages hold nothing any more: no text shares those that there are."""
        self._free += self._idle
        self._idle.clear()
        self._known.clear()
        self._prefix.clear()

    def _take(self, page: int) -> None:
        self._idle.pop(page, None)
        self._users[page] += 1

    def _fresh(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._known[self._prefix.pop(page)]
        self._users[page] += 1
        return page
