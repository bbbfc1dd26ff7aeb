"""Words for numbers in sentences that people read."""


def count_in_words(number: int | float, noun: str) -> str:
    """Returns a number with its noun: `1 GPU`, `8 GPUs`, `0.5 GPUs`.

    Args:
        number: Of what is counted.
        noun: One of them; its plural takes an s.
    """
    digits = str(number) if isinstance(number, int) else f"{number:g}"
    return f"{digits} {noun}{'' if number == 1 else 's'}"
