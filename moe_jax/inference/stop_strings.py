"""Stop strings: where a text that comes in pieces is to end."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string, wherever the pieces are cut.

    What could still become a stop string is held back, so that nothing of one is ever passed on. If
    several stop strings occur, the one that is complete first ends the text, before where it
    begins; so the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]):
        """Begins an empty text; `stops` are not empty."""
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, piece: str) -> str:
        """What of the text so far may be passed on now; nothing after a stop string."""
        if self.found is not None:
            return ""
        text = self._held + piece
        ends = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        if ends:
            _, start, self.found = min(ends)
            self._held = ""
            return text[:start]
        keep = len(text) - self._beginning_at_end(text)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """The text held back, now that no more follows."""
        held, self._held = self._held, ""
        return held

    def _beginning_at_end(self, text: str) -> int:
        """Characters at the end of `text` with which a stop string begins; as many as possible."""
        longest = max((len(stop) for stop in self._stops), default=0) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
