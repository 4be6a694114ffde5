"""The workplace of the tests of `distill`: this stage runs before it."""

from tests.distill.conftest import prepared, workplace

__all__ = ["prepared", "workplace"]
