"""What can go wrong with a weight transfer, in words that travel between processes."""

from __future__ import annotations


class MeetingEnded(RuntimeError):
    """A peer of a direct push failed or did not come in time; the message says who."""
