"""A step with a bug: it forgets its first row."""

from datakit.records import Prompt
from datakit.step import FrameStep, Split


class Lossy(FrameStep[Prompt, Prompt]):
    """Loses a row."""

    def apply(self, frame, kit):
        return Split(frame.select("id")[1:], frame.clear().select("id", reason="id"))
