"""Are the arrays in a cache plain numbers? Asked before Megatron reads them.

Megatron keeps its sample indices as .npy files beside the data and reads them with `numpy.load(…, allow_pickle=True)`, which
runs the code of any file that is no array at all. A dataset folder may come from somebody else.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np


def check_arrays(folders: Iterable[str | Path]) -> None:
    """Refuse a .npy file below the folders that is not an array of plain numbers.

    Raises:
        ValueError: naming the file.
    """
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.npy")):
            try:
                with path.open("rb") as file:
                    version = np.lib.format.read_magic(file)
                    read = {
                        (1, 0): np.lib.format.read_array_header_1_0,
                        (2, 0): np.lib.format.read_array_header_2_0,
                    }
                    _, _, dtype = read[version](file)
            except (ValueError, KeyError, OSError, SyntaxError, TypeError) as error:
                raise ValueError(
                    f"{path} is no array ({error}); remove it: Megatron makes it again"
                ) from None
            if dtype.hasobject:
                raise ValueError(
                    f"{path} holds Python objects, which run code when they are read; remove it: Megatron makes it again"
                )
