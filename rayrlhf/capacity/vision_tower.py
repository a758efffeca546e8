"""Parameters and memory of Qwen2.5-VL's vision tower, from its `vision_config`. Pure.

A patch is a square of pixels (of two equal frames); merge² of them become one token of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class VisionTower:
    hidden: int
    depth: int
    heads: int
    intermediate: int
    merge: int  # patches along each side of a token
    patch_values: int  # of a patch: channels x frames x pixels
    out_hidden: int  # of the language model

    @property
    def patches_per_token(self) -> int:
        return self.merge**2

    @property
    def block_parameters(self) -> int:
        attention = 4 * self.hidden * (self.hidden + 1)
        mlp = 3 * self.hidden * self.intermediate + 2 * self.intermediate + self.hidden
        return attention + mlp + 2 * self.hidden

    @property
    def parameters(self) -> int:
        merged = self.hidden * self.patches_per_token
        merger = self.hidden + merged * (merged + 1) + self.out_hidden * (merged + 1)
        return self.patch_values * self.hidden + self.depth * self.block_parameters + merger

    def block_bytes(self, size: int, *, on_gpu: bool) -> int:
        """Bytes that autograd keeps of a block, per patch: two norms, the fused projection, of which values
        are a view, rotated queries and keys, attention's output, and the MLP.
        """
        norms = 2 * ((4 + 2 * size) * self.hidden + 4)
        copies = 1 if on_gpu else 2  # windows are attended one by one and put together again
        attention = (3 + 2 + copies) * self.hidden * size + 4 * self.heads
        return norms + attention + 4 * self.intermediate * size

    def ends_bytes(self, size: int) -> int:
        """Bytes that autograd keeps before and after the blocks, per patch: pixels, and the merger's norm and
        GELU.
        """
        pixels = self.patch_values * (4 + (size if size != 4 else 0))
        return pixels + (4 + 2 * size) * self.hidden + 2 * self.hidden * size

    def trained_bytes(self, size: int, *, on_gpu: bool, checkpointing: bool) -> tuple[int, int]:
        """(kept, recomputed) bytes per patch: until the tower's backward pass, the last of a micro-batch, and
        of the block that is then recomputed.
        """
        block = self.block_bytes(size, on_gpu=on_gpu)
        kept = self.hidden * size if checkpointing else block
        return self.depth * kept + self.ends_bytes(size), block if checkpointing else 0

    def forward_bytes(self, size: int) -> int:
        """Bytes of a forward pass without gradients, per patch."""
        return (2 * self.hidden + max(8 * self.hidden, 3 * self.intermediate)) * size + 4 * self.patch_values


def tower_of(config: Mapping[str, Any]) -> VisionTower:
    """From the contents of a `vision_config`."""
    frames, channels = config.get("temporal_patch_size", 2), config.get("in_channels", 3)
    return VisionTower(
        hidden=config["hidden_size"],
        depth=config["depth"],
        heads=config["num_heads"],
        intermediate=config["intermediate_size"],
        merge=config["spatial_merge_size"],
        patch_values=config["patch_size"] ** 2 * frames * channels,
        out_hidden=config["out_hidden_size"],
    )
