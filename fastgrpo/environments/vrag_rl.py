# SPDX-License-Identifier: Apache-2.0
"""VRAG-RL's environment (Alibaba-NLP/VRAG@24f8d05): search pages, zoom into them."""

from __future__ import annotations

from fastgrpo.environments.environment import Environment, ToolFault, tool
from fastgrpo.environments.tools.index import Index
from fastgrpo.errors import InputError
from fastgrpo.images import ImageFault, load_image


class VragRL(Environment):
    """Four calls to `search` and `zoom` (its crop), as published.

    Pages come from the row's `documents` (a list of {"id", "text", "image"}), else from `index`, a
    file of such mappings, one a line. `results`: pages a search returns. `retrieved`: the pages
    returned, in order, for `vrag_rl/episode`.
    """

    def __init__(self, index: str | None = None, results: int = 1, max_calls: int = 4):
        super().__init__(max_calls)
        self.results = results
        self._file = None if index is None else Index.of_file(index)
        self._index = self._file
        self.retrieved: list[str] = []

    def reset(self, **row) -> None:
        super().reset(**row)
        documents = row.get("documents")
        self._index = Index.of_rows(documents) if documents else self._file
        if self._index is None:
            raise InputError("vrag_rl: a row without 'documents', and no index is set")
        self.retrieved = []

    @tool
    def search(self, query: str) -> list:
        """
        Finds the pages that fit a query best.

        Args:
            query: A few words to look for.

        Returns:
            The pages that were found.
        """
        if not isinstance(query, str):
            raise ToolFault(f"query: expected text, got {type(query).__name__}")
        pages = self._index.search(query, self.results)
        shown: list = []
        for page in pages:
            self.retrieved.append(page.id)
            if page.image is None:
                shown.append({"type": "text", "text": f"Page {page.id}: {page.text}"})
                continue
            try:
                shown += self._see(load_image(page.image), f"Page {page.id}.")
            except ImageFault as fault:
                raise ToolFault(f"page {page.id} cannot be shown: {fault}") from fault
        if any(part["type"] == "image" for part in shown):
            return shown, [page.id for page in pages]
        text = "\n".join(part["text"] for part in shown) or "No page was found."
        return text, [page.id for page in pages]


ENVIRONMENT = VragRL
