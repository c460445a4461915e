"""A package, so that `python -m examples.orders` finds this one and not what some library left in site-packages."""
