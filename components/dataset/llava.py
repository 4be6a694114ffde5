from components.dataset.source import Source
from components.settings import DataSettings


def source(settings: DataSettings) -> Source:
    raise NotImplementedError
