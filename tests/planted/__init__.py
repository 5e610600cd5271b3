"""Bugs to plant in the product, to see whether its tests notice: see __main__.py."""
