"""A setting with a few words to choose from: they stand in its type, and the check and its message read them there."""

from typing import Any, get_args


def check_choice(field: str, value: Any, choices: Any) -> None:
    """Refuse a value that is not one of `choices`.

    Args:
        field: as the user knows it, such as optim.nonfinite; choices: a `Literal`.

    Raises:
        ValueError: naming the field, the value and what there is to choose.
    """
    known = get_args(choices)
    if value not in known:
        words = [str(word) for word in known]
        raise ValueError(f"{field}={value!r}: choose {', '.join(words[:-1])} or {words[-1]}")
