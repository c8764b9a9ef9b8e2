"""Which Holloway this is."""

from importlib.metadata import PackageNotFoundError, version


def product_version() -> str:
    """Of the installed package; 0 where it runs from its source alone."""
    try:
        return version("holloway")
    except PackageNotFoundError:
        return "0"
