"""The tiny models and the workplace of the evaluation's tests."""

from tests.evaluate.conftest import loaded, model_folder, prepared, tracked, workplace

__all__ = ["loaded", "model_folder", "prepared", "tracked", "workplace"]
