"""Whether tau decides what is recorded, or the cap on the number of candidates."""

MOST_CAPPED = 0.1
"""Share of the positions that may be cut short before it is said."""


def capped_text(share: float, k_max: int, *, needed: int | None = None) -> str | None:
    """That ``record.k_max`` decides in place of tau, and what would help; None where it is rare.

    Args:
        share: of the learned positions, those that have ``k_max`` candidates and need more.
        k_max: most candidates of a position.
        needed: candidates that are enough for all but ``MOST_CAPPED`` of them, where measured.
    """
    if share <= MOST_CAPPED:
        return None
    if needed is None:
        help_text = f"Try record.k_max={2 * k_max}; `lrmc plan` measures how many are needed"
    else:
        help_text = (
            f"record.k_max={needed} would do for all but {100 * MOST_CAPPED:g} % of them, as "
            "measured on a sample"
        )
    return (
        f"{100 * share:.0f} % of the learned positions are cut short by record.k_max = {k_max}: "
        f"there it decides what is kept, and not tau. {help_text}."
    )
