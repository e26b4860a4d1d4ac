"""What a check of the reliability table returns."""

from typing import NamedTuple


class Row(NamedTuple):
    """`tried` times something was done to it, `survived` times it behaved as promised, `lost` is what was lost or went
    wrong, `seconds` how long the check took; `note` says what was done and, where it did not pass, why."""

    check: str
    tried: int
    survived: int
    lost: int
    seconds: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.survived == self.tried > 0 and self.lost == 0
