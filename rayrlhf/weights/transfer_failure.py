"""Exceptions of weight transfer. Importable without torch, so that they can be pickled between processes."""

from __future__ import annotations


class TransferFailed(RuntimeError):
    """A member of a direct push failed or missed the deadline; the message names it."""
