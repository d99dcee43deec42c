"""A page as the tests of the report ask about it: no browser, only the standard parser."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """What the tests ask of a page: its tags, ids, balance, and the text of each element with an id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.scripts: list[str] = []
        self._open: list[tuple[str, str | None]] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, dict(attrs).get("id")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        opened, _ = self._open.pop()
        assert opened == tag, f"<{opened}> closed by </{tag}>"

    def handle_data(self, data: str) -> None:
        for tag, id in self._open:
            if id:
                self.text[id] = self.text.get(id, "") + data
            if tag == "script":
                self.scripts.append(data)

    @property
    def ids(self) -> list[str]:
        return [id for _, attrs in self.tags if (id := attrs.get("id"))]

    def marks(self) -> list[int]:
        """The steps of the take-off markers, over all charts."""
        found = [attrs["data-step"] for _, attrs in self.tags if "data-step" in attrs]
        return [int(step) for step in found if step]
