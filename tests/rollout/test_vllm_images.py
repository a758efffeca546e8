"""Prompts with images as vLLM is given them. The engine itself: tests/integration/test_vision.py."""

from __future__ import annotations

import pytest

from rayrlhf.rollout.vllm_images import check_expanded, with_placeholders
from rayrlhf.samples import EncodedImage

PAD = 9
TWO, THREE = EncodedImage(b"a", 2), EncodedImage(b"b", 3)


def test_each_image_becomes_one_placeholder() -> None:
    assert with_placeholders([1, PAD, PAD, 5, PAD, PAD, PAD, 6], [TWO, THREE], PAD) == [1, PAD, 5, PAD, 6]
    assert with_placeholders([PAD, PAD, PAD, PAD, PAD], [TWO, THREE], PAD) == [PAD, PAD], "next to each other"


def test_other_numbers_of_tokens_are_errors() -> None:
    with pytest.raises(ValueError, match="an image of 3 tokens has 2 in its prompt"):
        with_placeholders([1, PAD, PAD, 5], [THREE], PAD)
    with pytest.raises(ValueError, match="1 of 2 images have no tokens"):
        with_placeholders([1, PAD, PAD, 5], [TWO, THREE], PAD)
    with pytest.raises(ValueError, match="reads 2 tokens where the prepared prompt has 3"):
        check_expanded([1, 2], [1, 2, 3])
