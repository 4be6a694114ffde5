"""Fixtures of the rooms that the toy joins: prepared data, and a data set for its models."""

from tests.dataset.conftest import digits_settings, prepared, raw_folder
from tests.models.conftest import dataset, processor

__all__ = ["dataset", "digits_settings", "prepared", "processor", "raw_folder"]
