"""DeepSpeed's converter to its universal format, without executing code that checkpoints may contain.

python -m rayrlhf.train.universal --input_folder … --output_folder …
"""

from __future__ import annotations

from pathlib import Path

from deepspeed.checkpoint import ds_to_universal

from rayrlhf.train.safe_load import only_tensors


def main() -> None:
    arguments = ds_to_universal.parse_arguments()
    with only_tensors(Path(arguments.input_folder)):
        ds_to_universal.main(arguments)


if __name__ == "__main__":
    main()
