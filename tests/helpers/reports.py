"""A benchmark's report that remembers what it was told."""

import copy

from elmkernels.bench.benchmark import Report


class Recorded(Report):
    """results: copied at every save. stop: the stage at which it is interrupted."""

    def __init__(self, results: dict | None = None, stop: str | None = None) -> None:
        self.results, self.stop = results, stop
        self.stages: list[str] = []
        self.texts: list[str] = []
        self.saved: list[dict | None] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)
        if text == self.stop:
            raise KeyboardInterrupt

    def print(self, text: str) -> None:
        self.texts.append(text)

    def save(self) -> None:
        self.saved.append(copy.deepcopy(self.results))
