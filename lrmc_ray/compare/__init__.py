"""Methods against each other at equal budget, with intervals over seeds and items."""
